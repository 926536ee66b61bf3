"""From the last hop's activations to the next token: head, samplers, embedding.

``TokenChooser`` holds what one answer needs (samplers, seed, tokens so far); ``ChoiceQueue`` runs
the head for all answers that wait, in one product. At one row the head of a small model costs as
much as several of its blocks, at eight rows hardly more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from swarm.client.config import SamplingSettings
from swarm.client.constraints import Constraint
from swarm.client.ends import ModelEnds
from swarm.client.token_logits import TokenLogprob, logits_processors, token_logprob
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.protocol.tensors import DType, WireTensor

Value = TypeVar("Value")

ACTIVE_S = 0.5
"""An answer whose latest token is younger is worth waiting for."""
GATHER_GAP = 0.3
"""How long to wait for one more result, as a share of the time that the head took last."""


class TokenChooser:
    """Picks the tokens of one answer. All methods are torch work for the queue's thread.

    The samplers are transformers' own, in the order in which ``generate`` applies them: the same
    seed gives the same tokens.
    """

    def __init__(
        self,
        ends: ModelEnds,
        settings: SamplingSettings,
        prompt_ids: Sequence[int],
        wire_dtype: DType,
        constrain: Callable[[], Constraint] | None = None,
    ) -> None:
        """``constrain`` is called once, on the thread, before the first token is chosen."""
        self.logprob: TokenLogprob | None = None
        """Of the token chosen last, when the settings ask for it."""
        self._ends = ends
        self._wire_dtype = wire_dtype
        self._samples = settings.samples
        self._processors = logits_processors(settings, len(prompt_ids))
        self._top_logprobs = settings.top_logprobs
        self._constrain = constrain
        self._constraint: Constraint | None = None
        self._generator = torch.Generator()
        if settings.seed is not None:
            self._generator.manual_seed(settings.seed)
        elif self._samples:
            self._generator.seed()
        self._ids = torch.tensor([list(prompt_ids)])

    def embed(self, token_ids: Sequence[int]) -> WireTensor:
        """``[1, tokens, hidden]`` for the first hop."""
        ids = torch.tensor([list(token_ids)], device=self._ends.device)
        return tensor_to_wire(self._ends.embed(ids), self._wire_dtype)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor) -> tuple[int, WireTensor]:
        """The token for ``logits`` ``[1, vocabulary]``, and its embedding for the next step."""
        logits = logits.to("cpu", torch.float32)
        scores = self._processors(self._ids, self._constrained(logits))
        if self._samples:
            probabilities = torch.softmax(scores, dim=-1)
            chosen = torch.multinomial(probabilities, 1, generator=self._generator)
        else:
            chosen = scores.argmax(dim=-1, keepdim=True)
        if self._processors:
            self._ids = torch.cat([self._ids, chosen], dim=-1)
        token_id = int(chosen)
        if self._constraint is not None:
            self._constraint.add(token_id)
        if self._top_logprobs is not None:
            self.logprob = token_logprob(logits, token_id, self._top_logprobs)
        return token_id, self.embed([token_id])

    def _constrained(self, logits: torch.Tensor) -> torch.Tensor:
        if self._constraint is None:
            if self._constrain is None:
                return logits
            self._constraint = self._constrain()
        allowed = self._constraint.allowed()[: logits.shape[-1]]
        return logits.masked_fill(~allowed, -torch.inf)


@dataclass(slots=True, eq=False)
class _Choice:
    chooser: TokenChooser
    hidden: WireTensor
    outcome: tuple[int, WireTensor] | Exception | None = None


class ChoiceQueue:
    """Runs torch work of a client on one thread, and the choices that wait together as one."""

    def __init__(self, ends: ModelEnds) -> None:
        self._ends = ends
        # One thread: never on more cores than torch was given, and off the event loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="swarm-head")
        self._waiting: list[_Choice] = []
        self._turn = asyncio.Lock()
        self._last_choices: dict[int, float] = {}
        self._last_duration_s = 0.0

    def close(self) -> None:
        """End the thread; sessions must be closed before."""
        self._thread.shutdown()

    async def compute(self, work: Callable[[], Value]) -> Value:
        """Run other torch work on the same thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def choose(self, chooser: TokenChooser, hidden: WireTensor) -> tuple[int, WireTensor]:
        """The token after ``hidden`` ``[1, 1, hidden]``, and its embedding for the next step.

        Whoever gets the turn computes for all who wait; the others find their outcome ready.
        """
        choice = _Choice(chooser, hidden)
        self._waiting.append(choice)
        self._last_choices[id(chooser)] = time.perf_counter()
        try:
            async with self._turn:
                if choice.outcome is None:
                    await self._gather()
                    batch, self._waiting = self._waiting, []
                    try:
                        await self.compute(lambda: self._choose_all(batch))
                    finally:
                        # After a cancellation the thread may be at it still: those without an
                        # outcome come again, and are skipped should they have one by then.
                        self._waiting += [
                            other
                            for other in batch
                            if other.outcome is None and other is not choice
                        ]
        finally:
            if choice in self._waiting:
                self._waiting.remove(choice)
        if isinstance(choice.outcome, Exception):
            raise choice.outcome
        if choice.outcome is None:
            raise RuntimeError("a choice was neither computed nor refused")
        return choice.outcome

    async def _gather(self) -> None:
        """Wait while results keep coming in: those of one batch of the nodes come in a row.

        A lone answer never waits.
        """
        since = time.perf_counter() - ACTIVE_S
        self._last_choices = {key: at for key, at in self._last_choices.items() if at > since}
        here = 0
        while here < len(self._waiting) < len(self._last_choices):
            here = len(self._waiting)
            await asyncio.sleep(GATHER_GAP * self._last_duration_s)

    @torch.inference_mode()
    def _choose_all(self, batch: Sequence[_Choice]) -> None:
        """On the thread: one head for all, then each one's own samplers."""
        batch = [choice for choice in batch if choice.outcome is None]
        if not batch:
            return
        started_s = time.perf_counter()
        try:
            rows = [
                tensor_from_wire(choice.hidden, self._ends.dtype, self._ends.device)
                for choice in batch
            ]
            logits = self._ends.logits(torch.cat(rows))[:, -1]
        except Exception as error:  # concerns all; raised where each of them waits
            for choice in batch:
                choice.outcome = error
            return
        for row, choice in enumerate(batch):
            try:
                choice.outcome = choice.chooser.choose(logits[row : row + 1])
            except Exception as error:  # concerns this one
                choice.outcome = error
        self._last_duration_s = time.perf_counter() - started_s
