"""What hops answer, before anybody computes with it."""

from __future__ import annotations

import numpy as np

from swarm.ledger.audit_rule import to_array
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import WireTensor


def require_finite(result: WireTensor) -> None:
    """Raise ProtocolError(NOT_FINITE) for infinities and NaN.

    A hop that cannot compute something says so; that it sends this is its own doing.
    """
    if not np.isfinite(to_array(result)).all():
        raise ProtocolError(ErrorCode.NOT_FINITE, "a result")
