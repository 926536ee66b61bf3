"""The canary: what a user would get from a model now, found out by asking.

The session itself is a client's work; ``client.status_page`` brings a :class:`Prober`.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Protocol

from swarm.status.snapshot import Probe


class Problem(StrEnum):
    """Why a probe failed, in words that name nobody."""

    NO_ROUTE = "no_route"
    """Blocks that nobody serves, or no room on the nodes."""
    INTERRUPTED = "interrupted"
    NETWORK = "network"
    TIMEOUT = "timeout"


class Prober(Protocol):
    """Opens sessions from end to end."""

    @property
    def revisions(self) -> Collection[str]:
        """Models, by revision in hexadecimal digits, whose ends are on this computer."""

    async def probe(self, revision: str) -> Probe:
        """One canary session; failures of the swarm are a result, never raised."""
