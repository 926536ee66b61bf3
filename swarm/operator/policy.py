"""What an operator decides about money: budgets, sizes of allowances, waiting times."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.protocol.ledger_objects import ANONYMOUS, MEMBER
from swarm.protocol.prices import UNITS_PER_CREDIT

SUBSIDISED = (MEMBER, ANONYMOUS)
"""Classes that are paid from budgets, and so cannot choose their nodes."""


@dataclass(frozen=True, slots=True)
class Policy:
    """All amounts are in units, times in seconds."""

    origin: str
    """Name of the log: host and path, without a scheme."""
    mint_keys: frozenset[bytes]
    """Public keys that may make money; two of them have to agree."""
    operator_key: bytes
    """Signs allowances and entries of models, members and organisations."""
    public_budget: str = "public"
    """Pays for anonymous users."""
    audit_budget: str = "audit"
    uptime_budget: str = "uptime"
    uptime_daily_units: int = 0
    """What nodes share for being there, each day; as far as the budget reaches."""
    anonymous_units: int = 10 * UNITS_PER_CREDIT
    """The largest allowance of an anonymous user."""
    anonymous_daily_units: int = 100 * UNITS_PER_CREDIT
    """What an IPv4 /24 or IPv6 /48 may get in a day; a /16 or /32 gets sixteen times that."""
    nodes_per_allowance: int = 16
    """One node gets at most this part of an allowance: the bound on what colluders can choose."""
    eligible_nodes: int = 8
    """How many nodes of a block a draw should leave for a subsidised allowance."""
    pair_floor_units: int = UNITS_PER_CREDIT
    """What each payer may always pay each node of public money, within 30 days."""
    grace_s: int = 48 * 3600
    """How long after its end an allowance still settles."""
    validators_to_decide: int = 2
    """So many validating organisations must agree that a node cheated before it loses its escrow,
    and that it did not before its quarantine ends."""
    minimum_node_age_s: int = 24 * 3600
    """A node is paid for subsidised work only if it was enrolled so long before the allowance."""
