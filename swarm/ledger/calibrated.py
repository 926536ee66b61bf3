"""Calibrated limits of audits as they lie beside a checkpoint: read by every client.

The file is a part of the model's manifest, which the publisher signs.
"""

from __future__ import annotations

import json
from pathlib import Path

from swarm.ledger.audit_rule import UNCALIBRATED, Limits, SpanLimits

FILE_NAME = "audit_limits.json"
"""Beside the checkpoint's ``config.json``, so that it travels with the model."""
MAX_FILE_BYTES = 1 << 16


def to_json(limits: SpanLimits) -> str:
    """Millionths, as in verdicts: integers only."""
    content = {
        dtype_class: {
            str(blocks): [round(each.median * 10**6), round(each.p95 * 10**6)]
            for blocks, each in sorted(by_blocks.items())
        }
        for dtype_class, by_blocks in sorted(limits.by_blocks.items())
    }
    return json.dumps({"version": 1, "limits_millionths": content}, indent=1) + "\n"


def read_limits(checkpoint: Path) -> SpanLimits:
    """Those of a checkpoint folder; the general ones where there are none, or none to be read."""
    path = checkpoint / FILE_NAME
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return UNCALIBRATED
        content = json.loads(path.read_text(encoding="ascii"))
        return SpanLimits(
            {
                str(dtype_class): {
                    int(blocks): Limits(int(median) / 10**6, int(p95) / 10**6)
                    for blocks, (median, p95) in by_blocks.items()
                }
                for dtype_class, by_blocks in content["limits_millionths"].items()
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return UNCALIBRATED
