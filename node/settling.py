"""Presents the node's vouchers to its operator, hourly; serving never waits for it.

What the operator has paid, or refused for good, is noted in the node's books. When it is away, or
busy, everything is presented again later: presenting twice pays once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.ledger.node_books import ChannelEntry, LedgerReader, LedgerStore
from swarm.ledger.operator_client import OperatorClient, Settled
from swarm.ports import Clock
from swarm.protocol.envelope import Envelope, parse_envelope
from swarm.protocol.errors import ConfigError, ErrorCode, NetworkError, ProtocolError, RemoteError
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import Settlement, Voucher, parse, sign
from swarm.protocol.merkle import leaf_hash, root_of
from swarm.protocol.operator_objects import Enrolment, NodeCertificate

log = logging.getLogger(__name__)

INTERVAL_S = 3600.0
ENROL_AGAIN_S = 24 * 3600.0
"""Certificates are renewed, and an operator may have lost its books."""
RETRY_S = (60.0, 300.0, 900.0)
"""After the first, second and each further failure."""
VOUCHERS = 256
"""In one settlement."""
MOST_VOUCHERS = 100 * VOUCHERS
"""In one round; what is left comes with the next."""

FINAL = frozenset(
    {
        ErrorCode.BAD_SIGNATURE,
        ErrorCode.BAD_FIELD,
        ErrorCode.FOREIGN_OBJECT,
        ErrorCode.NOT_VALID_NOW,
    }
)
"""Refusals that no waiting changes. A limit may rise, and a model may get its price."""


@dataclass(frozen=True, slots=True)
class SettlingTerms:
    """With whom a node settles."""

    url: str
    operator_keys: Collection[bytes]
    """Whose allowances are presented."""
    payout: str = ""
    """Peer id of the account that gets the earnings; empty is the node's own."""
    certificate: Path | None = None
    """Where an organisation's certificate for this node is; read anew for each enrolment."""
    interval_s: float = INTERVAL_S


@dataclass(frozen=True, slots=True)
class Result:
    """What one round brought."""

    presented: int = 0
    paid_units: int = 0
    refused: int = 0


class Settling:
    """Of one node. ``run`` until cancelled; ``settle`` is one round."""

    def __init__(
        self,
        terms: SettlingTerms,
        identity: Identity,
        ledger_file: Path,
        store: LedgerStore,
        clock: Clock,
        observer: Callable[[Result], None] = lambda result: None,
    ) -> None:
        self._terms = terms
        self._identity = identity
        self._ledger_file = ledger_file
        self._store = store
        self._clock = clock
        self._observer = observer
        self._enrolled_s = -float("inf")

    async def run(self) -> None:
        """One round after the other; what goes wrong is tried again, and never raised."""
        failures = 0
        while True:
            try:
                self._observer(await self.settle())
                failures = 0
                wait_s = self._terms.interval_s
            except (ConfigError, NetworkError, RemoteError, ProtocolError) as error:
                log.warning("not settled: %s", error)
                wait_s = min(self._terms.interval_s, RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1
            await self._clock.sleep(wait_s)

    async def settle(self) -> Result:
        """Present all that is not settled. Raises NetworkError, RemoteError, ProtocolError."""
        presented = paid = refused = 0
        async with OperatorClient(self._terms.url) as operator:
            if self._clock.monotonic_s() - self._enrolled_s >= ENROL_AGAIN_S:
                certificate, organisation = await asyncio.to_thread(self._certificate)
                await operator.enrol(self._enrolment(organisation), certificate)
                self._enrolled_s = self._clock.monotonic_s()
            entries = await asyncio.to_thread(self._unsettled)
            for first in range(0, len(entries), VOUCHERS):
                batch = entries[first : first + VOUCHERS]
                outcomes = await self._present(operator, batch)
                await self._note(batch, outcomes)
                presented += len(batch)
                paid += sum(outcome.paid_units for outcome in outcomes)
                refused += sum(outcome.code in FINAL for outcome in outcomes)
        return Result(presented, paid, refused)

    def _unsettled(self) -> list[ChannelEntry]:
        reader = LedgerReader.open(self._ledger_file)
        try:
            return list(reader.presentable(self._terms.operator_keys, MOST_VOUCHERS))
        finally:
            reader.close()

    async def _present(
        self, operator: OperatorClient, batch: Sequence[ChannelEntry]
    ) -> list[Settled]:
        now = int(self._clock.unix_s())
        vouchers = [entry.voucher.envelope(Voucher) for entry in batch]
        length, head = await asyncio.to_thread(self._feed)
        settlement = Settlement(
            node=self._identity.peer_id,
            window_start_unix_s=min(entry.unix_s for entry in batch),
            window_end_unix_s=now,
            vouchers=len(batch),
            vouchers_root=root_of([leaf_hash(voucher.payload) for voucher in vouchers]).hex(),
            feed_length=length,
            feed_head=head.hex(),
        )
        return await operator.settle(sign(settlement, self._identity.private_key), vouchers)

    def _feed(self) -> tuple[int, bytes]:
        reader = LedgerReader.open(self._ledger_file)
        try:
            return reader.feed_head()
        finally:
            reader.close()

    async def _note(self, batch: Sequence[ChannelEntry], outcomes: Sequence[Settled]) -> None:
        settled, refused = [], []
        for entry, outcome in zip(batch, outcomes, strict=True):
            if outcome.code is None:
                settled.append((entry.serial, entry.session, entry.units))
            elif outcome.code in FINAL:
                refused.append((entry.serial, entry.session, int(outcome.code)))
            if outcome.code is not None:
                log.warning(
                    "the operator says %s to a voucher of session %s",
                    outcome.code.name,
                    entry.session,
                )
        if settled:
            await self._store.settled(settled, int(self._clock.unix_s()))
        if refused:
            await self._store.refused(refused)

    def _certificate(self) -> tuple[Envelope | None, str]:
        path = self._terms.certificate
        if path is None:
            return None, ""
        try:
            certificate = parse_envelope(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the certificate {path}: {error.strerror}") from error
        return certificate, parse(NodeCertificate, certificate).organisation

    def _enrolment(self, organisation: str) -> Envelope:
        now = int(self._clock.unix_s())
        enrolment = Enrolment(
            node=self._identity.peer_id,
            payout=self._terms.payout or self._identity.peer_id,
            organisation=organisation,
            sequence=now,
            unix_s=now,
        )
        return sign(enrolment, self._identity.private_key)
