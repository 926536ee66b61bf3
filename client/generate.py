"""Text from a swarm, asynchronously: for programs that serve many users on one event loop.

    model = LocalModel.load("SmolLM2-135M-Instruct")
    async with await SwarmClient.connect(settings) as client:
        async for piece in stream_generate(client, model, model.encode_chat(messages)):
            print(piece.text, end="")
    print(piece.result.tokens_per_s)

How tokens are chosen is in ``choosing``; beams and assisted decoding are in ``model``.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from transformers import AutoTokenizer, GenerationConfig

from swarm.catalogue.checkpoint import Checkpoint, resolve_checkpoint
from swarm.client.choosing import ChoiceQueue, TokenChooser
from swarm.client.config import SamplingSettings
from swarm.client.constraints import JsonConstraints
from swarm.client.ends import ModelEnds, read_generation_config, remote_blocks
from swarm.client.remote_blocks import ChainOpener, RemoteBlocks, SessionAdapter
from swarm.client.remote_chain import RemoteChain
from swarm.client.text_stream import IncrementalDetokenizer, StopStrings
from swarm.client.token_logits import TokenLogprob
from swarm.protocol.errors import (
    CheckpointError,
    GenerationInterrupted,
    NetworkError,
    NoRouteError,
    UsageError,
)
from swarm.protocol.tensors import DType, WireTensor
from swarm.routing import ChainPlan


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What was generated, by whom and how fast."""

    text: str
    token_ids: tuple[int, ...]
    """New tokens, an end-of-text token included."""
    finish_reason: str
    """``stop`` (end of text or a stop string) or ``length``."""
    prompt_tokens: int
    time_to_first_token_s: float
    """From the call to the first token; opening the chain included."""
    tokens_per_s: float
    """After the first token; 0 when there was only one."""
    chain_passes: int
    plan: ChainPlan


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Some more text. The last piece of a stream has the ``result``, and maybe no text."""

    text: str
    token_ids: tuple[int, ...] = ()
    result: GenerationResult | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of ``token_ids``, when the settings ask for them."""


