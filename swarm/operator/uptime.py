"""What nodes get for being there: a fixed sum of a day, shared by blocks and hours that were seen.

An hour counts when a validator's challenge was answered rightly in it. What one organisation says
is not enough: a node has as many block-hours as two of them agree on. The sum is fixed, so that
more identities share it and do not make it grow; it waits in escrow like what was earned by work.
"""

from __future__ import annotations

from swarm.ledger.events import Event, budget, escrow
from swarm.ledger.rules import split_back
from swarm.operator.journal import Journal
from swarm.operator.policy import Policy
from swarm.protocol.ledger_objects import Verdict

HOUR_S = 3600
HOURS = 24
NODES_PER_EVENT = 256


def note_probe(journal: Journal, verdict: Verdict, organisation: str, now: int) -> None:
    """A challenge that a node answered rightly, inside of a transaction.

    An hour counts once for an organisation, with the most blocks that one challenge went through.
    """
    row = journal.db.execute(
        "SELECT blocks FROM model WHERE model = ?", (verdict.model,)
    ).fetchone()
    if row is None:
        return
    blocks = min(verdict.end_block, row[0]) - verdict.first_block
    if blocks > 0:
        journal.db.execute(
            "INSERT INTO probe VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
            " SET blocks = MAX(blocks, excluded.blocks)",
            (verdict.node, organisation, now // HOUR_S, blocks),
        )


def share_uptime(journal: Journal, policy: Policy, now: int) -> int:
    """Share the sum of the day that is over, once; returns the units."""
    day = now // (HOURS * HOUR_S) - 1
    if int(journal.meta("uptime_day") or b"-1") >= day:
        return 0
    source = budget(policy.uptime_budget)
    with journal.transaction() as db:
        shares = _block_hours(journal, day)
        pot = min(policy.uptime_daily_units, journal.balance(source))
        parts = split_back(pot, shares) if shares and pot else {}
        nodes = sorted(parts)
        for start in range(0, len(nodes), NODES_PER_EVENT):
            some = nodes[start : start + NODES_PER_EVENT]
            total = sum(parts[node] for node in some)
            postings = ((source, -total), *((escrow(node), parts[node]) for node in some))
            detail = {"day": day, "block_hours": [f"{node} {shares[node]}" for node in some]}
            index = journal.post(Event("uptime", f"uptime:{day}:{start}", now, postings, detail))
            db.executemany(
                "INSERT INTO lot VALUES (?, ?, ?, ?, ?)",
                [(node, now, index, source, parts[node]) for node in some],
            )
        db.execute("DELETE FROM probe WHERE hour < ?", ((day + 1) * HOURS,))
        journal.set_meta("uptime_day", str(day).encode())
    return sum(parts.values())


def _block_hours(journal: Journal, day: int) -> dict[str, int]:
    """Of each active node: the second most that an organisation has seen of it."""
    seen: dict[str, list[int]] = {}
    for node, block_hours in journal.db.execute(
        "SELECT node, SUM(blocks) FROM probe JOIN node USING (node)"
        " WHERE hour >= ? AND hour < ? AND state = 'active' GROUP BY node, probe.organisation",
        (day * HOURS, (day + 1) * HOURS),
    ):
        seen.setdefault(node, []).append(block_hours)
    return {node: sorted(each)[-2] for node, each in seen.items() if len(each) > 1}
