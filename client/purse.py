"""What a session's vouchers draw on: an allowance, and a fresh one before it is used up.

What may be vouched for is bounded by the allowance, and at each node by a part of it; it also ends
at some time. A client that went on regardless would let nodes work for nothing, and be suspended by
the operator. So a fresh one is asked for ahead of use, while steps go on; when the next step would
not fit any more, it takes the place of the old one. What happens when there are none left is
decided by whoever grants them (``client.grants``).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from statistics import median_low

from swarm.client.vouchers import Grant, HopAccount
from swarm.ledger.rules import is_eligible
from swarm.ports import Clock
from swarm.protocol.errors import AllowanceRefused, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.ledger_objects import LOCAL, Work
from swarm.protocol.prices import price_table

log = logging.getLogger(__name__)

ASK_AHEAD = 0.75
"""So much of an allowance may be used before a fresh one is asked for."""
EXPIRY_MARGIN_S = 120.0
NO_WORK = Work()

AskGrant = Callable[[], Awaitable[Grant | None]]


class Purse:
    """The allowances of one session, one after the other."""

    def __init__(
        self,
        grant: Grant | None,
        ask: AskGrant | None,
        clock: Clock,
        on_change: Callable[[Grant], None] | None = None,
    ) -> None:
        """``ask`` gets a fresh grant; without it the session has the one alone.

        ``on_change`` hears of each one that is drawn on from now on.
        """
        self.grant = grant
        self._on_change = on_change
        self.accounts: list[HopAccount] = []
        """Of all hops that the session ever had, one for each allowance that they took."""
        self._ask = ask
        self._clock = clock
        self._fresh: Grant | None = None
        self._refusal: AllowanceRefused | None = None
        self._is_asking = False
        self._is_refused = False

    def refused(self) -> None:
        """A hop says that the allowance does not pay for more."""
        self._is_refused = True

    def is_over(
        self, active: Iterable[HopAccount], ahead: Work, replayed: Work = NO_WORK, blocks: int = 0
    ) -> bool:
        """Whether another allowance is needed for work ``ahead`` on each of the ``active`` accounts
        and for what is ``replayed`` on other hops with so many ``blocks`` together."""
        if self._ask is None:
            return False
        return self._is_refused or self._is_used(active, ahead, 1.0, replayed, blocks)

    def wants_to_ask(self, active: Iterable[HopAccount], ahead: Work) -> bool:
        """Whether it is time to :meth:`ask_ahead`."""
        if self._ask is None or self._is_asking or self._fresh is not None:
            return False
        return self._refusal is None and self._is_used(active, ahead, ASK_AHEAD)

    async def ask_ahead(self) -> None:
        """Have a fresh allowance ready; what stands against it is raised when it is needed."""
        if self._ask is None or self._is_asking:
            return
        self._is_asking = True
        try:
            self._fresh = await self._ask()
        except AllowanceRefused as refusal:
            self._refusal = refusal
        finally:
            self._is_asking = False

    async def change(self) -> Grant | None:
        """Draw on a fresh allowance from now on. Raises AllowanceRefused."""
        if self._ask is None:
            return self.grant
        fresh, self._fresh = self._fresh, None
        if fresh is None or not self._has_time(fresh):
            self._refusal = None
            fresh = await self._ask()
        self.grant, self._is_refused = fresh, False
        if fresh is not None and self._on_change is not None:
            self._on_change(fresh)
        log.info("the session goes on with a fresh allowance")
        return fresh

    def suits(self, account: HopAccount) -> bool:
        """Whether a hop may take the present allowance in place of its account's.

        Not of another class than it was admitted for, nor one that cannot pay it.
        """
        if self.grant is None:
            return False
        allowance = self.grant.allowance
        if allowance.allowance_class != account.grant.allowance.allowance_class:
            return False
        seed = bytes.fromhex(allowance.route_seed)
        return not seed or is_eligible(seed, account.peer)

    def _is_used(
        self,
        active: Iterable[HopAccount],
        ahead: Work,
        share: float,
        replayed: Work = NO_WORK,
        blocks: int = 0,
    ) -> bool:
        grant = self.grant
        if grant is None or grant.allowance.allowance_class == LOCAL:
            return False
        if not self._has_time(grant):
            return True
        drawing = [account for account in self.accounts if account.grant is grant]
        if not drawing:
            return False
        prices = price_table(grant.allowance.price_epoch)
        # What a token costs is the same for all; one hop's word alone does not empty a purse.
        mflop = median_low(account.mflop_per_block_token for account in drawing)
        units: Counter[PeerId] = Counter()
        try:
            for account in drawing:
                units[account.peer] += prices.units(
                    account.issued, blocks=account.blocks, mflop_per_block_token=mflop
                )
            for account in active:
                units[account.peer] += prices.units(
                    ahead, blocks=account.blocks, mflop_per_block_token=mflop
                )
            again = prices.units(replayed, blocks=blocks, mflop_per_block_token=mflop)
        except ProtocolError:
            return True  # more than can be counted
        allowance = grant.allowance
        return (
            max(units.values()) > share * allowance.per_node_units
            or units.total() + again > share * allowance.maximum_units
        )

    def _has_time(self, grant: Grant) -> bool:
        return self._clock.unix_s() < grant.allowance.expires_unix_s - EXPIRY_MARGIN_S