class _Answer:
    """An answer in the making: all that is needed to go on with it."""

    def __init__(
        self,
        prompt_ids: list[int],
        limit: int,
        chooser: TokenChooser,
        detokenizer: IncrementalDetokenizer,
        stop_strings: StopStrings,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.chooser = chooser
        self.new_ids: list[int] = []
        self._limit = limit
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings
        self._texts: list[str] = []
        self._started_s = self._first_s = time.perf_counter()
        self._finish_reason = ""

    def add(self, token_id: int, *, is_end: bool) -> TextPiece | None:
        """Add a token; None when it was the last one, then :meth:`last_piece` has it."""
        self.new_ids.append(token_id)
        if len(self.new_ids) == 1:
            self._first_s = time.perf_counter()
        text = self._stop_strings.add(self._detokenizer.add(token_id))
        is_stop = is_end or self._stop_strings.stopped
        is_last = is_stop or len(self.new_ids) >= self._limit
        if is_last:
            text += self._stop_strings.add(self._detokenizer.finish())
            text += self._stop_strings.finish()
            self._finish_reason = "stop" if is_end or self._stop_strings.stopped else "length"
        self._texts.append(text)
        return None if is_last else TextPiece(text, (token_id,), logprobs=self._logprobs())

    def last_piece(self, chain_passes: int, plan: ChainPlan) -> TextPiece:
        """The last token with the whole result."""
        decode_s = time.perf_counter() - self._first_s
        count = len(self.new_ids)
        result = GenerationResult(
            text="".join(self._texts),
            token_ids=tuple(self.new_ids),
            finish_reason=self._finish_reason,
            prompt_tokens=len(self.prompt_ids),
            time_to_first_token_s=self._first_s - self._started_s,
            tokens_per_s=(count - 1) / decode_s if count > 1 else 0.0,
            chain_passes=chain_passes,
            plan=plan,
        )
        return TextPiece(self._texts[-1], (self.new_ids[-1],), result, self._logprobs())

    def _logprobs(self) -> tuple[TokenLogprob, ...]:
        latest = self.chooser.logprob
        return () if latest is None else (latest,)


class LocalModel:
    """What a client holds of a model: tokenizer and ends. One serves any number of sessions."""

    def __init__(
        self,
        ends: ModelEnds,
        blocks_of: Callable[[ChainOpener], RemoteBlocks],
        tokenizer: Any,
        end_token_ids: frozenset[int],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.ends = ends
        self._checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.end_token_ids = end_token_ids
        self.blocks_of = blocks_of
        self.queue = ChoiceQueue(ends)
        self._json = JsonConstraints(tokenizer, int(ends.config.vocab_size), end_token_ids)

    @classmethod
    def load(
        cls, model_name_or_path: str, *, dtype: str = "auto", device: str = "cpu"
    ) -> LocalModel:
        """Read tokenizer, embeddings, norm and head. Blocks for a second: not on an event loop.

        Raises CheckpointError or ConfigError.
        """
        checkpoint = Checkpoint.open(resolve_checkpoint(model_name_or_path))
        ends = ModelEnds.load(checkpoint, dtype=dtype, device=device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read the tokenizer in {checkpoint.path}") from error
        return cls(
            ends,
            partial(remote_blocks, checkpoint=checkpoint, ends=ends, dtype=dtype),
            tokenizer,
            _end_tokens(read_generation_config(checkpoint, ends.config), tokenizer),
            checkpoint,
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """What it was loaded from. Raises UsageError when it was made in memory."""
        if self._checkpoint is None:
            raise UsageError("this model was not loaded from a checkpoint")
        return self._checkpoint

    @property
    def maximum_tokens(self) -> int:
        """Positions that the model was made for."""
        return int(getattr(self.ends.config, "max_position_embeddings", 0) or (1 << 22))

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return list(self.tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation (``role`` and ``content``), ready for the answer.

        Raises UsageError when the model has no chat template.
        """
        if not self.has_chat_template:
            raise UsageError("this model has no chat template; give it plain text (--raw)")
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def chooser(
        self, settings: SamplingSettings, prompt_ids: Sequence[int], wire_dtype: DType
    ) -> TokenChooser:
        """What picks the tokens of one answer."""
        constrain = None
        if settings.json_schema is not None:
            constrain = partial(self._json.follow, settings.json_schema)
        return TokenChooser(self.ends, settings, prompt_ids, wire_dtype, constrain)

    def close(self) -> None:
        """End the thread; sessions must be closed before."""
        self.queue.close()


class TextSession:
    """A session that may outlive one answer: what the hops have cached is not computed again.

    One answer at a time. An async context manager.
    """

    def __init__(
        self,
        client: ChainOpener,
        model: LocalModel,
        maximum_tokens: int,
        *,
        adapter: SessionAdapter | None = None,
    ) -> None:
        """``maximum_tokens`` is what the nodes reserve: prompt and answers together.

        ``adapter`` (see ``client.adapters``) is what the nodes compute with; None: the bare model.
        """
        self._model = model
        self._blocks = model.blocks_of(client).with_adapter(adapter)
        self._maximum_tokens = maximum_tokens
        self._chain: RemoteChain | None = None
        self._cached_ids: list[int] = []
        self._passes_before = 0
        self._answer: _Answer | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Free the session on the nodes; the next answer opens a new one."""
        chain, self._chain = self._chain, None
        self._cached_ids = []
        if chain is not None:
            await chain.close()

    async def stream(
        self, prompt_ids: Sequence[int], settings: SamplingSettings | None = None
    ) -> AsyncGenerator[TextPiece, None]:
        """Continue ``prompt_ids``; the part of it that is cached already is not sent again.

        Raises UsageError for prompts that do not fit, NoRouteError and NetworkError. After
        GenerationInterrupted, :meth:`resume` goes on. After any other error or a cancellation the
        session is closed; the next answer opens a new one.
        """
        settings = settings or SamplingSettings()
        room = min(self._maximum_tokens, self._model.maximum_tokens) - len(prompt_ids)
        if not prompt_ids:
            raise UsageError("the prompt is empty")
        if room < 1:
            raise UsageError(
                f"the prompt has {len(prompt_ids)} tokens; at most "
                f"{len(prompt_ids) + room - 1} fit into this session"
            )
        self._answer = _Answer(
            prompt_ids=list(prompt_ids),
            limit=min(settings.max_new_tokens, room),
            chooser=self._model.chooser(settings, prompt_ids, self._blocks.wire_dtype),
            detokenizer=IncrementalDetokenizer(self._model.decode),
            stop_strings=StopStrings(settings.stop),
        )
        async with aclosing(self.resume()) as pieces:
            async for piece in pieces:
                yield piece

    async def resume(self) -> AsyncGenerator[TextPiece, None]:
        """Go on with an answer that was interrupted: the next token is the one that was due.

        Yields what comes after the last piece. Raises UsageError when there is no such answer, and
        otherwise what :meth:`stream` raises.
        """
        answer = self._answer
        if answer is None:
            raise UsageError("no answer of this session was interrupted")
        known_ids = [*answer.prompt_ids, *answer.new_ids]
        try:
            chain, hidden = await self._pass_prompt(answer.chooser, known_ids)
            while True:
                token_id, activations = await self._model.queue.choose(answer.chooser, hidden)
                piece = answer.add(token_id, is_end=token_id in self._model.end_token_ids)
                if piece is None:
                    break
                yield piece
                position = len(answer.prompt_ids) + len(answer.new_ids) - 1
                hidden = await self._step(chain, activations, position, [token_id])
        except NoRouteError as error:
            if self._chain is None:
                self._answer = None  # it has not even begun
                raise
            known_ids = [*answer.prompt_ids, *answer.new_ids]
            raise GenerationInterrupted(error, (tuple(known_ids),)) from error
        self._answer = None
        yield answer.last_piece(chain.passes - self._passes_before, chain.plan)

    @property
    def plan(self) -> ChainPlan | None:
        """The hops that serve this session now; None while it has none."""
        return None if self._chain is None else self._chain.plan

    def _cached_beginning(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens of the prompt the hops hold already; the last one always goes again."""
        shared = 0
        for cached, wanted in zip(self._cached_ids, prompt_ids[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        return shared

    async def _pass_prompt(
        self, chooser: TokenChooser, prompt_ids: Sequence[int]
    ) -> tuple[RemoteChain, WireTensor]:
        """Pass what is not cached; a chain that died between two answers is replaced once."""
        was_open = self._chain is not None
        try:
            return await self._pass_rest(chooser, prompt_ids)
        except NetworkError:
            if not was_open:
                raise
            return await self._pass_rest(chooser, prompt_ids)

    async def _pass_rest(
        self, chooser: TokenChooser, prompt_ids: Sequence[int]
    ) -> tuple[RemoteChain, WireTensor]:
        start = self._cached_beginning(prompt_ids)
        rest = list(prompt_ids[start:])
        activations = await self._model.queue.compute(partial(chooser.embed, rest))
        if self._chain is None:
            self._chain = await self._blocks.open_chain(rows=1, maximum_tokens=self._maximum_tokens)
        chain = self._chain
        self._passes_before = chain.passes
        return chain, await self._step(chain, activations, start, rest)

    async def _step(
        self, chain: RemoteChain, activations: WireTensor, position: int, ids: list[int]
    ) -> WireTensor:
        try:
            hidden = await chain.step(activations, position, output_tokens=1)
        except NoRouteError:
            raise  # nothing of the step counts, and the chain tries again with the next one
        except BaseException:
            # Failed or cancelled on the way: what the hops have cached is not known any more.
            await self.close()
            raise
        self._cached_ids[position:] = ids
        return hidden


async def stream_generate(
    client: ChainOpener,
    model: LocalModel,
    prompt_ids: Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    adapter: SessionAdapter | None = None,
) -> AsyncGenerator[TextPiece, None]:
    """Generate in a session of its own, which is freed at the end, on errors and on cancellation.

    A consumer that may stop early wraps the stream in ``contextlib.aclosing``.
    """
    settings = settings or SamplingSettings()
    maximum_tokens = min(len(prompt_ids) + settings.max_new_tokens, model.maximum_tokens)
    async with (
        TextSession(client, model, maximum_tokens, adapter=adapter) as session,
        aclosing(session.stream(prompt_ids, settings)) as pieces,
    ):
        async for piece in pieces:
            yield piece


def _end_tokens(generation_config: GenerationConfig, tokenizer: Any) -> frozenset[int]:
    declared = generation_config.eos_token_id
    if declared is None:
        declared = tokenizer.eos_token_id
    if declared is None:
        return frozenset()
    return frozenset([declared] if isinstance(declared, int) else declared)
