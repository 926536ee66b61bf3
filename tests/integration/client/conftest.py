"""A swarm without a network: all decoder blocks of a tiny model behind the client's chain port."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from swarm.client.background import BackgroundLoop
from swarm.client.ends import EMBEDDING, HEAD, NORM, ModelEnds
from swarm.client.hops import SessionRequest
from swarm.client.model import SwarmModelForCausalLM
from swarm.client.remote_blocks import RemoteBlocks
from swarm.compute.packed_linear import pack_linears
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.protocol.errors import NetworkError, NoRouteError
from swarm.protocol.identity import Identity
from swarm.protocol.tensors import DType, WireTensor
from swarm.routing import ChainPlan, Hop

REVISION = bytes(32)
VOCABULARY = 96


class LocalChain:
    """One session over the decoder layers of a whole model, with transformers' own cache."""

    def __init__(self, decoder: Any, request: SessionRequest, plan: ChainPlan) -> None:
        self.request = request
        self.plan = plan
        self.passes = 0
        self.closed = False
        self.fail_at_pass: int | None = None
        self.lost_at_passes: set[int] = set()
        """Passes at which blocks are lost for the moment: nothing counts, the next one works."""
        self._decoder = decoder
        self._cache = DynamicCache(config=decoder.config)
        self._cache.activate_past_recording()

    @torch.no_grad()
    async def step(
        self,
        activations: WireTensor,
        position: int,
        *,
        output_tokens: int,
        row_order: tuple[int, ...] = (),
    ) -> WireTensor:
        assert not self.closed
        self.passes += 1
        if self.passes == self.fail_at_pass:
            raise NetworkError("a hop is gone")
        if self.passes in self.lost_at_passes:
            raise NoRouteError("blocks 1-2 are lost", missing_blocks=(1, 2))
        rows, tokens, hidden = activations.shape
        assert (rows, hidden) == (self.request.rows, self.request.hidden_size)
        assert position + tokens <= self.request.maximum_tokens
        cached = self._cache.get_seq_length()
        assert position <= cached
        if cached:
            self._cache.crop(-(cached - position))
        if row_order:
            self._cache.reorder_cache(torch.tensor(row_order))
        padding = torch.tensor(self.request.left_padding or (0,) * rows)[:, None]
        places = torch.arange(position + tokens)
        output = self._decoder(
            inputs_embeds=tensor_from_wire(activations),
            attention_mask=(places >= padding).long() if self.request.left_padding else None,
            position_ids=(places - padding).clamp(min=0)[:, position:],
            past_key_values=self._cache,
            use_cache=True,
        )
        return tensor_to_wire(output.last_hidden_state[:, -output_tokens:], self.request.wire_dtype)

    async def close(self) -> None:
        self.closed = True


@dataclass
class LocalClient:
    """Opens chains like ``SwarmClient``, within this process."""

    decoder: Any
    chains: list[LocalChain] = field(default_factory=list)
    fail_at_pass: int | None = None
    lost_at_passes: set[int] = field(default_factory=set)
    closed: bool = False

    async def open_chain(
        self,
        request: SessionRequest,
        *,
        number_of_blocks: int,
        dtype: DType | None = None,
        model_name: str = "",
    ) -> LocalChain:
        hop = Hop(
            peer_id=Identity.generate().peer_id,
            display_name="here",
            first_block=0,
            end_block=number_of_blocks,
            addresses=(),
        )
        chain = LocalChain(self.decoder, request, ChainPlan((hop,), expected_step_s=0.0))
        chain.fail_at_pass = self.fail_at_pass
        chain.lost_at_passes = self.lost_at_passes
        self.chains.append(chain)
        return chain

    async def close(self) -> None:
        self.closed = True

    @property
    def passes(self) -> int:
        return sum(chain.passes for chain in self.chains)


@dataclass
class Swarm:
    """The whole model, and the same model with its blocks behind a chain."""

    whole: Any
    model: SwarmModelForCausalLM
    client: LocalClient


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A small configuration whose random weights give clearly different logits."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.4,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes
    match family:
        case "llama":
            return LlamaConfig(**shape)
        case "qwen2":
            return Qwen2Config(**shape)
        case "qwen3":
            return Qwen3Config(**shape)
        case "mistral":
            return MistralConfig(**{"sliding_window": 8} | shape)
        case "mixtral":
            return MixtralConfig(**{"num_local_experts": 4, "sliding_window": None} | shape)
        case "gemma3":
            own = {
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "final_logit_softcapping": 20.0,
                "query_pre_attn_scalar": 8,
            }
            return Gemma3TextConfig(**own | shape)
    raise ValueError(family)


def build_whole_model(config: PretrainedConfig, seed: int) -> Any:
    torch.manual_seed(seed)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def build_swarm(config: PretrainedConfig, background: BackgroundLoop, seed: int = 0) -> Swarm:
    whole = build_whole_model(config, seed)
    decoder = copy.deepcopy(whole.model)
    decoder.norm = torch.nn.Identity()
    names = {EMBEDDING, NORM} if config.tie_word_embeddings else {EMBEDDING, NORM, HEAD}
    tensors = {name: tensor for name, tensor in whole.state_dict().items() if name in names}
    ends = ModelEnds.from_tensors(config, tensors, dtype=torch.float32)
    pack_linears(ends)
    client = LocalClient(decoder)
    blocks = RemoteBlocks(
        client=client,
        model_name="tiny",
        revision=REVISION,
        number_of_blocks=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        wire_dtype=DType.FLOAT32,
    )
    return Swarm(whole, SwarmModelForCausalLM(config, ends, blocks, background), client)


SwarmFactory = Callable[..., Swarm]


@pytest.fixture
def make_swarm() -> Iterator[SwarmFactory]:
    """Build swarms of a family; afterwards no session may be open."""
    torch.set_num_threads(1)
    background = BackgroundLoop()
    swarms: list[Swarm] = []

    def make(family: str = "llama", **changes: Any) -> Swarm:
        swarms.append(build_swarm(tiny_config(family, **changes), background))
        return swarms[-1]

    yield make
    try:
        for swarm in swarms:
            assert all(chain.closed for chain in swarm.client.chains)
    finally:
        background.close()


@pytest.fixture
def make_whole_model() -> Callable[..., Any]:
    """A local model, for assistants."""

    def make(family: str, seed: int, **changes: Any) -> Any:
        return build_whole_model(tiny_config(family, **changes), seed)

    return make
