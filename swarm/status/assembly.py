"""Makes the parts of a snapshot: a node, a model, the totals; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from swarm.block_vectors import block_vectors, placed_nodes
from swarm.membership import ModelSummary, coverage
from swarm.model_health import model_health
from swarm.protocol.records import NodeRecord
from swarm.status.block_map import weak_spans
from swarm.status.plain_text import plain_text
from swarm.status.presence import Interval, uptime
from swarm.status.rows import DAY_S, Declared, NodeRow
from swarm.status.snapshot import ModelStatus, NodeStatus, Probe, Standing, Totals, Work

MONTH_DAYS = 30
MOST_SPEED = 1e6
"""Tokens/s that a page shows as announced; more is a lie that would spoil the layout."""


def declared(record: NodeRecord) -> Declared:
    """What a record says that may be shown, made plain."""
    span = record.end_block - record.first_block
    dtype = record.dtype.name.lower()
    energy_source = ""
    if record.energy_j:
        energy_source = "measured" if record.energy_measured else "declared"
    return Declared(
        name=plain_text(record.display_name),
        organisation=plain_text(record.organisation),
        country=record.country,
        model_name=plain_text(record.model_name, 128),
        number_of_blocks=record.number_of_blocks,
        first_block=record.first_block,
        end_block=record.end_block,
        precision=plain_text(record.quantisation, 24) or dtype,
        tokens_per_s=min(MOST_SPEED, record.decode_tokens_per_s / span),
        standing=record.state.name.lower(),
        adapters=tuple(plain_text(name) for name in record.adapters),
        software=plain_text(record.software, 32),
        energy_source=energy_source,
    )


def node_status(
    row: NodeRow,
    present: Sequence[Interval],
    watched: Sequence[Interval],
    *,
    here: bool,
    now_unix_s: float,
) -> NodeStatus:
    """A node as it is shown; ``here``: the last look has seen it."""
    known = row.declared

    def up(days: int) -> float | None:
        return uptime(
            present,
            watched,
            window_s=days * DAY_S,
            registered_unix_s=row.registered_unix_s,
            now_unix_s=now_unix_s,
        )

    return NodeStatus(
        peer_id=row.peer_id,
        name=known.name,
        organisation=known.organisation,
        country=known.country,
        model_name=known.model_name,
        revision=row.revision,
        number_of_blocks=known.number_of_blocks,
        first_block=known.first_block,
        end_block=known.end_block,
        precision=known.precision,
        tokens_per_s=known.tokens_per_s,
        standing=Standing(known.standing) if here else Standing.LOST,
        adapters=known.adapters,
        software=known.software,
        registered_unix_s=row.registered_unix_s,
        seen_unix_s=row.seen_unix_s,
        uptime_24h=up(1),
        uptime_30d=up(MONTH_DAYS),
        energy_source=known.energy_source,
        work=row.work,
    )


def model_status(
    summary: ModelSummary,
    records: Sequence[NodeRecord],
    *,
    work_today: Work,
    probe: Probe | None,
    peers: str,
    now_unix_s: float,
) -> ModelStatus:
    """A model as its nodes announce it. ``peers`` stands in the join lines."""
    blocks = summary.number_of_blocks
    name = plain_text(summary.model_name, 128)
    fitting = [record for record in records if record.number_of_blocks == blocks]
    serving = [record for record in fitting if record.takes_sessions]
    replicas = coverage(fitting, blocks)
    vectors = block_vectors(placed_nodes(fitting, now_unix_s=now_unix_s), blocks)
    health = model_health(name, vectors)
    fastest = [0] * blocks
    together = [0.0] * blocks
    for record in serving:
        span = record.end_block - record.first_block
        for block in range(record.first_block, record.end_block):
            fastest[block] = max(fastest[block], record.decode_tokens_per_s)
            together[block] += record.batched_tokens_per_s / span
    one_session = 1 / sum(1 / speed for speed in fastest) if all(fastest) else 0.0
    return ModelStatus(
        name=name,
        revision=summary.model_revision.hex(),
        number_of_blocks=blocks,
        replicas=tuple(replicas),
        nodes_serving=len(serving),
        verdict=health.verdict.name.lower(),
        copies=health.copies,
        weak_spans=weak_spans(summary.model_name, replicas, peers=peers),
        announced_tokens_per_s=min(MOST_SPEED, one_session),
        announced_batch_tokens_per_s=min(MOST_SPEED, min(together, default=0.0)),
        adapters=tuple(
            sorted({plain_text(adapter) for record in serving for adapter in record.adapters})
        ),
        work_today=work_today,
        probe=probe,
    )


def totals_of(
    here: Iterable[NodeStatus],
    models: Sequence[ModelStatus],
    days: Mapping[tuple[int, str], Work],
    *,
    registered: int,
    now_unix_s: float,
) -> Totals:
    """``days``: what was done by day and model; ``registered``: peers seen so far."""
    online = [node for node in here if node.standing.serves]
    today, month, ever = Work(), Work(), Work()
    this_day = int(now_unix_s) // DAY_S
    begin_of_month = datetime.fromtimestamp(now_unix_s, UTC).replace(day=1)
    first_day = int(begin_of_month.timestamp()) // DAY_S
    for (day, _), work in days.items():
        ever += work
        if day >= first_day:
            month += work
        if day == this_day:
            today += work
    return Totals(
        volunteers_registered=registered,
        volunteers_online=len({node.peer_id for node in online}),
        organisations=len({node.organisation for node in online if node.organisation}),
        countries=len({node.country for node in online if node.country}),
        models=len(models),
        models_whole=sum(model.is_whole for model in models),
        adapters=len({name for model in models for name in model.adapters}),
        nodes_with_energy=sum(bool(node.energy_source) for node in online),
        today=today,
        month=month,
        ever=ever,
    )
