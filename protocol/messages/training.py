"""Training: gradients through a chain, and the state of optimizers."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.messages.fields import (
    DIGEST_BYTES,
    MAX_BLOCKS,
    MAX_POLICY_BYTES,
    MAX_STEP,
    MAX_TOKENS,
    PEER,
    REVISION_BYTES,
    SESSION_ID_BYTES,
    Array,
    Bytes,
    Message,
    Real,
    TensorField,
    Text,
    Uint,
    wire,
)
from swarm.protocol.tensors import WireTensor

MAX_SEQUENCES = 256
"""In one micro-batch."""
MAX_MICRO_BATCHES = 64
MAX_RANK = 1024
MAX_TARGETS = 32
MAX_STATE_ELEMENTS = 1 << 30


@dataclass(frozen=True, slots=True)
class OpenTraining(Message):
    """Client to hop: reserve what training an adapter of ``[first_block, end_block)`` takes.

    The life of a training session is that of any other: SetRoute, RouteReady, Attach, Attached,
    CloseSession and SessionClosed mean the same. ``method``: 0 trains nothing here, 1 is LoRA,
    2 DoRA. ``optimizer``: 1 is AdamW, 2 Lion, 3 Adafactor. Initial values and dropout follow from
    ``seed`` and the names of tensors, so that they are the same on any node.
    """

    TAG = 40
    model_revision: bytes = wire(1, Bytes(REVISION_BYTES, REVISION_BYTES))
    first_block: int = wire(2, Uint(MAX_BLOCKS))
    end_block: int = wire(3, Uint(MAX_BLOCKS))
    wire_dtype: int = wire(4, Uint(255))
    previous_peer: str = wire(5, PEER)
    maximum_tokens: int = wire(6, Uint(MAX_TOKENS))
    """Of one micro-batch, all sequences together."""
    micro_batches_in_flight: int = wire(7, Uint(MAX_MICRO_BATCHES))
    method: int = wire(8, Uint(255))
    optimizer: int = wire(9, Uint(255))
    rank: int = wire(10, Uint(MAX_RANK), 0)
    alpha: float = wire(11, Real(0.0, 1e6), 0.0)
    target_modules: tuple[str, ...] = wire(12, Array(Text(64), MAX_TARGETS), ())
    dropout: float = wire(13, Real(0.0, 1.0), 0.0)
    seed: int = wire(14, Uint(MAX_STEP), 0)
    beta1: float = wire(15, Real(0.0, 1.0), 0.9)
    beta2: float = wire(16, Real(0.0, 1.0), 0.999)
    epsilon: float = wire(17, Real(0.0, 1.0), 1e-8)
    weight_decay: float = wire(18, Real(0.0, 1e3), 0.0)
    audited_micro_batches: int = wire(19, Uint(MAX_MICRO_BATCHES), 0)
    """The hop says what it handled (MicroBatchDone, ``state_hash``) and keeps as many micro-batches
    of a step, the latest ones, to show them; 0: neither."""
    policy: bytes = wire(40, Bytes(0, MAX_POLICY_BYTES), b"")
    """As of a session that answers (OpenSession)."""


@dataclass(frozen=True, slots=True)
class TrainingOpened(Message):
    """Hop to client. ``session_id`` is made by the hop and valid on this hop only."""

    TAG = 41
    session_id: bytes = wire(1, Bytes(SESSION_ID_BYTES, SESSION_ID_BYTES))
    reserved_bytes: int = wire(2, Uint(MAX_STEP), 0)
    dtype_class: str = wire(3, Text(16), "")
    """The precision that it computes in, as in SessionOpened."""
    audited_micro_batches: int = wire(4, Uint(MAX_MICRO_BATCHES), 0)
    """What it keeps; 0 of a hop that cannot be audited."""


@dataclass(frozen=True, slots=True)
class ForwardPart(Message):
    """A part of a micro-batch's activations, ``[1, tokens, hidden]``, on its way to the last block.

    The sequences of a micro-batch lie one after the other, ``lengths`` tokens each; parts come in
    the order of ``first_token``. Numbers of micro-batches grow. From the last hop to the client it
    carries the outputs.
    """

    TAG = 42
    micro_batch: int = wire(1, Uint(MAX_STEP))
    lengths: tuple[int, ...] = wire(2, Array(Uint(MAX_TOKENS), MAX_SEQUENCES))
    first_token: int = wire(3, Uint(MAX_TOKENS))
    activations: WireTensor = wire(4, TensorField())
    use_adapter: int = wire(5, Uint(1), 1)
    """0: as if there were no adapter, for a frozen reference."""
    needs_gradient: int = wire(6, Uint(1), 1)
    """0: no BackwardPart will follow."""


@dataclass(frozen=True, slots=True)
class BackwardPart(Message):
    """A part of the gradient of a micro-batch's outputs, on its way to the first block.

    From the first hop to the client it carries the gradient of the inputs.
    """

    TAG = 43
    micro_batch: int = wire(1, Uint(MAX_STEP))
    first_token: int = wire(2, Uint(MAX_TOKENS))
    gradients: WireTensor = wire(3, TensorField())


@dataclass(frozen=True, slots=True)
class AskGradientNorm(Message):
    """Client to every hop: optimizer step ``step`` is due; how large is your gradient?

    The hop has the gradients of ``micro_batches`` micro-batches since its last step, or refuses.
    """

    TAG = 44
    step: int = wire(1, Uint(MAX_STEP))
    micro_batches: int = wire(2, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class GradientNorm(Message):
    """Hop to client: the sum of the squares of its gradients."""

    TAG = 45
    step: int = wire(1, Uint(MAX_STEP))
    square_sum: float = wire(2, Real(0.0, 1e300))


@dataclass(frozen=True, slots=True)
class ApplyGradients(Message):
    """Client to every hop: multiply the gradients by ``scale`` and let the optimizer take a step.

    A step that was applied before is answered again and not applied twice.
    """

    TAG = 46
    step: int = wire(1, Uint(MAX_STEP))
    scale: float = wire(2, Real(0.0, 1e9))
    learning_rate: float = wire(3, Real(0.0, 1e3))


@dataclass(frozen=True, slots=True)
class GradientsApplied(Message):
    """Hop to client: the step is done."""

    TAG = 47
    step: int = wire(1, Uint(MAX_STEP))
    state_hash: bytes = wire(2, Bytes(0, DIGEST_BYTES), b"")
    """Of adapter and optimizer after the step; empty where nothing is audited."""


@dataclass(frozen=True, slots=True)
class AskState(Message):
    """Client to hop: send adapter and optimizer as they are after ``step``; answered by StateParts
    and one StateEnd. In an audited session also the state before the last step."""

    TAG = 48
    step: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class StatePart(Message):
    """Elements ``first_element`` and following of a tensor of ``elements``, as ``[1, 1, n]``.

    ``name`` is that of the tensor in PEFT's files without PEFT's prefix; optimizer tensors append
    ``#`` and their own name. From hop to client in a snapshot, from client to hop to go on from
    one.
    """

    TAG = 49
    name: str = wire(1, Text(256))
    elements: int = wire(2, Uint(MAX_STATE_ELEMENTS))
    first_element: int = wire(3, Uint(MAX_STATE_ELEMENTS))
    values: WireTensor = wire(4, TensorField())


@dataclass(frozen=True, slots=True)
class StateEnd(Message):
    """All of a state has been sent: ``tensors`` of them, as after ``step``."""

    TAG = 50
    step: int = wire(1, Uint(MAX_STEP))
    tensors: int = wire(2, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class StateRestored(Message):
    """Hop to client: it goes on from the state that the client sent."""

    TAG = 51
    step: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class ForgetMicroBatch(Message):
    """Client to every hop: no gradient will come for this micro-batch."""

    TAG = 52
    micro_batch: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class MicroBatchDone(Message):
    """Hop to client, in an audited session: SHA-256 of what it was given for a micro-batch and what
    it sent on. It comes before the hop can know whether anybody will look."""

    TAG = 53
    micro_batch: int = wire(1, Uint(MAX_STEP))
    activations_in: bytes = wire(2, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    activations_out: bytes = wire(3, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    gradients_in: bytes = wire(4, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    """Of the loss by the hop's outputs."""
    gradients_out: bytes = wire(5, Bytes(DIGEST_BYTES, DIGEST_BYTES))
    """Of the loss by its inputs."""


@dataclass(frozen=True, slots=True)
class ShowMicroBatch(Message):
    """Client to hop, after a step: send the tensors of one of its micro-batches."""

    TAG = 54
    micro_batch: int = wire(1, Uint(MAX_STEP))


@dataclass(frozen=True, slots=True)
class ShownPart(Message):
    """A part of one of a micro-batch's tensors, ``[1, tokens, hidden]``.

    ``which``: 0 to 3 in the order of MicroBatchDone. The tensors come one after the other, their
    parts in the order of ``first_token``.
    """

    TAG = 55
    micro_batch: int = wire(1, Uint(MAX_STEP))
    which: int = wire(2, Uint(3))
    first_token: int = wire(3, Uint(MAX_TOKENS))
    values: WireTensor = wire(4, TensorField())
