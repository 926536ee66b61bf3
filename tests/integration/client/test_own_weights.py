"""Spans by own weights, one block in memory at a time: what the whole model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swarm.catalogue.adapter import AdapterFiles
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.calibration import OwnWeights
from swarm.compute.wire_tensors import tensor_to_wire
from swarm.ledger.audit_rule import to_array
from swarm.protocol.errors import CheckpointError
from swarm.protocol.tensors import DType
from tests.adapter_making import ALL_LINEAR, ATTENTION, make_adapter

TOKENS = 24


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma3"])
def test_a_span_is_that_of_the_whole_model(
    family: str, make_whole_model: Callable[..., Any], tmp_path: Path
) -> None:
    whole = make_whole_model(family, 3)
    whole.save_pretrained(tmp_path / family)
    own = OwnWeights(Checkpoint.open(tmp_path / family))
    ids = torch.randint(3, 90, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    before: dict[int, torch.Tensor] = {}
    for block, layer in enumerate(whole.model.layers):
        layer.register_forward_pre_hook(
            lambda _, given, block=block: before.__setitem__(block, given[0].clone())
        )
    whole.model.norm.register_forward_pre_hook(
        lambda _, given: before.__setitem__(len(whole.model.layers), given[0].clone())
    )
    with torch.no_grad():
        whole(ids, use_cache=False)
    for first, end in ((0, 1), (1, 3), (0, 3)):
        answered = own.compute(first, end, tensor_to_wire(before[first], DType.FLOAT32))
        assert answered.shape == (1, TOKENS, whole.config.hidden_size)
        np.testing.assert_allclose(to_array(answered), before[end].numpy(), rtol=1e-4, atol=1e-4)
    assert own.largest_block_bytes < sum(p.numel() * 4 for p in whole.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gemma3"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_span_with_an_adapter_is_that_of_peft(
    family: str, use_dora: bool, make_whole_model: Callable[..., Any], tmp_path: Path
) -> None:
    whole = make_whole_model(family, 3)
    whole.save_pretrained(tmp_path / family)
    modules = ATTENTION if family == "mixtral" else ALL_LINEAR
    adapted = make_adapter(
        whole,
        tmp_path / "adapter",
        target_modules=list(modules),
        layers_to_transform=[0, 2],
        use_dora=use_dora,
    )
    adapter = AdapterFiles.open(tmp_path / "adapter")
    own = OwnWeights(Checkpoint.open(tmp_path / family))
    ids = torch.randint(3, 90, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    before: dict[int, torch.Tensor] = {}
    decoder = adapted.get_base_model().model
    for place, layer in enumerate((*decoder.layers, decoder.norm)):
        layer.register_forward_pre_hook(
            lambda _, given, place=place: before.__setitem__(place, given[0].clone())
        )
    with torch.no_grad():
        adapted(ids, use_cache=False)
    given = tensor_to_wire(before[0], DType.FLOAT32)
    answered = to_array(own.compute(0, 3, given, adapter))
    np.testing.assert_allclose(answered, before[3].numpy(), rtol=1e-4, atol=1e-3)
    bare = to_array(own.compute(0, 3, given))
    assert np.abs(bare - answered).max() > 0.1


def test_blocks_that_are_not_here_are_named(
    make_whole_model: Callable[..., Any], tmp_path: Path
) -> None:
    make_whole_model("llama", 3).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    checkpoint = Checkpoint.open(tmp_path / "m")
    info = next(iter(checkpoint.block_tensors(1).values()))
    OwnWeights(checkpoint)
    info.file.unlink()
    with pytest.raises(CheckpointError, match="lacks the weights of block"):
        OwnWeights(checkpoint)
