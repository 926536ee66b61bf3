"""Wire tensors to torch tensors and back."""

from __future__ import annotations

from typing import Any

import torch

from swarm.protocol.tensors import DType, WireTensor

TORCH_DTYPES: dict[DType, torch.dtype] = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}
WIRE_DTYPES: dict[torch.dtype, DType] = {torch_: wire for wire, torch_ in TORCH_DTYPES.items()}


def tensor_from_wire(
    wire: WireTensor, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """The tensor on ``device`` (default: CPU) in ``dtype`` (default: that of the wire).

    Shares memory with ``wire.data`` when that is writable and no conversion is needed.
    """
    data = wire.data
    if isinstance(data, bytes) or (isinstance(data, memoryview) and data.readonly):
        data = bytearray(data)  # torch refuses to alias read-only memory
    tensor = torch.frombuffer(data, dtype=TORCH_DTYPES[wire.dtype]).view(wire.shape)
    if dtype is None and device is None:
        return tensor
    return tensor.to(device=device, dtype=dtype)


def tensor_to_wire(tensor: torch.Tensor, dtype: DType) -> WireTensor:
    """A wire tensor (encoding RAW).

    Shares memory when ``tensor`` is contiguous, on the CPU, of ``dtype`` and all of its storage: a
    part of a larger tensor is copied, so that keeping the part does not keep the whole.
    """
    converted = tensor.detach().to("cpu", TORCH_DTYPES[dtype]).contiguous()
    if converted.untyped_storage().nbytes() > converted.numel() * converted.element_size():
        converted = converted.clone()
    return WireTensor(dtype, tuple(converted.shape), byte_view(converted))


def converted(tensor: WireTensor, dtype: DType) -> WireTensor:
    """The same numbers in another dtype."""
    return tensor if tensor.dtype is dtype else tensor_to_wire(tensor_from_wire(tensor), dtype)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
