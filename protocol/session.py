"""The session's two state machines, without I/O, clock or tensors' contents.

``HopSession`` runs on a node and decides what each arriving step means; ``ClientSession`` numbers
the client's steps and checks the answers. Rules that hold in every state:

1. Steps are numbered 1, 2, 3 ... A hop applies each number once, in order.
2. A number that was applied before is a repetition: it changes nothing. It is answered from the
   result kept, or by the computation still running, or refused as stale.
3. A step starts at ``position <= length``. Below the length it first cuts the cache there: that is
   rollback, for speculation and for retries alike.
4. A refused step leaves the state as it was.
5. At most ``maximum_steps_in_flight`` steps are accepted and not yet computed.
6. A result counts only if it answers a step in flight, with exactly its position and tokens.
7. A replay fills the cache with what steps before had brought there. It has no number: a hop that
   takes another's place begins with the number of the first step that it will see itself.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto

from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import (
    DIGEST_BYTES,
    MAX_BLOCKS,
    MAX_PAYLOAD_BYTES,
    MAX_ROWS,
    MAX_TOKENS,
    OpenSession,
    Replay,
    Step,
    StepResult,
)
from swarm.protocol.tensors import ITEM_BYTES, DType, Encoding, WireTensor

LONGEST_STEP_TOKENS = 512
"""``rows x tokens`` of one step that every node takes, as far as its payload may be that large.

