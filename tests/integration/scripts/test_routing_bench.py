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


@pytest.fixture
def network_lab() -> None:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("network_lab")
def test_near_replicas_share_the_sessions_and_a_far_one_gets_none(checkpoint: Path) -> None:
    one, other, far = usage(checkpoint, (NEAR, NEAR, FAR), clients=8, sessions=6).shares
    assert far < 0.05
    assert max(one, other) <= 0.65


@pytest.mark.usefixtures("network_lab")
def test_a_near_replica_alone_is_not_helped_by_a_far_one(checkpoint: Path) -> None:
    near, far = usage(checkpoint, (NEAR, FAR), clients=8, sessions=4).shares
    assert far < 0.05
    assert near + far == 1.0
