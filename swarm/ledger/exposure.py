"""How much work a node does on trust: at most two windows that no voucher covers yet. Pure.

A window is 16 decode tokens or one piece of a prompt, whichever the client asks for; both are
measured in *exposure*, so that one number bounds them together.
"""

from __future__ import annotations

from swarm.protocol.ledger_objects import Work

DECODE_EXPOSURE = 32
WINDOW = 544
"""17 tokens of decoding, or a pass of 512 new positions for one row."""


def exposure(work: Work) -> int:
    return work.prefill_tokens + DECODE_EXPOSURE * work.decode_tokens + 2 * work.backward_tokens


def uncovered(done: Work, covered: Work) -> int:
    """Exposure of what is done beyond what is covered, each kind of work by itself."""
    return exposure(
        Work(
            max(0, done.prefill_tokens - covered.prefill_tokens),
            max(0, done.decode_tokens - covered.decode_tokens),
            max(0, done.backward_tokens - covered.backward_tokens),
        )
    )


def may_go_on(done: Work, covered: Work, step: Work) -> bool:
    """Whether a node does one more step on trust. A step alone is never too large."""
    before = uncovered(done, covered)
    return before == 0 or before + exposure(step) <= 2 * WINDOW


def voucher_is_due(issued: Work, covered: Work, step: Work) -> bool:
    """Whether a client signs what it has issued so far before it sends one more step."""
    before = uncovered(issued, covered)
    return before > 0 and before + exposure(step) > WINDOW
