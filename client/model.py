"""``SwarmModelForCausalLM``: a transformers model whose decoder blocks run in a swarm.

Embeddings, final norm and head are local (``ends``), the blocks are behind a chain, the cache is a
remote session (``cache``). All of ``generate`` is transformers' own: samplers, streamers, stopping
criteria, beams and assisted decoding.

    model = SwarmModelForCausalLM.from_swarm("SmolLM2-135M-Instruct", peers=["/ip4/..."])
    tokens = model.generate(**inputs, max_new_tokens=64)

Programs that serve many users want ``generate.stream_generate`` instead, which is asynchronous.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.resolve import local_checkpoint
from swarm.client.adapters import find_adapter
from swarm.client.background import BackgroundLoop
from swarm.client.cache import RemoteSession, SwarmCache
from swarm.client.config import ClientSettings
from swarm.client.ends import ModelEnds, read_generation_config, remote_blocks
from swarm.client.remote_blocks import RemoteBlocks
from swarm.protocol.errors import GenerationInterrupted, NoRouteError, UsageError

if TYPE_CHECKING:
    from swarm.client.app import SwarmClient


class SwarmModelForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model served by a chain of volunteer nodes.

    Inference only. Close it (or use it in a ``with`` block) to leave the swarm; leaving also
    happens at exit.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        ends: ModelEnds,
        blocks: RemoteBlocks,
        background: BackgroundLoop,
        *,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        own_config = copy.deepcopy(config)
        # Attention and experts are on the nodes: nothing here may depend on how they are computed.
        own_config._attn_implementation = "eager"  # noqa: SLF001
        own_config._experts_implementation = "eager"  # noqa: SLF001
        super().__init__(own_config)
        if generation_config is not None:
            self.generation_config = generation_config
        self.ends = ends
        self._blocks = blocks
        self._background = background
        self._latest_session: RemoteSession | None = None
        self.checkpoint_path: Path | None = None
        self.eval()

    @classmethod
    def from_swarm(
        cls,
        model_name_or_path: str,
        *,
        peers: Sequence[str] = (),
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        settings: ClientSettings | None = None,
        adapter: str | Path | None = None,
    ) -> SwarmModelForCausalLM:
        """Load the ends and join the swarm; what is not on this disk is fetched from peers.

        ``checkpoint_path`` of the result is where configuration and tokenizer are.

        ``dtype`` holds for the ends and for activations on the wire; other than ``auto`` it also
        asks for nodes that compute in it. ``settings`` (without ``peers``) gives full control.
        ``adapter`` is the directory of a LoRA or DoRA adapter in PEFT's format; it is brought to
        nodes that lack it.
        Raises CheckpointError, AdapterError, ConfigError or NetworkError.
        """
        from swarm.client.app import SwarmClient  # hivemind: slow to import, and not always needed

        dtype = str(dtype).removeprefix("torch.")
        if settings is None:
            settings = ClientSettings(peers=tuple(peers), dtype=dtype)
        elif peers or dtype != "auto":
            raise UsageError("give either settings or peers and dtype, not both")
        path = local_checkpoint(model_name_or_path)
        background = BackgroundLoop()
        client: SwarmClient | None = None
        try:
            if path is None:
                client = background.run(SwarmClient.connect(settings))
                path = background.run(client.fetch_ends(model_name_or_path))
            checkpoint = Checkpoint.open(path)
            ends = ModelEnds.load(checkpoint, dtype=settings.dtype, device=device)
            client = client or background.run(SwarmClient.connect(settings))
            source = None
            if adapter is not None:
                found = find_adapter(str(adapter), checkpoint, client.library())
                source = background.run(found).source
        except BaseException:
            if client is not None:
                background.run(client.close())
            background.close()
            raise
        blocks = remote_blocks(client, checkpoint, ends, settings.dtype).with_adapter(source)
        model = cls(
            ends.config,
            ends,
            blocks,
            background,
            generation_config=read_generation_config(checkpoint, ends.config),
        )
        model.checkpoint_path = path
        return model

    # --- sessions ---------------------------------------------------------------------------------
    def new_cache(self, maximum_tokens: int | None = None) -> SwarmCache:
        """A session that outlives a ``generate`` call, for answers that build on each other.

        Pass it as ``past_key_values``; close it, or use it in a ``with`` block. ``maximum_tokens``
        must cover prompts and answers of all calls.
        """
        return SwarmCache(self._blocks, self._background, maximum_tokens)

    @property
    def latest_session(self) -> RemoteSession | None:
        """The session of the latest pass: which hops served it (``plan``), how many ``passes``."""
        return self._latest_session

    def close(self) -> None:
        """Close all sessions and leave the swarm; a second call does nothing."""
        if not self._background.is_closed:
            try:
                self._background.run(self._blocks.client.close())
            finally:
                self._background.close()

    def __enter__(self) -> SwarmModelForCausalLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- transformers -----------------------------------------------------------------------------
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``; the session on the nodes is freed when it ends, anyhow.

        Raises GenerationInterrupted when blocks are lost and nobody else has them. Its
        ``token_ids`` can be passed as ``input_ids`` to go on later; with a cache of your own
        (``past_key_values``), what the nodes still have is not computed again.
        """
        seen = _SeenTokens()
        criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or ()), seen])
        kwargs["stopping_criteria"] = criteria
        try:
            if kwargs.get("past_key_values") is not None:
                return super().generate(*args, **kwargs)
            with self.new_cache() as cache:
                return super().generate(*args, **kwargs | {"past_key_values": cache})
        except NoRouteError as error:
            if not seen.token_ids:
                raise  # not a single token was generated
            raise GenerationInterrupted(error, seen.token_ids) from error

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by ``generate`` once it knows how long the text may get."""
        if generation_config.use_cache is False:
            model_kwargs.pop("past_key_values", None)
            return
        if generation_config.is_assistant:
            raise UsageError("the assistant of assisted generation must be a local model")
        if generation_config.cache_implementation not in (None, "dynamic", "hybrid"):
            raise UsageError("the cache lives on the nodes: leave cache_implementation unset")
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, SwarmCache):
            raise UsageError("past_key_values must come from model.new_cache()")
        # Candidates looked up in the prompt may reach beyond the end before they are rejected.
        overshoot = generation_config.prompt_lookup_num_tokens or 0
        cache.reserve(max_cache_length + 1 + overshoot)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SwarmCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[rows, tokens, vocabulary]`` of the last ``logits_to_keep`` positions (0: all).

        ``attention_mask`` is ``[rows, cached + new tokens]``; only padding on the left is possible.
        Without ``past_key_values`` a session is opened for this one pass.
        """
        if ignored.get("labels") is not None:
            raise UsageError("this model has no gradients and computes no loss")
        if past_key_values is None:
            with self.new_cache() as cache:
                output = self.forward(
                    input_ids,
                    attention_mask,
                    position_ids,
                    cache,
                    inputs_embeds,
                    logits_to_keep=logits_to_keep,
                )
                output.past_key_values = None
                return output
        embedded = inputs_embeds if input_ids is None else self.ends.embed(input_ids)
        if embedded is None or (input_ids is not None and inputs_embeds is not None):
            raise UsageError("give either input_ids or inputs_embeds")
        rows, tokens, _ = embedded.shape
        position = past_key_values.get_seq_length()
        if position == 0:
            past_key_values.start(rows, left_padding_of(attention_mask, rows, tokens))
            check_positions(position_ids, past_key_values.left_padding, rows, tokens)
        elif attention_mask is not None:
            check_mask_continues(attention_mask, past_key_values.left_padding, position + tokens)
        self._latest_session = past_key_values.session
        kept = min(logits_to_keep, tokens) or tokens
        hidden = past_key_values.step(embedded, kept)
        return CausalLMOutputWithPast(
            logits=self.ends.logits(hidden.to(self.ends.device, self.ends.dtype)),
            past_key_values=past_key_values,
        )

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.ends.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.ends.head


