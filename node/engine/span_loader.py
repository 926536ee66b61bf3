"""Build the decoder layers of a span, reading only the tensors of its blocks.

Layers are made without memory (on the meta device) and filled one at a time, tensor by tensor,
converted and packed before the next one is read: memory peaks at the span's size and one layer.
No embeddings, no final norm, no head: these are the client's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from swarm.catalogue.checkpoint import Checkpoint, TensorInfo
from swarm.compute.wire_tensors import byte_view
from swarm.node.engine import families
from swarm.node.engine.adapted_layers import AdaptedLayers
from swarm.node.engine.attention import register_attention
from swarm.node.engine.cache import CacheShape
from swarm.node.engine.freed_memory import return_freed_memory
from swarm.node.engine.fused import Replacements, replace_modules
from swarm.node.engine.layouts import Layouts
from swarm.node.engine.ragged import RaggedBatch
from swarm.node.engine.training_batch import TrainingBatch
from swarm.protocol.errors import CheckpointError, UsageError

_TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
Progress = Callable[[int, int], None]
"""Called with (blocks loaded, blocks in the span)."""


@dataclass(frozen=True)
class Span:
    """Blocks ``[first_block, end_block)``, ready to compute in ``dtype`` on ``device``."""

    first_block: int
    end_block: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    cache_shape: CacheShape
    weight_bytes: int
    replacements: Replacements
    layers: list[nn.Module]
    layouts: Layouts
    adapted: AdaptedLayers
    _layer_types: list[str]
    _rotary: nn.Module
    _rotary_takes_layer_type: bool

    def release(self) -> None:
        """Give the weights back; nothing can be computed afterwards."""
        self.layers.clear()
        self.layouts.release()
        self.adapted.release()
        return_freed_memory()

    @torch.inference_mode()
    def forward(
        self, hidden: torch.Tensor, batch: RaggedBatch, first_block: int, end_block: int
    ) -> torch.Tensor:
        """``[1, total, hidden]`` through the given blocks (the model's numbers); same shape."""
        return self.run_blocks(hidden, batch, first_block, end_block)

    def run_blocks(
        self,
        hidden: torch.Tensor,
        batch: RaggedBatch | TrainingBatch,
        first_block: int,
        end_block: int,
    ) -> torch.Tensor:
        """The same, with a gradient where the caller asks torch for one."""
        offset = first_block - self.first_block
        last = end_block - self.first_block
        positions = batch.position_ids(self.device)
        embeddings: dict[str, Any] = {}
        for layer_type in set(self._layer_types[offset:last]):
            if self._rotary_takes_layer_type:
                embeddings[layer_type] = self._rotary(hidden, positions, layer_type)
            elif embeddings:
                embeddings[layer_type] = next(iter(embeddings.values()))
            else:
                embeddings[layer_type] = self._rotary(hidden, positions)
        for layer, layer_type in zip(
            self.layers[offset:last], self._layer_types[offset:last], strict=True
        ):
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=None,
                position_embeddings=embeddings[layer_type],
                ragged_batch=batch,
                block_offset=offset,
            )
        return hidden


def load_span(
    checkpoint: Checkpoint,
    first_block: int,
    end_block: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    replace: bool = True,
) -> Span:
    """Load a span. ``replace=False`` keeps transformers' modules as they are (for comparisons).

    Raises UsageError for an impossible span, CheckpointError when the family is not supported or
    tensors are missing or have wrong shapes.
    """
    if not 0 <= first_block < end_block <= checkpoint.number_of_blocks:
        raise UsageError(
            f"blocks {first_block}:{end_block} are not within 0:{checkpoint.number_of_blocks}"
        )
    family = families.family_of(checkpoint)
    register_attention()
    config = families.span_config(checkpoint, first_block, end_block)
    layers: list[nn.Module] = []
    replacements = Replacements()
    weight_bytes = 0
    for index in range(end_block - first_block):
        with torch.device("meta"):
            layer = family.decoder_layer(config, index)
        tensors = checkpoint.block_tensors(first_block + index)
        weight_bytes += _fill(layer, checkpoint, tensors, family, device, dtype)
        layer.eval()
        if replace and device.type == "cpu":
            replacements += replace_modules(layer)
        layers.append(layer)
        return_freed_memory()
        if progress is not None:
            progress(index + 1, end_block - first_block)
    head_dim = getattr(config, "head_dim", None)
    return Span(
        first_block=first_block,
        end_block=end_block,
        hidden_size=checkpoint.hidden_size,
        dtype=dtype,
        device=device,
        cache_shape=CacheShape(
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
        ),
        weight_bytes=weight_bytes,
        replacements=replacements,
        layers=layers,
        layouts=Layouts(layers),
        adapted=AdaptedLayers(layers),
        _layer_types=list(families.layer_types(config)),
        # Outside of the meta device: its frequencies are computed, not loaded.
        _rotary=family.rotary_embedding(config).to(device),
        _rotary_takes_layer_type=family.rotary_takes_layer_type,
    )


def _fill(
    layer: nn.Module,
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    family: families.Family,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Give every parameter of ``layer`` its memory and values; returns the bytes taken."""
    size_bytes = 0
    for name, parameter in list(layer.named_parameters()):
        names = [name]
        if name not in tensors:
            names = list(families.checkpoint_names(family, name, parameter.shape))
        missing = [part for part in names if part not in tensors]
        if missing:
            raise CheckpointError(f"checkpoint incomplete: no tensor {missing[0]} in a block")
        values = _read(checkpoint, [tensors[part] for part in names], parameter.shape, dtype)
        owner, _, attribute = name.rpartition(".")
        loaded = nn.Parameter(values.to(device), requires_grad=False)
        setattr(layer.get_submodule(owner), attribute, loaded)
        size_bytes += loaded.numel() * loaded.element_size()
    return size_bytes


def read_tensor(checkpoint: Checkpoint, info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
    """One tensor as the span has it, on the CPU. Raises CheckpointError."""
    return _read(checkpoint, [info], torch.Size(info.shape), dtype)


def _read(
    checkpoint: Checkpoint, parts: list[TensorInfo], shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """The parts one after the other, as one tensor of ``shape`` in ``dtype`` on the CPU."""
    if sum(prod(part.shape) for part in parts) != shape.numel() or (
        len(parts) == 1 and parts[0].shape != tuple(shape)
    ):
        raise CheckpointError(
            f"checkpoint damaged: {parts[0].name} has shape {parts[0].shape}, the configuration "
            f"wants {tuple(shape)}"
        )
    values = torch.empty(shape, dtype=dtype)
    flat, filled = values.view(-1), 0
    for part in parts:
        stored = _TORCH_DTYPES.get(part.dtype)
        if stored is None:
            raise CheckpointError(f"{part.name} is stored as {part.dtype}, which is not supported")
        target = flat[filled : filled + prod(part.shape)]
        source = target if stored == dtype else torch.empty(prod(part.shape), dtype=stored)
        checkpoint.read_into(part, byte_view(source))
        if source is not target:
            target.copy_(source)
        filled += target.numel()
    return values
