"""Names and shapes of adapter tensors are those of PEFT."""

import pytest

from swarm.compute.lora import (
    LORA_A,
    LORA_B,
    MAGNITUDE,
    AdapterShape,
    Method,
    name_from_peft,
    peft_name,
    split_name,
    tensor_name,
)
from swarm.protocol.errors import UsageError

LINEARS = {"self_attn.q_proj": (32, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 48)}


def test_shapes_of_one_block() -> None:
    shape = AdapterShape(Method.DORA, 4, 8.0, ("q_proj", "mlp.down_proj"))
    assert shape.tensor_shapes(LINEARS) == {
        "self_attn.q_proj": {LORA_A: (4, 16), LORA_B: (32, 4), MAGNITUDE: (32,)},
        "mlp.down_proj": {LORA_A: (4, 48), LORA_B: (16, 4), MAGNITUDE: (16,)},
    }
    assert shape.scaling == 2.0


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("q_proj", ["self_attn.q_proj"]),
        ("self_attn.v_proj", ["self_attn.v_proj"]),
        ("proj", []),  # the end of a word is not the end of a name
    ],
)
def test_targets_as_in_peft(target: str, meant: list[str]) -> None:
    assert list(AdapterShape(Method.LORA, 1, 1.0, (target,)).tensor_shapes(LINEARS)) == meant


def test_names_are_those_of_peft_files() -> None:
    name = tensor_name(11, "self_attn.q_proj", LORA_A)
    key = "base_model.model.model.layers.11.self_attn.q_proj.lora_A.weight"
    assert peft_name(name) == key
    assert split_name(name_from_peft(key)) == (11, "self_attn.q_proj", LORA_A)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.lora_A.weight",
        "model.layers.01.q_proj.lora_A.weight",
        "model.layers.-1.q_proj.lora_A.weight",
        "model.layers.1.q_proj.weight",
        "lm_head.lora_A.weight",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        split_name(name)


def test_an_adapter_without_rank_or_targets_is_refused() -> None:
    for rank, targets in ((0, ("q_proj",)), (4, ())):
        with pytest.raises(UsageError):
            AdapterShape(Method.LORA, rank, 8.0, targets)
    AdapterShape(Method.NONE, 0, 0.0, ())
