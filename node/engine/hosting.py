"""What of a model this computer hosts: opens the checkpoint, counts memory, chooses the blocks.

Importing this loads torch and transformers, which takes seconds: ``app`` does it in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from swarm.block_vectors import PlacedNode, block_vectors, typical_speed
from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.devices import choose_device, choose_dtype, dtype_name
from swarm.node.config import BlockSpan, NodeSettings
from swarm.node.engine import capacity
from swarm.node.engine.engine import SpanEngine, load_engine_blocking
from swarm.node.engine.lean_imports import run_lean
from swarm.node.engine.span_loader import Progress
from swarm.placement import choose_span, loading_s
from swarm.protocol.errors import CapacityError, ConfigError
from swarm.protocol.identity import PeerId
from swarm.protocol.tensors import DType

MINIMUM_CACHE_BYTES = 64 * 1024**2
MIB = 1024**2


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint, and on what and with how much memory this node computes it."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    usable_bytes: int
    """For weights and caches together."""

    @property
    def wire_dtype(self) -> DType:
        """The dtype as it is announced."""
        return DType[dtype_name(self.dtype).upper()]

    def weight_bytes(self, span: BlockSpan) -> int:
        name = dtype_name(self.dtype)
        blocks = range(span.first_block, span.end_block)
        return sum(self.checkpoint.block_bytes(block, name) for block in blocks)


def open_model(settings: NodeSettings, path: Path) -> OpenedModel:
    """Open the checkpoint in a directory; reads headers only. Raises UsageErrors."""
    checkpoint = Checkpoint.open(path)
    device = choose_device(settings.device)
    usable_bytes = settings.memory_bytes or capacity.usable_memory_bytes(device)
    return OpenedModel(checkpoint, device, choose_dtype(settings.dtype, device), usable_bytes)


def choose_blocks(
    model: OpenedModel, settings: NodeSettings, others: Sequence[PlacedNode]
) -> BlockSpan:
    """The blocks to host, given the other nodes of the model (``swarm.placement``).

    Raises CapacityError when they do not fit, ConfigError when the model has no such blocks.
    """
    total = model.checkpoint.number_of_blocks
    if settings.blocks is not None:
        span = settings.blocks
        if span.end_block > total:
            raise ConfigError(f"blocks {span}: the model has blocks 0:{total}")
    else:
        wanted = settings.number_of_blocks
        if wanted is not None and wanted > total:
            raise ConfigError(f"{wanted} blocks: the model has {total}")
        fitting = capacity.blocks_that_fit(model.checkpoint, model.dtype, model.usable_bytes)
        while fitting > 1 and not _fits(model, BlockSpan(0, fitting)):
            fitting -= 1
        node = PlacedNode(
            PeerId(""),
            0,
            total,
            typical_speed(others),  # it is measured once the blocks are loaded
            organisation=settings.organisation,
            country=settings.country,
        )
        on_disk = loading_s(total, range(total), 0.0)
        choice = choose_span(block_vectors(others, total), node, max(1, wanted or fitting), on_disk)
        span = BlockSpan(choice.first_block, choice.end_block)
    if not _fits(model, span):
        raise CapacityError(
            f"blocks {span} need {_needed_bytes(model, span) // MIB} MiB with a small cache, "
            f"{model.usable_bytes // MIB} MiB may be used: host fewer blocks, "
            "use --dtype bfloat16, or allow more with --memory"
        )
    return span


def _fits(model: OpenedModel, span: BlockSpan) -> bool:
    return _needed_bytes(model, span) <= model.usable_bytes


def fit_together(model: OpenedModel, settings: NodeSettings, spans: Sequence[BlockSpan]) -> bool:
    """Whether the weights of several spans may be in memory at the same time.

    Memory that the owner has bounded is all given to one span and its cache.
    """
    if settings.memory_bytes is not None and len(spans) > 1:
        return False
    return sum(_needed_bytes(model, span) for span in spans) <= model.usable_bytes


def _needed_bytes(model: OpenedModel, span: BlockSpan) -> int:
    return model.weight_bytes(span) + MINIMUM_CACHE_BYTES


def load_blocks(
    model: OpenedModel, settings: NodeSettings, span: BlockSpan, progress: Progress
) -> SpanEngine:
    """Load the weights; takes seconds to minutes. ``progress`` may raise to give up."""
    cache_bytes = None
    if settings.memory_bytes is not None:
        cache_bytes = model.usable_bytes - model.weight_bytes(span)
    return run_lean(
        lambda: load_engine_blocking(
            model.checkpoint,
            span.first_block,
            span.end_block,
            device=str(model.device),
            dtype=dtype_name(model.dtype),
            cache_bytes=cache_bytes,
            cache_tokens=settings.cache_tokens,
            adapter_bytes=settings.adapter_bytes,
            threads=settings.threads,
            progress=progress,
        )
    )
