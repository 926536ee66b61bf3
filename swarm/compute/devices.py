"""Which device and dtype to compute in, and whether activations are sane."""

from __future__ import annotations

import torch

from swarm.protocol.errors import ConfigError

MAXIMUM_MAGNITUDE = 1e7
"""Larger activations are refused. Honest models reach 98,561 (gemma-3, first token)."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """``auto``, ``cpu``, ``cuda``, ``mps`` or ``xpu`` (also with an index) as a torch device."""
    if name == "auto":
        for kind in ("cuda", "xpu", "mps"):
            if _is_available(kind):
                return torch.device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use auto, cpu, cuda, mps or xpu") from error
    if device.type != "cpu" and not _is_available(device.type):
        raise ConfigError(f"device {name!r} is not available here; use --device cpu or auto")
    return device


def available_devices() -> tuple[str, ...]:
    """Every kind of device that torch can use here, ``cpu`` last."""
    return (*filter(_is_available, ("cuda", "xpu", "mps")), "cpu")


def _is_available(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    module = getattr(torch, kind, None)
    return module is not None and bool(module.is_available())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device computes in it, float32 otherwise.

    float16 on a CPU is refused: its kernels collapse above one row and activations overflow it.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; use auto, {', '.join(_DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise ConfigError("float16 is slow and overflows on a CPU; use bfloat16 or float32")
    return _DTYPES[name]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by the hardware rather than emulated."""
    if device.type == "cpu":
        return bool(
            torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 (no public name)
            or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
        )
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "xpu"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_magnitude(tensor: torch.Tensor, maximum: float = MAXIMUM_MAGNITUDE) -> bool:
    """Whether all elements are finite and below ``maximum``. NaN and infinities compare false.

    One pass over the data: a few microseconds a token.
    """
    low, high = torch.aminmax(tensor)
    return bool(low > -maximum) and bool(high < maximum)
