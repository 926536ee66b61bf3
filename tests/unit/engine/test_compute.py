from __future__ import annotations

import pytest
import torch
from torch import nn

from swarm.compute.devices import check_magnitude, choose_device, choose_dtype
from swarm.compute.packed_linear import (
    PackedLinear,
    pack_linear,
    pack_linears,
    packing_is_available,
    rows_with_a_kernel,
)
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.protocol.errors import ConfigError
from swarm.protocol.tensors import DType, WireTensor


@pytest.mark.parametrize("dtype", list(DType))
def test_wire_tensors_keep_values(dtype: DType) -> None:
    tensor = torch.arange(-6.0, 6.0).view(1, 3, 4)
    wire = tensor_to_wire(tensor, dtype)
    assert (wire.shape, len(wire.data)) == ((1, 3, 4), wire.size_bytes)
    received = WireTensor(dtype, wire.shape, bytes(wire.data))
    torch.testing.assert_close(tensor_from_wire(received, torch.float32), tensor)


def test_wire_tensors_share_memory_where_they_can() -> None:
    tensor = torch.ones(1, 2, 4)
    wire = tensor_to_wire(tensor, DType.FLOAT32)
    tensor[0, 0, 0] = 7
    assert tensor_from_wire(WireTensor(DType.FLOAT32, wire.shape, wire.data))[0, 0, 0] == 7


def test_a_part_of_a_tensor_does_not_keep_the_whole() -> None:
    whole = torch.ones(1, 256, 4)
    wire = tensor_to_wire(whole[:, -1:], DType.FLOAT32)
    whole.fill_(2)
    assert tensor_from_wire(wire).eq(1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e8, -1e8])
def test_magnitude(bad: float) -> None:
    tensor = torch.zeros(4, 8)
    assert check_magnitude(tensor)
    tensor[2, 3] = bad
    assert not check_magnitude(tensor)
    assert check_magnitude(torch.full((2,), 98_561.0))


def test_devices_and_dtypes() -> None:
    cpu = choose_device("cpu")
    assert choose_dtype("float32", cpu) is torch.float32
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigError, match="float16"):
        choose_dtype("float16", cpu)
    with pytest.raises(ConfigError, match="int8"):
        choose_dtype("int8", cpu)
    with pytest.raises(ConfigError, match="warp"):
        choose_device("warp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40])
def test_packed_linears_compute_the_same(dtype: torch.dtype, rows: int) -> None:
    assert packing_is_available()
    torch.manual_seed(0)
    layers = [nn.Linear(24, 40, dtype=dtype), nn.Linear(24, 8, bias=False, dtype=dtype)]
    hidden = torch.randn(1, rows, 24, dtype=dtype)
    with torch.inference_mode():
        expected = torch.cat([layer(hidden) for layer in layers], -1)
        packed = pack_linear(*layers)
        assert isinstance(packed, PackedLinear)
        torch.testing.assert_close(packed(hidden), expected)
        packed.pack(keep_plain=True)
        torch.testing.assert_close(packed(hidden), expected)
        packed.pack()
        assert packed.is_packed
        torch.testing.assert_close(packed(hidden), expected)
        packed.unpack()
        assert packed.is_packed is (dtype == torch.bfloat16)
        assert packed(hidden).is_contiguous()
        torch.testing.assert_close(packed(hidden), expected)
    assert all(layer.weight.is_meta for layer in layers)  # the originals are freed


def test_a_plain_weight_shares_its_memory_and_odd_sizes_are_packed() -> None:
    weight = torch.randn(32, 8)
    layer = PackedLinear(weight, None)
    assert not layer.is_packed
    hidden = torch.randn(1, 1, 8)
    before = layer(hidden)
    weight.mul_(2)
    torch.testing.assert_close(layer(hidden), 2 * before)
    assert PackedLinear(torch.randn(33, 8), None).is_packed


def test_packing_a_module() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4)), nn.ReLU())
    double = nn.Linear(8, 8, dtype=torch.float64)
    assert pack_linears(module) == 2
    assert pack_linears(nn.Sequential(double)) == 0
    assert not isinstance(pack_linear(double), PackedLinear)


def test_few_numbers_of_rows_are_computed() -> None:
    """Each number has a kernel of its own, which oneDNN keeps."""
    computed = [rows_with_a_kernel(rows) for rows in range(1, 513)]
    assert len(set(computed)) <= 32
    assert all(rows <= filled <= 1.25 * rows for rows, filled in enumerate(computed, start=1))
    assert computed[:8] == list(range(1, 9))
    assert all(rows_with_a_kernel(filled) == filled for filled in computed)


@pytest.mark.skipif(not packing_is_available(), reason="no packed linears here")
@pytest.mark.parametrize("rows", [7, 8, 9, 33, 129])
def test_rows_that_fill_up_change_nothing(rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    hidden = torch.randn(1, rows, 48)
    with torch.inference_mode():
        expected = linear(hidden)
        packed = pack_linear(linear)
        assert isinstance(packed, PackedLinear)
        packed.pack()
        torch.testing.assert_close(packed(hidden), expected, rtol=1e-5, atol=1e-5)
