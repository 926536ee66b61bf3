"""Linear layers for a CPU: what makes decoding fast there.

The stock path reorders the weight on every call, or runs a single-threaded product for one row.
Two layouts of a weight avoid that, each for a number of rows (all linears of a 135 M model in
float32, 2 threads, ms):

| rows | packed | plain |
|---|---|---|
| 1 | 17.0 (19.6 not repeated) | 10.4 |
| 2 | 17.0 | 16.0 |
| 4 | 17.0 | 26.0 |
| 8 | 20.6 | 34.0 |
| 512 | 519 | 531 |

*Packed* is oneDNN's own layout; fewer than four rows are repeated, see below. *Plain* is
the checkpoint's; for one or two rows it is taken apart by outputs and multiplied as a batch, which
reads several places of it at once and so gets twice the memory bandwidth. In bfloat16 packed is
best for any number of rows. Whoever calls a layer mostly with one row, or mostly with several, can
change its layout; it is right in both.

Weights here have no gradient: for inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import nn

_PACKED_DTYPES = (torch.float32, torch.bfloat16)
_EXPECTED_ROWS = 16
"""Batch size for which oneDNN chooses the layout. For a single row it would choose the plain one,
which its own product then reads as slowly as the packed one."""
_PARTS = 16
"""Into how many a plain weight is taken apart; from 2 to 32 there is no difference on two cores."""
_FEW_ROWS = 2
"""Up to here the product of parts is the fastest for a plain weight."""
_FEWEST_PACKED_ROWS = 4
"""oneDNN's product is slower for fewer rows than for these: bfloat16, 2,048 wide, 4 layers, 12.4 ms
for one row and 9.7 for four. So fewer are repeated."""


_EXACT_ROWS = 8
"""Up to here each number of rows has a kernel of its own: sessions that decode together."""


def rows_with_a_kernel(rows: int) -> int:
    """So many rows are computed for ``rows``: at most a quarter more, of few different numbers.

    oneDNN compiles a kernel for each number of rows that it meets, which takes up to 0.1 s and 2.4
    MB, and is kept: prompts of all lengths up to 200 tokens made a node grow by 370 MB.
    """
    if rows <= _EXACT_ROWS:
        return rows
    step = 1 << (rows - 1).bit_length() - 3
    return -(-rows // step) * step


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
    """``y = x W^T + b`` on a CPU in float32 or bfloat16, with a weight in one or both layouts."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take ``weight`` ``[out, in]`` in the layout for single rows; it may share its memory.

        The caller drops its own reference to free what is packed.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight_dtype = weight.dtype
        self.bias = None if bias is None else bias.detach().contiguous()
        self.can_be_plain = (
            weight.dtype == torch.float32
            and weight.shape[0] % _PARTS == 0
            and bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
        )
        self._operator = _operator()
        # Plain attributes: a packed weight is opaque, so no parameter, and not in a state dict.
        self._weight = weight.detach().contiguous()
        self._parts: torch.Tensor | None = None
        if self.can_be_plain:
            self._parts = self._weight.view(_PARTS, -1, self.in_features)
        else:
            self.pack()

    @property
    def is_packed(self) -> bool:
        return self._weight.is_mkldnn

    def pack(self, *, keep_plain: bool = False) -> None:
        """Change to the layout for several rows. ``keep_plain``: single rows use the other still,
        at the cost of its memory."""
        if not self.is_packed:
            self._weight = _pack(self._weight)
        if not keep_plain:
            self._parts = None

    def unpack(self) -> None:
        """Change to the layout for single rows, where there is one (``can_be_plain``)."""
        if self.can_be_plain and self.is_packed:
            self._weight = self._weight.to_dense()
            self._parts = self._weight.view(_PARTS, -1, self.in_features)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        rows = hidden.numel() // self.in_features
        if self._parts is not None and rows <= _FEW_ROWS:
            return self._few_rows(hidden, self._parts)
        if rows < _FEWEST_PACKED_ROWS and self.is_packed:
            repeated = hidden.reshape(1, rows, -1).expand(-(-_FEWEST_PACKED_ROWS // rows), -1, -1)
            filled = repeated.reshape(-1, self.in_features)
            output = self._operator(filled, self._weight, self.bias, "none", [], "")
            return output[:rows].view(*hidden.shape[:-1], self.out_features)
        filled_rows = rows_with_a_kernel(rows)
        if filled_rows == rows:
            return self._operator(hidden, self._weight, self.bias, "none", [], "")
        filled = hidden.new_zeros(filled_rows, self.in_features)
        filled[:rows] = hidden.reshape(rows, self.in_features)
        output = self._operator(filled, self._weight, self.bias, "none", [], "")
        return output[:rows].view(*hidden.shape[:-1], self.out_features)

    def _few_rows(self, hidden: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        columns = hidden.reshape(1, -1, self.in_features).transpose(1, 2)
        product = torch.bmm(parts, columns.expand(_PARTS, -1, -1))
        output = product.view(self.out_features, -1).t().contiguous()
        output = output.view(*hidden.shape[:-1], self.out_features)
        return output if self.bias is None else output.add_(self.bias)

    def extra_repr(self) -> str:
        layout = "packed" if self.is_packed else "plain"
        return f"{self.in_features}, {self.out_features}, {self.weight_dtype}, {layout}"


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
