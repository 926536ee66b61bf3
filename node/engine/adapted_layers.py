"""Adapters in a batch: what each session's adapter adds to the outputs of the linear layers.

The layers themselves know nothing of adapters. While batches run in which any session has one,
hooks on the linear layers add ``(x A^T) B^T`` to the rows of that session; rows of sessions without
an adapter are left as they are. A fused layer (Q, K and V in one product) is one place, for which
the parts of an adapter are put together beforehand: A one below the other, B along the diagonal.

Every batch counts what was added. A layer that was computed past its hook would otherwise answer
like the bare model, unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from swarm.compute.packed_linear import PackedLinear
from swarm.node.engine.joint_deltas import JointDeltas

_IDLE_BATCHES = 64
"""After so many batches without adapters the hooks go: a layer with one takes microseconds more."""


@dataclass(frozen=True, slots=True)
class Place:
    """One linear layer as it is computed, and the layers of the model that it is made of."""

    layer: int
    """Counted from the span's first block."""
    name: str
    """Of the module inside its decoder layer."""
    parts: tuple[str, ...]
    """As the model and PEFT name them (``self_attn.q_proj``), in the order of their outputs."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter does at one place: ``y * gain + shift + (x A^T) B^T``."""

    a_transposed: torch.Tensor
    """``[in, rank]``."""
    b_transposed: torch.Tensor
    """``[rank, out]``, scaled."""
    gain: torch.Tensor | None = None
    """DoRA: ``[out]``, and ``shift`` likewise; it keeps the bias out of the gain."""
    shift: torch.Tensor | None = None

    @property
    def size_bytes(self) -> int:
        tensors = (self.a_transposed, self.b_transposed, self.gain, self.shift)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def add_to(self, output: torch.Tensor, hidden: torch.Tensor) -> None:
        """``output`` ``[rows, out]`` of the layer for ``hidden`` ``[rows, in]``, in place."""
        if self.gain is not None and self.shift is not None:
            torch.addcmul(self.shift, output, self.gain, out=output)
        output.addmm_(hidden @ self.a_transposed, self.b_transposed)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter's part for the blocks of one span, ready to compute."""

    adapter_id: bytes
    deltas: Mapping[tuple[int, str], Delta]
    """By layer and name of a ``Place``."""
    size_bytes: int

    def places_in(self, first_layer: int, end_layer: int) -> int:
        return sum(first_layer <= layer < end_layer for layer, _ in self.deltas)


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows ``[start, end)`` of a batch that belong to sessions with the same adapter."""

    start: int
    end: int
    adapter: LoadedAdapter


class AdaptedLayers:
    """The hooks of one span. Belongs to the device thread, except for ``places``."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._modules = {
            (index, name): module
            for index, layer in enumerate(layers)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear | PackedLinear)
        }
        fused = {
            (index, f"{name}.{child}"): tuple(_sibling(name, part) for part in parts)
            for index, layer in enumerate(layers)
            for name, module in layer.named_modules()
            for child, parts in getattr(module, "FUSED_PARTS", {}).items()
        }
        self.places = tuple(
            Place(index, name, fused.get((index, name), (name,))) for index, name in self._modules
        )
        self._handles: list[Any] = []
        self._segments: Sequence[Segment] = ()
        self._added = 0
        self._bare_batches = 0
        self._is_joint = False
        self.joint = JointDeltas()

    def release(self) -> None:
        """Let go of the layers."""
        self._remove_hooks()
        self._modules.clear()

    @contextmanager
    def active(
        self, segments: Sequence[Segment], first_layer: int, end_layer: int
    ) -> Iterator[None]:
        """While the layers compute a batch. Raises RuntimeError if any of them was left out."""
        if not segments:
            self._bare_batches += 1
            if self._bare_batches >= _IDLE_BATCHES:
                self._remove_hooks()
            yield
            return
        self._bare_batches = 0
        self._is_joint = self.joint.begin(
            [segment.adapter for segment in segments],
            [(segment.start, segment.end) for segment in segments],
        )
        if not self._handles:
            self._handles = [
                module.register_forward_hook(partial(self._hook, place))
                for place, module in self._modules.items()
            ]
        self._segments, self._added = segments, 0
        try:
            yield
        finally:
            self._segments = ()
        expected = sum(each.adapter.places_in(first_layer, end_layer) for each in segments)
        if self._added != expected:
            raise RuntimeError(f"adapters were added at {self._added} of {expected} places")

    def _hook(
        self,
        place: tuple[int, str],
        module: nn.Module,
        inputs: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> None:
        if not self._segments:
            return
        hidden = inputs[0].view(-1, inputs[0].shape[-1])
        rows = output.view(-1, output.shape[-1])
        if self._is_joint and (added := self.joint.add(place, rows, hidden)):
            self._added += added
            return
        for segment in self._segments:
            delta = segment.adapter.deltas.get(place)
            if delta is None:
                continue
            start, end = segment.start, segment.end
            if end - start == rows.shape[0]:
                delta.add_to(rows, hidden)
            else:
                delta.add_to(rows[start:end], hidden[start:end])
            self._added += 1

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.joint.forget()


def _sibling(module_name: str, part: str) -> str:
    return f"{module_name}.{part}" if module_name else part