What a node announces as ``maximum_step_tokens`` is what it prefers. A hop that takes another's
place may get steps that were cut for the one before.
"""


def accepted_step_tokens(hidden_size: int, dtype: DType) -> int:
    """Most ``rows x tokens`` of one step that a node must take."""
    return max(1, min(LONGEST_STEP_TOKENS, MAX_PAYLOAD_BYTES // (hidden_size * ITEM_BYTES[dtype])))


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """What both sides agreed on when the session was opened."""

    rows: int
    maximum_tokens: int
    hidden_size: int
    wire_dtype: DType
    wire_encoding: Encoding
    maximum_step_tokens: int
    maximum_steps_in_flight: int

    @property
    def maximum_payload_bytes(self) -> int:
        """Largest payload that a step of this session can have. zstd may add a little to noise."""
        elements = max(self.maximum_step_tokens, self.rows) * self.hidden_size
        return min(elements * ITEM_BYTES[self.wire_dtype] + 1024, MAX_PAYLOAD_BYTES)


def check_open(message: OpenSession) -> tuple[DType, Encoding]:
    """Check what the field bounds cannot say. Raises ProtocolError; returns the parsed codes."""
    if not 0 <= message.first_block < message.end_block <= MAX_BLOCKS:
        raise ProtocolError(ErrorCode.BAD_FIELD, "empty or reversed span")
    if not 1 <= message.rows <= MAX_ROWS or not 1 <= message.maximum_tokens <= MAX_TOKENS:
        raise ProtocolError(ErrorCode.BAD_FIELD, "rows or tokens out of bounds")
    padding = message.left_padding
    if padding and len(padding) != message.rows:
        raise ProtocolError(ErrorCode.BAD_FIELD, "one left padding per row")
    if len(message.adapter_id) not in (0, DIGEST_BYTES):
        raise ProtocolError(ErrorCode.BAD_FIELD, "an adapter's id has 32 bytes")
    if message.first_step < 1:
        raise ProtocolError(ErrorCode.BAD_FIELD, "steps start at 1")
    if any(count >= message.maximum_tokens for count in padding):
        raise ProtocolError(ErrorCode.BAD_FIELD, "a row of nothing but padding")
    try:
        return DType(message.wire_dtype), Encoding(message.wire_encoding)
    except ValueError:
        raise ProtocolError(ErrorCode.UNSUPPORTED_DTYPE, "unknown dtype or encoding") from None


class Verdict(Enum):
    """What a hop does with a step that was not refused."""

    APPLY = auto()
    """Compute it; call ``completed`` afterwards."""
    ANSWER_AGAIN = auto()
    """Computed before and the result is kept: send it again."""
    IN_PROGRESS = auto()
    """Being computed; its result will be sent anyway."""


class HopSession:
    """A node's view of one session: which steps were accepted, and how long the cache is."""

    def __init__(self, terms: SessionTerms, first_step: int = 1) -> None:
        self.terms = terms
        self._next_step = first_step
        self._length = 0
        self._in_flight: set[int] = set()
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._computed_step = 0
        self._rows_as_of_step = 0

    @property
    def length(self) -> int:
        """Tokens in the cache once all accepted steps are computed."""
        return self._length

    @property
    def steps_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def received_step(self) -> int:
        """The latest step accepted; what came before it was accepted too."""
        return self._next_step - 1

    @property
    def computed_step(self) -> int:
        """The latest step computed here; 0 before the first."""
        return self._computed_step

    @property
    def rows_as_of_step(self) -> int:
        """What was computed has its rows in the order that the steps up to this one asked for."""
        return max(self._rows_as_of_step, self._computed_step)

    def row_order_of(self, step: Step) -> tuple[int, ...]:
        """How ``step`` permutes the rows here: not at all if they were replayed in that order."""
        return () if step.step <= self._rows_as_of_step else step.row_order

    def accept_replay(self, replay: Replay) -> None:
        """Decide on a replay. Raises ProtocolError, and then the state is unchanged."""
        if replay.position > self._length:
            raise ProtocolError(ErrorCode.GAP, f"position {replay.position} after {self._length}")
        self._check_tensor(replay.activations, replay.position)
        self._length = replay.position + replay.activations.shape[1]
        self._rows_as_of_step = max(self._rows_as_of_step, replay.rows_as_of_step)

    def require_new(self) -> None:
        """Raise ProtocolError once anything was accepted."""
        if self._length or self._in_flight or self._computed_step:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "the session has begun already")

    def take_over(self, length: int, next_step: int) -> None:
        """Go on where another hop was. Raises ProtocolError, and then the state is unchanged."""
        self.require_new()
        if not next_step >= 1 or not 0 <= length <= self.terms.maximum_tokens:
            raise ProtocolError(ErrorCode.BAD_FIELD, f"length {length}, step {next_step}")
        self._next_step = next_step
        self._length = length
        self._computed_step = self._rows_as_of_step = next_step - 1

    def accept(self, step: Step) -> Verdict:
        """Decide on an arriving step. Raises ProtocolError, and then the state is unchanged."""
        if step.step < 1:
            raise ProtocolError(ErrorCode.BAD_STEP, "steps start at 1")
        if step.step < self._next_step:
            if step.step in self._in_flight:
                return Verdict.IN_PROGRESS
            if step.step in self._kept:
                return Verdict.ANSWER_AGAIN
            raise ProtocolError(ErrorCode.STALE_STEP, f"step {step.step} is no longer kept")
        if step.step > self._next_step:
            raise ProtocolError(ErrorCode.GAP, f"expected step {self._next_step}, got {step.step}")
        if step.position > self._length:
            raise ProtocolError(ErrorCode.GAP, f"position {step.position} after {self._length}")
        self._check_step(step)
        if len(self._in_flight) >= self.terms.maximum_steps_in_flight:
            raise ProtocolError(ErrorCode.TOO_MANY_STEPS, "wait for results")
        self._next_step += 1
        self._length = step.position + step.activations.shape[1]
        self._in_flight.add(step.step)
        return Verdict.APPLY

    def completed(self, step: int) -> tuple[int, ...]:
        """Note that the step was computed; returns the steps whose kept results may be dropped."""
        self._in_flight.remove(step)
        self._computed_step = step
        self._kept[step] = None
        dropped = []
        while len(self._kept) > self.terms.maximum_steps_in_flight:
            dropped.append(self._kept.popitem(last=False)[0])
        return tuple(dropped)

    def _check_step(self, step: Step) -> None:
        tensor = step.activations
        self._check_tensor(tensor, step.position)
        rows, tokens, _ = tensor.shape
        if not 1 <= step.output_tokens <= tokens:
            raise ProtocolError(ErrorCode.BAD_FIELD, f"output_tokens {step.output_tokens}")
        order = step.row_order
        if order and (len(order) != rows or any(row >= rows for row in order)):
            raise ProtocolError(ErrorCode.BAD_FIELD, "row_order does not fit the rows")

    def _check_tensor(self, tensor: WireTensor, position: int) -> None:
        terms = self.terms
        if tensor.dtype is not terms.wire_dtype:
            raise ProtocolError(ErrorCode.BAD_TENSOR, f"dtype {tensor.dtype.name}")
        rows, tokens, hidden = tensor.shape
        if rows != terms.rows or hidden != terms.hidden_size:
            raise ProtocolError(ErrorCode.BAD_TENSOR, f"shape {tensor.shape}")
        # One token for each row must always be possible, however many rows a session has.
        if tokens > 1 and rows * tokens > terms.maximum_step_tokens:
            raise ProtocolError(ErrorCode.TOO_LARGE, f"{rows} x {tokens} tokens in one step")
        if position + tokens > terms.maximum_tokens:
            raise ProtocolError(ErrorCode.BAD_POSITION, "beyond what the session reserved")


