"""Merged adapters against PEFT's own merging, and in PEFT's hands."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.catalogue.adapter import AdapterFiles
from swarm.compute.adapter_merge import (
    Merged,
    elected,
    merge_linear,
    merge_ties,
    trimmed,
    write_adapter,
)
from swarm.protocol.errors import AdapterError
from tests.adapter_making import make_adapter, peft_logits


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def adapters(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFiles]:
    """Of different ranks, scalings and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    ]
    for number, kind in enumerate(kinds):
        make_adapter(model, folder / str(number), seed=number, **kind)
    return [AdapterFiles.open(folder / str(number)) for number in range(len(kinds))]


def changes(files: AdapterFiles) -> dict[tuple[int, str], torch.Tensor]:
    found = {}
    for module in files.index.modules:
        a, b = (
            torch.frombuffer(bytearray(data), dtype=torch.float32).view(spec.shape)
            for spec, data in zip(module.tensors, files.read(module), strict=True)
        )
        found[module.block, module.name] = module.scaling * b @ a
    return found


def written(merged: Merged, folder: Path) -> AdapterFiles:
    return write_adapter(folder, merged.modules, base_model="tiny", model_revision=b"")


def test_a_linear_merge_is_the_weighted_sum(
    adapters: list[AdapterFiles], model: Any, tmp_path: Path
) -> None:
    merged = merge_linear(adapters, [0.75, -0.5])
    assert merged.lost == 0
    found = changes(written(merged, tmp_path))
    one, two = map(changes, adapters)
    assert found.keys() == one.keys() | two.keys()
    for place, change in found.items():
        expected = torch.zeros_like(change)
        for weight, each in ((0.75, one), (-0.5, two)):
            if place in each:
                expected = expected + weight * each[place]
        torch.testing.assert_close(change, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    tokens = torch.arange(3, 13)[None]
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for (block, name), change in found.items():
            reference.get_submodule(f"model.layers.{block}.{name}").weight += change
        expected_logits = reference(tokens).logits
    torch.testing.assert_close(peft_logits(loaded, tokens), expected_logits, rtol=1e-4, atol=1e-5)


def test_a_bounded_rank_is_the_best_approximation(
    adapters: list[AdapterFiles], tmp_path: Path
) -> None:
    exact = merge_linear(adapters, [1.0, 1.0])
    bounded = merge_linear(adapters, [1.0, 1.0], rank=5)
    assert 0 < bounded.lost < 1
    wrong = whole = 0.0
    for place, factors in exact.modules.items():
        assert bounded.modules[place].rank <= 5
        product = factors.product()
        singular = torch.linalg.svdvals(product)
        left_out = (product - bounded.modules[place].product()).square().sum()
        torch.testing.assert_close(
            left_out, singular[bounded.modules[place].rank :].square().sum(), rtol=1e-3, atol=1e-5
        )
        if factors.rank > 5:
            wrong, whole = wrong + float(left_out), whole + float(product.square().sum())
    assert bounded.lost == pytest.approx((wrong / whole) ** 0.5, rel=1e-3)


def test_ties_is_that_of_peft(adapters: list[AdapterFiles], model: Any, tmp_path: Path) -> None:
    """Same trimming, election and disjoint mean; PEFT takes them for adapters of one rank."""
    from peft.utils.merge_utils import ties

    merged = merge_ties(adapters, [0.7, 0.3], density=0.4)
    assert merged.lost > 0
    one, two = map(changes, adapters)
    place = (1, "self_attn.q_proj")
    expected = ties([one[place], two[place]], torch.tensor([0.7, 0.3]), density=0.4)
    whole = merge_ties(adapters, [0.7, 0.3], density=0.4, rank=32)
    torch.testing.assert_close(whole.modules[place].product(), expected, rtol=1e-4, atol=1e-5)
    assert whole.lost == pytest.approx(0, abs=1e-3)
    files = written(merged, tmp_path)
    assert files.config.rank_of("model.layers.1.self_attn.q_proj") == 7
    assert files.config.rank_of("model.layers.1.mlp.down_proj") == 3


def test_trimming_and_electing() -> None:
    assert trimmed(torch.tensor([[1.0, -4.0], [2.0, 0.5]]), 0.5).tolist() == [[0, -4], [2, 0]]
    votes = torch.tensor([[[3.0, -1.0, 0.0, 2.0]], [[-1.0, -3.0, 5.0, 0.0]]])
    assert elected(votes, [1.0, 2.0]).tolist() == [[3, -3.5, 10, 2]]


def test_what_cannot_be_merged(adapters: list[AdapterFiles], model: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="at least two"):
        merge_linear(adapters[:1], [1.0])
    make_adapter(model, tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterError, match="magnitudes"):
        merge_linear([adapters[0], AdapterFiles.open(tmp_path / "dora")], [1.0, 1.0])
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    make_adapter(other, tmp_path / "other")
    with pytest.raises(AdapterError, match="different models"):
        merge_linear([adapters[0], AdapterFiles.open(tmp_path / "other")], [1.0, 1.0])
    with pytest.raises(AdapterError, match="density"):
        merge_ties(adapters, [1.0, 1.0], density=0.0)
