"""Posts verdicts to the operator: each until it was taken once, oldest first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from swarm.client.validator.state import REFUSED, KeptVerdict, ValidatorState
from swarm.ledger.operator_client import OperatorClient
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError, RemoteError

log = logging.getLogger(__name__)

RETRY_S = (60.0, 300.0, 900.0)
"""How long to wait after failures in a row; the last one from then on."""
FINAL = frozenset(
    {ErrorCode.FOREIGN_OBJECT, ErrorCode.BAD_FIELD, ErrorCode.BAD_SIGNATURE, ErrorCode.TOO_LARGE}
)
"""Refusals that the same words would meet again."""


@dataclass(frozen=True, slots=True)
class Posted:
    """A verdict and the operator's answer: the node's state, or why it was refused."""

    verdict: KeptVerdict
    answer: str


class Delivery:
    """The verdicts of one validator on their way."""

    def __init__(
        self,
        state: ValidatorState,
        operator: OperatorClient,
        clock: Clock,
        posted: Callable[[Posted], None],
    ) -> None:
        """``posted`` hears of each verdict that was taken or refused for good."""
        self._state = state
        self._operator = operator
        self._clock = clock
        self._posted = posted
        self._news = asyncio.Event()

    def there_is_news(self) -> None:
        """A verdict was kept."""
        self._news.set()

    async def deliver(self) -> None:
        """Post what waits. Raises NetworkError, or RemoteError to try again; repeats do no harm."""
        for verdict in self._state.waiting:
            try:
                answer = await self._operator.verdict(verdict.sealed)
            except RemoteError as error:
                if error.code not in FINAL:
                    raise
                log.warning("the operator refuses a verdict about %s: %s", verdict.node, error)
                answer = REFUSED + error.code.name
            await self._state.answered(verdict.segment, answer)
            self._posted(Posted(verdict, answer))

    async def run(self) -> None:
        """Deliver whenever there is news, and again after failures; until cancelled."""
        failures = 0
        while True:
            self._news.clear()
            try:
                await self.deliver()
                failures = 0
            except (NetworkError, RemoteError, ProtocolError) as error:
                log.warning("%d verdicts wait: %s", len(self._state.waiting), error)
                await self._clock.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1
                continue
            await self._news.wait()
