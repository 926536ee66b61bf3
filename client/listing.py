"""What ``swarm models`` shows: each model of a swarm, and how well its blocks are covered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from swarm.membership import ModelSummary, coverage
from swarm.protocol.records import NodeRecord, NodeState

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model revision, the nodes that announce it and the replicas of each block."""

    summary: ModelSummary
    nodes: tuple[NodeRecord, ...]
    replicas_per_block: tuple[int, ...]

    @classmethod
    def of(cls, summary: ModelSummary, nodes: Iterable[NodeRecord]) -> ServedModel:
        ordered = tuple(sorted(nodes, key=lambda node: (node.first_block, node.end_block)))
        return cls(summary, ordered, tuple(coverage(ordered, summary.number_of_blocks)))

    @property
    def missing_blocks(self) -> tuple[int, ...]:
        return tuple(
            block for block, replicas in enumerate(self.replicas_per_block) if not replicas
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.summary.model_name,
            "revision": self.summary.model_revision.hex(),
            "number_of_blocks": self.summary.number_of_blocks,
            "hidden_size": self.summary.hidden_size,
            "complete": not self.missing_blocks,
            "missing_blocks": list(self.missing_blocks),
            "replicas_per_block": list(self.replicas_per_block),
            "nodes": [_node_to_json(node) for node in self.nodes],
        }


def _node_to_json(node: NodeRecord) -> dict[str, Any]:
    return {
        "name": node.display_name,
        "peer_id": node.peer_id,
        "first_block": node.first_block,
        "end_block": node.end_block,
        "state": NodeState(node.state).name.lower(),
        "dtype": node.dtype.name.lower(),
        "decode_tokens_per_s_per_block": node.decode_tokens_per_s,
        "cache_tokens_total": node.cache_tokens_total,
        "cache_tokens_free": node.cache_tokens_free,
        "queued_steps": node.queued_steps,
        "software": node.software,
    }


def describe_coverage(replicas_per_block: Sequence[int]) -> str:
    """Runs of equally covered blocks: ``0:10 x2  10:30 x1``; ``none`` where nobody serves."""
    runs: list[str] = []
    first = 0
    for replicas, group in groupby(replicas_per_block):
        end = first + len(list(group))
        runs.append(f"{first}:{end} " + (f"x{replicas}" if replicas else "none"))
        first = end
    return "  ".join(runs)


def models_table(models: Sequence[ServedModel]) -> RenderableType:
    """Tables for a terminal. Names come from strangers: shown as text, never as markup."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    overview = Table("model", "revision", "blocks", "replicas", "nodes", "usable")
    overview.columns[0].overflow = "fold"
    parts: list[RenderableType] = [overview]
    for model in models:
        missing = model.missing_blocks
        overview.add_row(
            Text(model.summary.model_name),
            model.summary.model_revision.hex()[:12],
            str(model.summary.number_of_blocks),
            describe_coverage(model.replicas_per_block),
            str(len(model.nodes)),
            Text(f"no, {len(missing)} blocks missing", "red") if missing else Text("yes", "green"),
        )
        nodes = Table("blocks", "node", "state", "dtype", "free cache", "queue", "tokens/s")
        nodes.title = Text(f"nodes of {model.summary.model_name}")
        for node in model.nodes:
            span = max(1, node.end_block - node.first_block)
            nodes.add_row(
                f"{node.first_block}:{node.end_block}",
                Text(node.display_name or node.peer_id),
                NodeState(node.state).name.lower(),
                node.dtype.name.lower(),
                f"{node.cache_tokens_free} of {node.cache_tokens_total}",
                str(node.queued_steps),
                f"{node.decode_tokens_per_s / span:.0f}" if node.decode_tokens_per_s else "?",
            )
        parts.append(nodes)
    return Group(*parts)
