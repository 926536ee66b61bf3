"""Tiny random models of every supported family, saved as checkpoints, and helpers to run spans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.catalogue.checkpoint import Checkpoint
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.node.engine.api import CacheRequest, SessionCache, StepInput
from swarm.node.engine.engine import SpanEngine, load_engine_blocking
from swarm.protocol.tensors import DType

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_rope_scaled": {
        "model_type": "llama",
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_sliding": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "phi3": {"model_type": "phi3"},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "layer_types": [
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_model(family: str) -> Any:
    """A random float32 model whose norms and biases differ from their trivial start values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SIZES, **FAMILIES[family]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(4)  # far from linear, so that mistakes show
    return model


@dataclass
class TinyModel:
    model: Any
    checkpoint: Checkpoint

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids ``[rows, tokens]`` to what block 0 gets, ``[rows, tokens, hidden]``."""
        with torch.no_grad():
            embedded: torch.Tensor = self.model.get_input_embeddings()(tokens)
        return embedded

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits

    def logits(self, tokens: torch.Tensor, left_padding: Sequence[int] = ()) -> torch.Tensor:
        """The whole model at once, by transformers alone."""
        extra: dict[str, torch.Tensor] = {}
        if left_padding:
            positions = torch.arange(tokens.shape[1])[None, :]
            extra["attention_mask"] = (positions >= torch.tensor(left_padding)[:, None]).long()
            extra["position_ids"] = (positions - torch.tensor(left_padding)[:, None]).clamp(min=0)
        with torch.no_grad():
            logits: torch.Tensor = self.model(tokens, use_cache=False, **extra).logits
        return logits


class Chain:
    """Spans in one process, one after the other, as a session sees them."""

    def __init__(self, engines: Sequence[SpanEngine]) -> None:
        self.engines = engines

    def open(
        self, rows: int, maximum_tokens: int, left_padding: tuple[int, ...] = ()
    ) -> list[SessionCache]:
        return [
            engine.reserve(
                CacheRequest(
                    engine.first_block,
                    engine.end_block,
                    rows,
                    maximum_tokens,
                    DType.FLOAT32,
                    left_padding,
                )
            )
            for engine in self.engines
        ]

    async def step(
        self,
        caches: Sequence[SessionCache],
        hidden: torch.Tensor,
        position: int,
        row_order: tuple[int, ...] = (),
    ) -> torch.Tensor:
        wire = tensor_to_wire(hidden, DType.FLOAT32)
        for engine, cache in zip(self.engines, caches, strict=True):
            step = StepInput(wire, position, hidden.shape[1], row_order)
            wire = (await engine.step(cache, step)).activations
        return tensor_from_wire(wire)

    async def close(self) -> None:
        for engine in self.engines:
            await engine.close()


MakeTiny = Callable[[str], TinyModel]
LoadChain = Callable[..., Chain]


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """``make_tiny("qwen3")``: the model and its checkpoint, made once per session."""
    made: dict[str, TinyModel] = {}

    def make(family: str) -> TinyModel:
        if family not in made:
            path: Path = tmp_path_factory.mktemp(family)
            model = make_model(family)
            model.save_pretrained(path)
            made[family] = TinyModel(model, Checkpoint.open(path))
        return made[family]

    return make


@pytest.fixture
def load_chain() -> LoadChain:
    """``load_chain(tiny, [(0, 2), (2, 6)])``: engines for these spans, float32 on the CPU."""

    def load(tiny: TinyModel, spans: Sequence[tuple[int, int]], **settings: Any) -> Chain:
        settings = {"cache_tokens": 4096, "threads": 1, **settings}
        return Chain(
            [
                load_engine_blocking(
                    tiny.checkpoint, first, end, device="cpu", dtype="float32", **settings
                )
                for first, end in spans
            ]
        )

    return load
