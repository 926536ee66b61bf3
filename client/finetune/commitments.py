"""What the hops of a training say that they handled, and where they contradict each other. Pure.

Every hop tells the hashes of what it was given for a micro-batch and what it sent on. What one sent
the next was given; at the ends of the chain the client itself knows. A hop that contradicts the
client lies, or was lied to by its own links, which are authenticated; of two neighbours it cannot
be told which one lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.ledger.transcript import tensor_hash
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import MicroBatchDone
from swarm.protocol.tensors import WireTensor


@dataclass(slots=True)
class MicroBatchRecord:
    """One micro-batch of the present step."""

    number: int
    lengths: tuple[int, ...]
    use_adapter: bool
    activations_sent: bytes
    """By the client, as the three hashes that follow."""
    activations_received: bytes = b""
    gradients_sent: bytes = b""
    gradients_received: bytes = b""
    done: dict[int, MicroBatchDone] = field(default_factory=dict)
    """By the hop's place in the chain."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Conflict:
    """One hop that contradicts the client or says nothing, or two neighbours; by their places."""

    hops: tuple[int, ...]
    reason: str


class Commitments:
    """Of one step of a chain; ``binds`` says of each hop whether it promised them."""

    def __init__(self, binds: Sequence[bool]) -> None:
        self._binds = tuple(binds)
        self._records: dict[int, MicroBatchRecord] = {}

    def sent(
        self, number: int, lengths: tuple[int, ...], activations: WireTensor, *, use_adapter: bool
    ) -> None:
        """The client sent the inputs of a micro-batch whose gradient will be asked for."""
        self._records[number] = MicroBatchRecord(
            number, lengths, use_adapter, tensor_hash(activations)
        )

    def received(self, number: int, activations: WireTensor) -> None:
        """Outputs, also of micro-batches without a gradient."""
        if (record := self._records.get(number)) is not None:
            record.activations_received = tensor_hash(activations)

    def sent_gradients(self, number: int, gradients: WireTensor) -> None:
        """The gradient of the outputs."""
        record = self._records[number] = self._records.pop(number)
        record.gradients_sent = tensor_hash(gradients)

    def received_gradients(self, number: int, gradients: WireTensor) -> None:
        """The gradient of the inputs."""
        self._records[number].gradients_received = tensor_hash(gradients)

    def forget(self, number: int) -> None:
        """No gradient is asked for."""
        self._records.pop(number, None)

    def add(self, hop: int, done: MicroBatchDone) -> None:
        """What a hop says. Raises ProtocolError for a micro-batch that it cannot have done."""
        record = self._records.get(done.micro_batch)
        if record is None or hop in record.done or not record.gradients_sent:
            raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, "a micro-batch that is not done")
        record.done[hop] = done

    def conflict(self) -> Conflict | None:
        """The first one, when all hops have said all that they had to."""
        hops = [place for place, binds in enumerate(self._binds) if binds]
        for record in self._records.values():
            for place in hops:
                if place not in record.done:
                    return Conflict((place,), "it does not say what it handled")
            for place in hops:
                if (found := self._conflict_of(record, place)) is not None:
                    return found
        return None

    def _conflict_of(self, record: MicroBatchRecord, place: int) -> Conflict | None:
        own, last = record.done[place], len(self._binds) - 1
        is_right = True
        if place == 0:
            is_right = (own.activations_in, own.gradients_out) == (
                record.activations_sent,
                record.gradients_received,
            )
        if place == last:
            is_right = is_right and (own.activations_out, own.gradients_in) == (
                record.activations_received,
                record.gradients_sent,
            )
        if not is_right:
            return Conflict((place,), "it says that it handled something else")
        following = record.done.get(place + 1)
        if following is not None and (own.activations_out, own.gradients_in) != (
            following.activations_in,
            following.gradients_out,
        ):
            return Conflict((place, place + 1), "they contradict each other")
        return None

    def take(self) -> tuple[MicroBatchRecord, ...]:
        """All micro-batches of the step, in the order of their gradients; the next step begins with
        none."""
        records = tuple(self._records.values())
        self._records.clear()
        return records
