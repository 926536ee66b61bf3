"""The demo model in three spans against transformers, float32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from swarm.catalogue.checkpoint import Checkpoint


async def test_three_spans_give_the_tokens_of_the_whole_model(
    smollm2_path: Path, load_chain: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    checkpoint = Checkpoint.open(smollm2_path)
    chain = load_chain(SimpleNamespace(checkpoint=checkpoint), [(0, 10), (10, 20), (20, 30)])
    tokens = torch.randint(0, 40_000, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens)
        expected = model(tokens, use_cache=False).logits
    caches = chain.open(1, 64)
    outputs, position = [], 0
    for count in (20, 22, 1, 1, 1, 3):
        outputs.append(await chain.step(caches, embedded[:, position : position + count], position))
        position += count
    await chain.close()
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(torch.cat(outputs, 1)))
    assert (logits - expected).abs().max().item() <= 5e-4  # logits reach 31
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
