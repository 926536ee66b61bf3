"""The models that the benchmark runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from swarm.catalogue.checkpoint import Checkpoint

RANDOM_LLAMA = "random-llama-0.8b"


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A checkpoint directory and the precision in which it is run."""

    label: str
    path: Path
    dtype: str

    @property
    def blocks(self) -> int:
        return Checkpoint.open(self.path).number_of_blocks

    def span_bytes(self, first_block: int, end_block: int) -> int:
        """Bytes of the weights of ``[first_block, end_block)`` in the precision they are run in."""
        checkpoint = Checkpoint.open(self.path)
        return sum(checkpoint.block_bytes(b, self.dtype) for b in range(first_block, end_block))


def random_llama() -> Path:
    """A Llama of 0.84 billion random bf16 weights, made once in ``$XDG_CACHE_HOME``.

    Speed does not depend on the weights' values, so they need not be a trained model's.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(cache) / "sovereign-swarm" / RANDOM_LLAMA
    if (target / "config.json").exists():
        return target
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{RANDOM_LLAMA}-", dir=target.parent) as work:
        model.save_pretrained(Path(work) / "result")
        shutil.rmtree(target, ignore_errors=True)
        (Path(work) / "result").rename(target)
    return target