@dataclass(frozen=True, slots=True)
class IssuedStep:
    """A step that the client sent and that has no result yet."""

    step: int
    position: int
    tokens: int
    output_tokens: int


class ClientSession:
    """The client's view: numbers its steps and accepts exactly one result for each."""

    def __init__(self, terms: SessionTerms) -> None:
        self.terms = terms
        self._next_step = 1
        self._length = 0
        self._in_flight: dict[int, IssuedStep] = {}

    @property
    def length(self) -> int:
        """Tokens in the remote caches once all issued steps are computed."""
        return self._length

    @property
    def oldest_in_flight(self) -> IssuedStep | None:
        """The first step without a result; None when all are answered."""
        return next(iter(self._in_flight.values()), None)

    @property
    def last_issued_step(self) -> int:
        """The latest step that was numbered; 0 before the first."""
        return self._next_step - 1

    @property
    def resume_step(self) -> int:
        """The first step that a hop which takes another's place will see."""
        oldest = self.oldest_in_flight
        return oldest.step if oldest is not None else self._next_step

    @property
    def resume_position(self) -> int:
        """How many positions were in the caches before :attr:`resume_step`, as far as it needs."""
        oldest = self.oldest_in_flight
        return oldest.position if oldest is not None else self._length

    def is_answered(self, step: int) -> bool:
        """Whether the step was issued and has its result, or was given up."""
        return step < self._next_step and step not in self._in_flight

    def give_up(self) -> None:
        """Forget the steps in flight, and what they would have added. Their numbers stay used."""
        self._length = self.resume_position
        self._in_flight.clear()

    @property
    def may_issue(self) -> bool:
        """Whether the window has room for one more step."""
        return len(self._in_flight) < self.terms.maximum_steps_in_flight

    def issue(self, position: int, tokens: int, output_tokens: int) -> IssuedStep:
        """Number a new step. Raises ValueError for what a hop would refuse: a bug of the caller."""
        if not self.may_issue:
            raise ValueError("the window of steps in flight is full")
        if not 0 <= position <= self._length:
            raise ValueError(f"position {position} leaves a gap after {self._length}")
        if tokens < 1 or position + tokens > self.terms.maximum_tokens:
            raise ValueError(
                f"{position} + {tokens} tokens do not fit the {self.terms.maximum_tokens} reserved"
            )
        if not 1 <= output_tokens <= tokens:
            raise ValueError(f"cannot return {output_tokens} of {tokens} tokens")
        issued = IssuedStep(self._next_step, position, tokens, output_tokens)
        self._next_step += 1
        self._length = position + tokens
        self._in_flight[issued.step] = issued
        return issued

    def accept(self, result: StepResult) -> IssuedStep | None:
        """Match a result to its step; None for a repetition of one that was answered already.

        Raises ProtocolError when it answers a step never issued, or not what was asked.
        """
        issued = self._in_flight.get(result.step)
        if issued is None:
            if 1 <= result.step < self._next_step:
                return None
            raise ProtocolError(ErrorCode.BAD_STEP, f"no step {result.step} was sent")
        tensor = result.activations
        expected = (self.terms.rows, issued.output_tokens, self.terms.hidden_size)
        if result.position != issued.position:
            raise ProtocolError(ErrorCode.BAD_POSITION, f"result for position {result.position}")
        if tensor.shape != expected or tensor.dtype is not self.terms.wire_dtype:
            raise ProtocolError(ErrorCode.BAD_TENSOR, f"result of shape {tensor.shape}")
        del self._in_flight[result.step]
        return issued
