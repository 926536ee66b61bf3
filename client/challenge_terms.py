"""How a validator's session differs from a user's: on the validator's side alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from swarm.client.adapter_push import AdapterSource
from swarm.ledger.reputation import Reputations
from swarm.protocol.tensors import WireTensor

Reference = Callable[[int, int, WireTensor, AdapterSource | None], Awaitable[WireTensor | None]]
"""Blocks ``[first, end)`` with an adapter or none, computed by somebody who is trusted; None for
blocks they do not have."""


@dataclass(frozen=True, slots=True)
class ChallengeTerms:
    """Nodes see the same session as of anybody; audits of it are asked for by whoever opened it."""

    steering: Reputations
    """By which routes are chosen, in place of what audits found: suspects shall be met again."""
    reference: Reference | None = None
    """Own weights."""
