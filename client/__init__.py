"""What a user runs: the SDK, the async API and the ``swarm`` command.

Nothing heavy is imported before it is used: ``from swarm.client import SwarmModelForCausalLM``
loads torch only because that class needs it, ``import swarm.client`` does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarm.client.app import SwarmClient
    from swarm.client.cache import SwarmCache
    from swarm.client.config import ClientSettings, SamplingSettings
    from swarm.client.generate import (
        GenerationResult,
        LocalModel,
        TextPiece,
        TextSession,
        stream_generate,
    )
    from swarm.client.model import SwarmModelForCausalLM

__all__ = [
    "ClientSettings",
    "GenerationResult",
    "LocalModel",
    "SamplingSettings",
    "SwarmCache",
    "SwarmClient",
    "SwarmModelForCausalLM",
    "TextPiece",
    "TextSession",
    "stream_generate",
]

_HOMES = {
    "ClientSettings": "config",
    "GenerationResult": "generate",
    "LocalModel": "generate",
    "SamplingSettings": "config",
    "SwarmCache": "cache",
    "SwarmClient": "app",
    "SwarmModelForCausalLM": "model",
    "TextPiece": "generate",
    "TextSession": "generate",
    "stream_generate": "generate",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home when it is first asked for (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
