"""Linear layers with oneDNN's prepacked weights: what makes decoding on a CPU fast.

The stock path reorders the weight on every call, or runs a single-threaded product for one row.
Packed weights have no gradient: for inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import nn

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
_EXPECTED_ROWS = 16
"""Batch size for which oneDNN chooses the layout. Its layout for a single row is slower even for a
single row (576 x 1536 float32: 450 against 170 us), and much slower for a few."""


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001
        weight, _EXPECTED_ROWS
    )
    return packed


def _operator() -> Callable[..., torch.Tensor]:
    operator: Callable[..., torch.Tensor] = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001
    return operator


@cache
def packing_is_available() -> bool:
    """Whether this build of torch has the operators (they are not part of its public API)."""
    try:
        output = _operator()(torch.ones(1, 16), _pack(torch.ones(16, 16)), None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool((output == 16).all())


class PackedLinear(nn.Module):
    """``y = x W^T + b`` with a packed weight; CPU, float32 or bfloat16, without gradient."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Pack ``weight`` ``[out, in]``; the caller drops its own reference to free it."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_dtype = weight.dtype
        self.bias = None if bias is None else bias.detach().contiguous()
        # Plain attributes: a packed weight is opaque, so no parameter, and not in a state dict.
        self._weight = _pack(weight.detach().contiguous())
        self._operator = _operator()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return self._operator(hidden, self._weight, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight_dtype}, packed"


def can_pack(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in _PACKED_DTYPES and packing_is_available()


def pack_linear(*linears: nn.Linear) -> nn.Module:
    """One module for linear layers of the same input; their outputs are concatenated.

    Frees the originals' weights. Without packing (other device or dtype) the result is an ordinary
    linear layer.
    """
    weights = [linear.weight for linear in linears]
    bias = _concatenate_biases(linears)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    for linear in linears:
        linear.weight = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    if can_pack(weight):
        return PackedLinear(weight, bias)
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    merged.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        merged.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return merged


def _concatenate_biases(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            linear.weight.new_zeros(linear.out_features) if bias is None else bias
            for linear, bias in zip(linears, biases, strict=True)
        ]
    ).detach()


def pack_linears(module: nn.Module) -> int:
    """Replace every ``nn.Linear`` inside ``module`` that can be packed; returns how many."""
    packed = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, pack_linear(child))
            packed += 1
        else:
            packed += pack_linears(child)
    return packed