class _SeenTokens(StoppingCriteria):  # type: ignore[misc]
    """Never stops anything; remembers the tokens so far, since ``generate`` calls it each time."""

    def __init__(self) -> None:
        self._latest: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._latest = input_ids
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def token_ids(self) -> tuple[tuple[int, ...], ...]:
        """Of each row, the prompt included; empty before the first new token."""
        return () if self._latest is None else tuple(map(tuple, self._latest.tolist()))


def left_padding_of(mask: torch.Tensor | None, rows: int, tokens: int) -> tuple[int, ...]:
    """Zeros at the start of each row of a first mask; empty when there are none at all."""
    if mask is None:
        return ()
    if mask.shape != (rows, tokens):
        raise UsageError(f"attention_mask must have the shape {(rows, tokens)}")
    padding = (mask == 0).sum(dim=-1)
    expected = torch.arange(tokens, device=mask.device) >= padding[:, None]
    if not torch.equal(expected, mask != 0) or bool((padding >= tokens).any()):
        raise UsageError("pad on the left only (tokenizer.padding_side = 'left')")
    return tuple(padding.tolist()) if bool(padding.any()) else ()


def check_mask_continues(mask: torch.Tensor, left_padding: tuple[int, ...], tokens: int) -> None:
    """After the first pass nothing new may be masked."""
    if mask.dim() != 2 or mask.shape[1] != tokens:
        raise UsageError(f"attention_mask must cover all {tokens} tokens, the cached ones included")
    if int((mask == 0).sum()) != sum(left_padding):
        raise UsageError("tokens after the first pass cannot be masked")


def check_positions(
    position_ids: torch.Tensor | None, left_padding: tuple[int, ...], rows: int, tokens: int
) -> None:
    """Nodes count positions themselves, as ``generate`` does: from 0 after the padding."""
    if position_ids is None:
        return
    padding = torch.tensor(left_padding or (0,) * rows, device=position_ids.device)
    expected = (torch.arange(tokens, device=position_ids.device) - padding[:, None]).clamp(min=0)
    if not torch.equal(position_ids.expand(rows, -1), expected):
        raise UsageError("custom position_ids cannot be used in a swarm")
