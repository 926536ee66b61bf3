"""What a hop keeps of its latest optimizer step, to show it to a client that audits.

Rules:

1. A client learns the hashes of everything before it asks for anything: of a micro-batch when its
   gradient is sent on, of the state when a step is taken.
2. The tensors of a step are kept until the next one's first micro-batch comes, at most as many as
   the session has memory for; the states are those after the last step and before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.messages import MicroBatchDone
from swarm.protocol.tensors import WireTensor
from swarm.training_parts import HandledMicroBatch, state_hash

State = Mapping[str, WireTensor]


class TrainingRecord:
    """Of one session that may be audited."""

    def __init__(self, micro_batches: int) -> None:
        """``micro_batches``: how many are kept, at least one."""
        self._most = micro_batches
        self._begun: dict[int, tuple[WireTensor, WireTensor]] = {}
        self._done: dict[int, HandledMicroBatch] = {}
        self._states: dict[int, State] = {}
        self._step_taken = False

    def forwarded(self, number: int, given: WireTensor, sent: WireTensor) -> None:
        """Activations went through; a gradient will come."""
        if self._step_taken:
            self._done.clear()
            self._step_taken = False
        self._begun[number] = (given, sent)

    def forget(self, number: int) -> None:
        """No gradient will come."""
        self._begun.pop(number, None)

    async def returned(self, number: int, given: WireTensor, sent: WireTensor) -> MicroBatchDone:
        """The gradient went through; what the client is to be told of it."""
        handled = HandledMicroBatch(*self._begun.pop(number), given, sent)
        self._done[number] = handled
        while len(self._done) > self._most:
            del self._done[next(iter(self._done))]
        return await asyncio.to_thread(handled.done, number)

    def shown(self, number: int) -> HandledMicroBatch:
        """Raises ProtocolError(UNKNOWN_MICRO_BATCH) for one that is not kept."""
        if number not in self._done:
            raise ProtocolError(ErrorCode.UNKNOWN_MICRO_BATCH)
        return self._done[number]

    def state(self, step: int) -> State | None:
        """As it was after ``step``; None if that is not kept."""
        return self._states.get(step)

    async def stepped(self, step: int, before: State, after: State) -> bytes:
        """The optimizer has taken ``step``; the hash of the state after it."""
        self._states = {step - 1: before, step: after}
        self._step_taken = True
        return await asyncio.to_thread(state_hash, after)

    def clear(self) -> None:
        """The session goes on from another state."""
        self._begun.clear()
        self._done.clear()
        self._states.clear()
