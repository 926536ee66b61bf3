"""Prompt-tuning adapters against PEFT: virtual tokens that only the client knows of."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.catalogue.adapter import WEIGHTS_NAME
from swarm.catalogue.peft_config import CONFIG_NAME
from swarm.catalogue.prompt_adapter import PromptFiles, open_any_adapter
from swarm.client.prefixed_chain import PromptPrefix
from swarm.protocol.errors import AdapterError, UsageError
from tests.adapter_making import peft_logits

VIRTUAL_TOKENS = 5


@pytest.fixture
def swarm(make_swarm: Any) -> Any:
    return make_swarm("llama")


@pytest.fixture
def adapted(swarm: Any, tmp_path: Path) -> Any:
    """PEFT's model with random virtual tokens; its files are in ``tmp_path``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PromptTuningConfig, get_peft_model

        torch.manual_seed(7)
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
        model: Any = get_peft_model(copy.deepcopy(swarm.whole), settings).eval()
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.normal_(std=0.5)
        model.save_pretrained(str(tmp_path))
    return model


def opened(directory: Path) -> PromptFiles:
    files = open_any_adapter(directory)
    assert isinstance(files, PromptFiles)
    return files


def test_same_logits_as_peft(swarm: Any, adapted: Any, tmp_path: Path) -> None:
    files = opened(tmp_path)
    assert files.virtual_tokens == VIRTUAL_TOKENS
    swarm.model._blocks = swarm.model._blocks.with_adapter(PromptPrefix(files.embeddings()))
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = peft_logits(adapted, tokens)[:, VIRTUAL_TOKENS:]
    with swarm.model.new_cache(16) as cache:
        first = swarm.model(tokens[:, :6], past_key_values=cache).logits
        rest = swarm.model(tokens[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=1e-4, atol=1e-4)
        cache.crop(4)
        again = swarm.model(tokens[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(again, expected[:, 4:], rtol=1e-4, atol=1e-4)
    with swarm.model.new_cache(16) as cache, pytest.raises(UsageError, match="equally long"):
        mask = torch.tensor([[1] * 9, [0] + [1] * 8])
        swarm.model(tokens, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_virtual_tokens": 4}, "5 virtual tokens, and 4"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "LORA"}, "not supported|no place"),
    ],
)
@pytest.mark.usefixtures("adapted")
def test_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    config = json.loads((tmp_path / CONFIG_NAME).read_text()) | change
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=reason):
        open_any_adapter(tmp_path)


@pytest.mark.usefixtures("adapted")
def test_refused_when_damaged(tmp_path: Path) -> None:
    data = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    with pytest.raises(AdapterError, match="not finite"):
        open_any_adapter(tmp_path)
