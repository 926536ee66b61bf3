"""What a node says of itself in the directory, at its start and with its load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from swarm.gate import Gate
from swarm.node.addresses import for_record, is_public
from swarm.node.config import BlockSpan, NodeSettings
from swarm.protocol.identity import Identity
from swarm.protocol.records import MAX_ADAPTERS, NodeRecord, NodeState
from swarm.protocol.version import MAXIMUM_VERSION, MINIMUM_VERSION, software_version
from swarm.routing import adapter_hint

if TYPE_CHECKING:
    from swarm.node.engine.engine import SpanEngine
    from swarm.node.engine.hosting import OpenedModel


def first_record(
    settings: NodeSettings,
    identity: Identity,
    model: OpenedModel,
    span: BlockSpan,
    addresses: Sequence[str],
    gate: Gate | None,
) -> NodeRecord:
    """JOINING with a span; sequence and expiry are filled in by the announcer.

    A passport's organisation and country go before those of the settings.
    """
    checkpoint = model.checkpoint
    passport = None if gate is None else gate.own_passport()
    return NodeRecord(
        peer_id=identity.peer_id,
        model_name=checkpoint.name,
        model_revision=checkpoint.revision,
        number_of_blocks=checkpoint.number_of_blocks,
        shards=1,
        first_block=span.first_block,
        end_block=span.end_block,
        state=NodeState.JOINING,
        dtype=model.wire_dtype,
        minimum_version=MINIMUM_VERSION,
        maximum_version=MAXIMUM_VERSION,
        sequence=0,
        expires_unix_s=0,
        addresses=for_record(addresses),
        reachable_directly=any(map(is_public, addresses)),
        software=software_version(),
        display_name=settings.display_name,
        organisation=(passport and passport.organisation) or settings.organisation,
        country=(passport and passport.country) or settings.country,
        passport_hash=b"" if gate is None else gate.passport_hash,
    )


def with_load(record: NodeRecord, engine: SpanEngine) -> NodeRecord:
    """The record with the engine's speed and load."""
    load = engine.load
    return replace(
        record,
        decode_tokens_per_s=int(engine.decode_tokens_per_s),
        batched_tokens_per_s=int(engine.batched_tokens_per_s),
        prefill_tokens_per_s=int(engine.prefill_tokens_per_s),
        cache_tokens_total=load.cache_tokens_total,
        cache_tokens_free=load.cache_tokens_free if record.takes_sessions else 0,
        queued_steps=load.queued_steps,
        busy_permille=min(1000, round(load.busy_fraction * 1000)),
        adapters=tuple(map(adapter_hint, engine.adapters.adapter_ids[-MAX_ADAPTERS:])),
    )
