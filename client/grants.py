"""Allowances of an operator for the client's sessions; self-issued ones when it gives none.

Asking is never allowed to hold up an answer: an operator that is away or slow means that the
session runs on a self-issued allowance, like in a swarm without an operator. So does a refusal,
unless the session is for somebody whose account has to pay for it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.client.config import ClientSettings
from swarm.client.vouchers import Grant
from swarm.ledger.channel import Signed
from swarm.ledger.operator_client import OperatorClient
from swarm.ports import Clock
from swarm.protocol.errors import (
    AllowanceRefused,
    ErrorCode,
    NetworkError,
    ProtocolError,
    RemoteError,
)
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import ANONYMOUS, AUDIT, FUNDED, MEMBER, SERIAL_BYTES, sign
from swarm.protocol.operator_objects import AllowanceRequest
from swarm.protocol.prices import UNITS_PER_CREDIT

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 3.0
PAUSE_S = 60.0
"""After a refusal or silence the operator is not asked for so long."""
REFUSED_PAUSE_S = 5.0
"""The same for an account that has to pay: it may be filled up at any time."""
LIFETIME_S = 3600
LEAST_S = 900
"""What must be left of a grant that was drawn ahead: more than a validator's challenge takes."""
REFUSALS = (ErrorCode.OVER_LIMIT, ErrorCode.FOREIGN_OBJECT)
"""By which an operator says no to an account, not to what was asked."""


@dataclass(frozen=True, slots=True)
class GrantTerms:
    """With which operator, and in whose name."""

    url: str
    operator_key: bytes
    """Pinned; allowances by another key are refused."""
    units: int
    """What one session may cost at most; what it does not use comes back."""
    account: Identity | None = None
    """None is an anonymous user."""
    budget: str = ""
    """A budget that the account may draw on; empty spends the account's own credit."""
    validates: bool = False
    """Whether the account is a validating organisation's, whose sessions are challenges: the
    operator's audit budget pays, and nodes are shown an allowance like that of any account."""
    must_pay: bool = False
    """Whether a session that the operator refuses to grant is refused as well."""


class OperatorGrants:
    """Asks one operator for one allowance per session."""

    def __init__(self, terms: GrantTerms, operator: OperatorClient, clock: Clock) -> None:
        self._terms = terms
        self._operator = operator
        self._clock = clock
        self._asks_again_s = -float("inf")
        self._refusal: AllowanceRefused | None = None
        self._ahead: Grant | None = None

    def of_account(self, account: Identity, budget: str) -> OperatorGrants:
        """Of the same operator, for sessions that another account has to pay for."""
        terms = replace(self._terms, account=account, budget=budget, validates=False, must_pay=True)
        return OperatorGrants(terms, self._operator, self._clock)

    async def draw_ahead(self) -> None:
        """Get the next session's grant now: the public log has the second at which an account
        reserved something, and whoever reads it shall not find a session that begins then."""
        if self._ahead is None:
            self._ahead = await self._ask()

    async def take(self) -> Grant | None:
        """A fresh grant with a key of its own, or None when the operator gives none now.

        Raises AllowanceRefused if the account has to pay and the operator says that it cannot.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.allowance.expires_unix_s > self._clock.unix_s() + LEAST_S:
            return ahead
        return await self._ask()

    async def _ask(self) -> Grant | None:
        if self._clock.monotonic_s() < self._asks_again_s:
            if self._refusal is not None:
                raise AllowanceRefused(is_used_up=self._refusal.is_used_up)
            return None
        self._refusal = None
        key = Ed25519PrivateKey.generate()
        account = self._terms.account
        request = sign(self._request(key), account.private_key if account else key)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                allowance, sealed = await self._operator.allowance(
                    request, self._terms.operator_key
                )
        except RemoteError as error:
            if not self._terms.must_pay or error.code not in REFUSALS:
                self._go_on_without(error)
                return None
            self._asks_again_s = self._clock.monotonic_s() + REFUSED_PAUSE_S
            self._refusal = AllowanceRefused(is_used_up=error.code is ErrorCode.OVER_LIMIT)
            raise self._refusal from error
        except (NetworkError, ProtocolError, TimeoutError) as error:
            self._go_on_without(error)
            return None
        if allowance.voucher_key != key.public_key().public_bytes_raw().hex():
            log.warning("the operator's allowance is for another key")
            return None
        return Grant(allowance, Signed.of(sealed), key)

    def _go_on_without(self, error: Exception) -> None:
        log.warning("no allowance, going on without: %s", error or "no answer in time")
        self._asks_again_s = self._clock.monotonic_s() + PAUSE_S

    def _request(self, key: Ed25519PrivateKey) -> AllowanceRequest:
        terms = self._terms
        known = AUDIT if terms.validates else MEMBER if terms.budget else FUNDED
        return AllowanceRequest(
            request=secrets.token_hex(SERIAL_BYTES),
            account=terms.account.peer_id if terms.account else "",
            voucher_key=key.public_key().public_bytes_raw().hex(),
            allowance_class=known if terms.account else ANONYMOUS,
            budget=terms.budget,
            maximum_units=terms.units,
            lifetime_s=LIFETIME_S,
            unix_s=int(self._clock.unix_s()),
        )


async def grants_by(
    settings: ClientSettings, stack: AsyncExitStack, clock: Clock
) -> OperatorGrants:
    """Allowances of the operator that the settings name and pin; the stack ends the connection."""
    terms = GrantTerms(
        settings.operator_url,
        bytes.fromhex(settings.operator_key),
        int(settings.allowance_credits * UNITS_PER_CREDIT),
        Identity.load(settings.account_path) if settings.account_path else None,
        settings.allowance_budget,
        settings.validates,
    )
    operator = await stack.enter_async_context(OperatorClient(settings.operator_url))
    return OperatorGrants(terms, operator, clock)
