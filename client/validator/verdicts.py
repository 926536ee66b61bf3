"""A finding as others can be told it: pure."""

from __future__ import annotations

import math

from swarm.client.audit_evidence import Evidence
from swarm.ledger.audit_rule import Comparison
from swarm.protocol.ledger_objects import Verdict
from swarm.protocol.strict_json import MAX_INTEGER


def verdict_of(
    evidence: Evidence, comparison: Comparison | None, outcome: str, now_unix_s: float
) -> Verdict:
    """About one segment. ``comparison`` is None where the node contradicted its own receipt: then
    the errors are the largest that can be written."""
    receipt, limits = evidence.receipt, evidence.limits
    return Verdict(
        segment=evidence.segment,
        node=receipt.node,
        session=receipt.session,
        model=receipt.model,
        first_block=receipt.first_block,
        end_block=receipt.end_block,
        first_position=0,
        end_position=evidence.end_position,
        median_millionths=millionths(comparison.median if comparison else math.inf),
        p95_millionths=millionths(comparison.p95 if comparison else math.inf),
        median_limit_millionths=millionths(limits.median if limits else 0.0),
        p95_limit_millionths=millionths(limits.p95 if limits else 0.0),
        input_hash=evidence.input_hash.hex(),
        output_hash=evidence.output_hash.hex(),
        reference_hash=evidence.reference_hash.hex(),
        dtype_class=receipt.dtype_class,
        outcome=outcome,
        unix_s=int(now_unix_s),
    )


def millionths(value: float) -> int:
    """Bounded; what is not finite is the largest."""
    return min(MAX_INTEGER, round(value * 1e6)) if math.isfinite(value) else MAX_INTEGER
