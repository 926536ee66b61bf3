"""Which versions of the protocol this build speaks, and how two peers agree on one.

A version changes when the meaning of bytes changes. New optional fields and new messages need
none: unknown fields are ignored, unknown messages answered with an error. The version of the
software is only information for people; nothing may be decided by it.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata

from swarm.protocol.errors import ErrorCode, ProtocolError

MINIMUM_VERSION = 1
MAXIMUM_VERSION = 1

STREAM_PROTOCOL = "sovereign-swarm/session"
"""Name under which the transport opens and accepts streams; it never changes with the version."""
WEIGHTS_PROTOCOL = "sovereign-swarm/weights"
"""Name of streams on which manifests and chunks are asked for."""
INTRODUCTION_PROTOCOL = "sovereign-swarm/introduction"
"""Name of streams on which nothing but Hello is said, before one asks the other's directory."""
ENROLMENT_PROTOCOL = "sovereign-swarm/enrolment"
"""Name of streams on which an invitation is exchanged for a passport."""

DISTRIBUTION = "sovereign-swarm"


def negotiate(own_minimum: int, own_maximum: int, their_minimum: int, their_maximum: int) -> int:
    """The highest version in common. Raises ProtocolError(UNSUPPORTED_VERSION) if there is none."""
    version = min(own_maximum, their_maximum)
    if their_minimum > their_maximum or version < max(own_minimum, their_minimum):
        raise ProtocolError(
            ErrorCode.UNSUPPORTED_VERSION,
            f"ours {own_minimum} to {own_maximum}, theirs {their_minimum} to {their_maximum}",
        )
    return version


@cache
def software_version() -> str:
    """Version of the installed distribution, or ``unknown`` when it is not installed.

    Read once: every Hello tells it, and looking it up takes milliseconds.
    """
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
