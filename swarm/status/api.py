"""The same as the pages, for programs: JSON whose schema is ``openapi.json``; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from swarm.status.history import History
from swarm.status.leaderboard import LeaderRow, leaderboard
from swarm.status.snapshot import Incident, ModelStatus, NodeStatus, Probe, Snapshot, Work

MOST_NODES = 500
"""In one answer."""


def status_json(snapshot: Snapshot, swarm_name: str, now_unix_s: float) -> dict[str, Any]:
    totals = snapshot.totals
    return {
        "swarm": swarm_name,
        **_times(snapshot, now_unix_s),
        "volunteers": {
            "registered": totals.volunteers_registered,
            "online": totals.volunteers_online,
        },
        "organisations": totals.organisations,
        "countries": totals.countries,
        "adapters": totals.adapters,
        "work_announced": {
            "today": work_json(totals.today),
            "month": work_json(totals.month),
            "ever": work_json(totals.ever),
        },
        "models": [model_json(model) for model in snapshot.models],
        "incidents_open": [
            incident_json(item) for item in snapshot.incidents if item.closed_unix_s is None
        ],
    }


def model_json(model: ModelStatus) -> dict[str, Any]:
    return {
        "name": model.name,
        "revision": model.revision,
        "number_of_blocks": model.number_of_blocks,
        "replicas_per_block": list(model.replicas),
        "nodes_serving": model.nodes_serving,
        "verdict": model.verdict,
        "copies": round(model.copies, 3),
        "complete": model.is_whole,
        "weakest": [asdict(span) for span in model.weak_spans],
        "adapters": list(model.adapters),
        "announced": {
            "tokens_per_s": round(model.announced_tokens_per_s, 2),
            "tokens_per_s_all_sessions": round(model.announced_batch_tokens_per_s, 2),
        },
        "probed": None if model.probe is None else probe_json(model.probe),
        "work_announced_today": work_json(model.work_today),
    }


def models_json(snapshot: Snapshot, now_unix_s: float) -> dict[str, Any]:
    return {
        **_times(snapshot, now_unix_s),
        "models": [model_json(model) for model in snapshot.models],
    }


def probe_json(probe: Probe) -> dict[str, Any]:
    return {
        "at_unix_s": round(probe.at_unix_s, 3),
        "succeeded": probe.succeeded,
        "time_to_first_token_s": round(probe.time_to_first_token_s, 4),
        "tokens_per_s": round(probe.tokens_per_s, 3),
        "tokens": probe.tokens,
        "problem": probe.problem,
        "chain": [asdict(hop) for hop in probe.hops],
    }


def node_json(node: NodeStatus) -> dict[str, Any]:
    return {
        "peer_id": node.peer_id,
        "name": node.name,
        "organisation": node.organisation,
        "country": node.country,
        "model": node.model_name,
        "revision": node.revision,
        "first_block": node.first_block,
        "end_block": node.end_block,
        "precision": node.precision,
        "announced_tokens_per_s": round(node.tokens_per_s, 2),
        "state": node.standing.value,
        "adapters": list(node.adapters),
        "software": node.software,
        "registered_unix_s": round(node.registered_unix_s, 3),
        "seen_unix_s": round(node.seen_unix_s, 3),
        "uptime_24h": _share(node.uptime_24h),
        "uptime_30d": _share(node.uptime_30d),
        "energy_source": node.energy_source,
        "work_announced": work_json(node.work),
    }


def nodes_json(
    snapshot: Snapshot, now_unix_s: float, *, model: str, offset: int, limit: int
) -> dict[str, Any]:
    nodes: Sequence[NodeStatus] = snapshot.nodes
    if model:
        nodes = [node for node in nodes if node.revision == model]
    return {
        **_times(snapshot, now_unix_s),
        "total": len(nodes),
        "offset": offset,
        "nodes": [node_json(node) for node in nodes[offset : offset + limit]],
    }


def donor_json(nodes: Sequence[NodeStatus], days: Mapping[int, Work]) -> dict[str, Any]:
    return {
        "peer_id": nodes[0].peer_id,
        "nodes": [node_json(node) for node in nodes],
        "work_announced": work_json(sum((node.work for node in nodes), Work())),
        "days": [
            {"day": day, "work_announced": work_json(work)} for day, work in sorted(days.items())
        ],
    }


def donors_json(snapshot: Snapshot, settled: Mapping[str, float] | None) -> dict[str, Any]:
    board = leaderboard(snapshot.nodes, settled)
    return {
        "source": "settled" if board.settled else "announced",
        "nodes": [_leader(row) for row in board.nodes],
        "organisations": [_leader(row) for row in board.organisations],
    }


def incident_json(incident: Incident) -> dict[str, Any]:
    return asdict(incident)


def incidents_json(snapshot: Snapshot) -> dict[str, Any]:
    return {"incidents": [incident_json(incident) for incident in snapshot.incidents]}


def history_json(history: History) -> dict[str, Any]:
    return {
        "range": history.range.name,
        "bin_s": history.range.bin_s,
        "end_unix_s": round(history.end_unix_s, 3),
        "curves": {
            name: [[round(at, 3), round(value, 4)] for at, value in points]
            for name, points in history.curves.items()
        },
    }


def work_json(work: Work) -> dict[str, Any]:
    per_token = work.joules_per_token
    return {
        "generated_tokens": round(work.generated_tokens, 3),
        "prompt_tokens": round(work.prompt_tokens, 3),
        "energy_j": round(work.energy_j, 3),
        "co2_g": round(work.co2_g, 6),
        "joules_per_token": None if per_token is None else round(per_token, 4),
    }


def error_json(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def _leader(row: LeaderRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "organisation": row.organisation,
        "peer_id": row.peer_id,
        "nodes": row.nodes,
        "work_announced": work_json(row.work),
        "settled": row.settled,
        "share": round(row.share, 6),
    }


def _times(snapshot: Snapshot, now_unix_s: float) -> dict[str, Any]:
    return {
        "taken_unix_s": round(snapshot.taken_unix_s, 3),
        "heard_unix_s": round(snapshot.heard_unix_s, 3),
        "period_s": snapshot.period_s,
        "stale": snapshot.is_stale(now_unix_s),
    }


def _share(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
