"""Real clients and nodes on the network lab: who serves whom. Needs root; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.bench.routing import FAR, NEAR, usage
from scripts.netlab import why_unavailable


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_near_replicas_share_the_sessions_and_a_far_one_gets_none(checkpoint: Path) -> None:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    one, other, far = usage(checkpoint, (NEAR, NEAR, FAR), clients=8, sessions=6).shares
    assert far < 0.05
    assert max(one, other) <= 0.65
