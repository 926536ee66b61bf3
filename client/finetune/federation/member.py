"""Takes part in a federation: trains the common adapter of each round, and gives the change away.

Rules:

1. A change leaves only under its masks, and only when the others are those who were invited.
2. Secrets of an attempt are used for that attempt and forgotten. What was trained is kept, so that
   a round that has to be repeated costs no second training.
3. Unmasking follows only for a sum of the agreed minimum, and once per attempt (``secure_sum``).
4. Who comes too late for a phase waits for the next attempt, or the next round.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from swarm.client.finetune.federated import change_vector
from swarm.client.finetune.federation.aggregator_client import AggregatorClient
from swarm.client.finetune.federation.files import Tensors, read_common_adapter
from swarm.client.finetune.federation.messages import RoundState, StoredAdapter, write_message
from swarm.client.finetune.federation.rounds import Message, Phase
from swarm.client.finetune.federation.terms import FederationTerms
from swarm.client.finetune.secure_sum import Participant, Words
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError, RemoteError, UsageError
from swarm.protocol.identity import Identity

log = logging.getLogger(__name__)

ROUNDS_FOLDER = "rounds"
PATIENCE_S = 1800.0
"""How long an aggregator that does not answer is asked again: it may be restarting."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
_TRY_AGAIN = (ErrorCode.INTERNAL, ErrorCode.NO_CAPACITY, ErrorCode.DRAINING, ErrorCode.TOO_SLOW)
_TOO_LATE = (
    ErrorCode.NOT_VALID_NOW,
    ErrorCode.UNEXPECTED_MESSAGE,
    ErrorCode.FOREIGN_OBJECT,
    ErrorCode.EQUIVOCATION,  # our process was started again, and this attempt has its old keys
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Learned:
    """What a participant has after its training of one round."""

    adapter: Mapping[str, torch.Tensor]
    examples: int


class LocalTraining(Protocol):
    """Trains one round on this participant's data."""

    async def __call__(self, number: int, before: Tensors, folder: Path) -> Learned:
        """``folder`` is of this round alone; what is in it may be gone on with."""


class MemberObserver:
    """Is told how it goes; the methods do nothing here."""

    def round_begins(self, number: int, rounds: int) -> None:
        """Its adapter is here, training begins."""

    def sent(self, number: int, phase: Phase) -> None:
        """A message has arrived at the aggregator."""

    def repeated(self, number: int, attempt: int) -> None:
        """Too few stayed: what was trained is sent again."""


class Member:
    """One participant in one federation."""

    def __init__(
        self,
        client: AggregatorClient,
        identity: Identity,
        terms: FederationTerms,
        train: LocalTraining,
        output: Path,
        *,
        clock: Clock,
        observer: MemberObserver | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Raises UsageError when the identity is not invited."""
        if identity.peer_id not in terms.invited:
            raise UsageError(f"{identity.peer_id} is not invited to this federation")
        self._client = client
        self._identity = identity
        self._terms = terms
        self._train = train
        self._output = output
        self._clock = clock
        self._observer = observer or MemberObserver()
        self._patience_s = patience_s
        self._trained: tuple[int, StoredAdapter] | None = None
        self._vector: Words | None = None
        self._participant: Participant | None = None
        self._round_id = b""
        self._sent: set[Phase] = set()

    async def run(self) -> dict[str, torch.Tensor]:
        """All rounds; the adapter after the last one.

        Raises NetworkError when the aggregator stays away, ProtocolError when it breaks the
        protocol. After a cancel another run goes on with the training where its last snapshot is.
        """
        version = ""
        while True:
            after = version
            state = await self._insist(lambda: self._client.state(after))  # noqa: B023
            version = state.version
            if state.number > self._terms.rounds:
                raise ProtocolError(ErrorCode.BAD_FIELD, "more rounds than agreed on")
            if state.phase is Phase.DONE:
                result = await self._fetch(state.adapter)
                if result is None:
                    continue
                shutil.rmtree(self._output / ROUNDS_FOLDER, ignore_errors=True)
                return result
            if self._trained == (state.number, state.adapter):
                await self._answer(state)
            else:
                await self._learn(state)
                version = ""  # the state may be another one after so long a time

    async def _learn(self, state: RoundState) -> None:
        before = await self._fetch(state.adapter)
        if before is None:
            return
        self._observer.round_begins(state.number, self._terms.rounds)
        folder = self._folder(state.adapter)
        learned = await self._train(state.number, before, folder)
        self._vector = change_vector(
            before, learned.adapter, learned.examples, len(self._terms.invited)
        )
        self._trained = (state.number, state.adapter)
        for old in (self._output / ROUNDS_FOLDER).iterdir():
            if old.name != folder.name:
                shutil.rmtree(old, ignore_errors=True)

    async def _answer(self, state: RoundState) -> None:
        """The message that is due, if any is."""
        if state.phase is Phase.ADVERTISE and state.round_id != self._round_id:
            if state.attempt > 1:
                self._observer.repeated(state.number, state.attempt)
            self._participant = Participant(self._identity, state.round_id, self._terms.invited)
            self._round_id = state.round_id
            self._sent = set()
        if state.round_id != self._round_id or state.phase in self._sent:
            return
        message = self._message(state)
        if message is None:
            return
        body = write_message(message)
        self._sent.add(state.phase)
        try:
            await self._insist(lambda: self._client.send(state.round_id, state.phase, body))
        except RemoteError as error:
            if error.code not in _TOO_LATE:
                raise
            log.info("dropped out of this attempt: %s", error)
            self._participant = None
        else:
            self._observer.sent(state.number, state.phase)

    def _message(self, state: RoundState) -> Message | None:
        if self._participant is None or self._vector is None:
            return None
        own = self._identity.peer_id
        match state.phase:
            case Phase.ADVERTISE:
                return self._participant.advertise()
            case Phase.SHARE if any(key.peer == own for key in state.keys):
                return self._participant.share(state.keys)
            case Phase.MASKED if own in (state.shares or {}):
                return self._participant.masked(self._vector, state.shares or {})
            case Phase.UNMASK if own in state.stayed:
                if len(state.stayed) < self._terms.minimum:
                    raise ProtocolError(ErrorCode.BAD_FIELD, "a sum of fewer than agreed on")
                return self._participant.unmask(state.stayed)
        return None

    async def _fetch(self, stored: StoredAdapter) -> dict[str, torch.Tensor] | None:
        """None when the aggregator has moved on meanwhile."""
        path = self._folder(stored) / "common.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            try:
                await self._insist(lambda: self._client.fetch_adapter(stored, path))
            except RemoteError as error:
                if error.code in _TOO_LATE:
                    return None
                raise
        return read_common_adapter(path, stored)

    def _folder(self, stored: StoredAdapter) -> Path:
        """Of the round that begins with it: another adapter is another round."""
        name = f"{self._terms.federation_id.hex()[:8]}-{stored.sha256[:16]}"
        return self._output / ROUNDS_FOLDER / name

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Ask again while the aggregator is away, up to the patience."""
        give_up_s = self._clock.monotonic_s() + self._patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await call()
            except (NetworkError, RemoteError) as error:
                is_hopeless = isinstance(error, RemoteError) and error.code not in _TRY_AGAIN
                if is_hopeless or self._clock.monotonic_s() > give_up_s:
                    raise
                log.info("%s; asking again", error)
            await self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
