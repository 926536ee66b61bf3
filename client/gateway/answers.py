"""Answers of the swarm to one request: ``n`` sessions at a time, their pieces as they come.

Sessions are freed on the nodes when the request ends, however it ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from swarm.client.adapter_push import AdapterSource
from swarm.client.config import SamplingSettings
from swarm.client.gateway.errors import ApiError, from_swarm, internal_error
from swarm.client.generate import LocalModel, TextPiece, TextSession
from swarm.client.remote_blocks import ChainOpener
from swarm.protocol.errors import GenerationInterrupted, SwarmError
from swarm.routing import ChainPlan

log = logging.getLogger(__name__)

QUEUED_PIECES = 64
"""Pieces that wait for a slow reader; then its sessions wait as well."""
RESUME_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class Question:
    """One request, ready for the swarm."""

    model: LocalModel
    prompt_ids: list[int]
    settings: SamplingSettings
    choices: int
    adapter: AdapterSource | None
    patience_s: float
    """How long to wait for blocks that the swarm lost in mid-answer."""
    tells_plan: bool = False
    """Whether events say who serves the answer; a plan is made anew each time that one asks."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to one choice: a piece of text, or an end by ``failure``."""

    index: int
    piece: TextPiece | None = None
    plan: ChainPlan | None = None
    """Who serves the choice, if the question wants to know."""
    failure: ApiError | None = None

    @property
    def is_last(self) -> bool:
        return self.failure is not None or (
            self.piece is not None and self.piece.result is not None
        )


@asynccontextmanager
async def answering(client: ChainOpener, question: Question) -> AsyncIterator[asyncio.Queue[Event]]:
    """A queue of what happens, which ends with a last event for each choice.

    Leaving the block ends what still runs, and waits until its sessions are closed.
    """
    queue: asyncio.Queue[Event] = asyncio.Queue(QUEUED_PIECES)
    tasks = [
        asyncio.create_task(_follow(client, question, index, queue))
        for index in range(question.choices)
    ]
    try:
        yield queue
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(
    client: ChainOpener, question: Question, index: int, queue: asyncio.Queue[Event]
) -> None:
    settings = question.settings
    if settings.seed is not None and index:
        settings = replace(settings, seed=(settings.seed + index) % (1 << 63))
    try:
        async with aclosing(_pieces(client, question, settings)) as pieces:
            async for piece, plan in pieces:
                await queue.put(Event(index, piece, plan))
    except SwarmError as error:
        await queue.put(Event(index, failure=from_swarm(error)))
    except Exception as error:  # one answer's bug is not the end of the others
        log_bug("an answer", error)
        await queue.put(Event(index, failure=internal_error()))


async def _pieces(
    client: ChainOpener, question: Question, settings: SamplingSettings
) -> AsyncGenerator[tuple[TextPiece, ChainPlan | None], None]:
    """The pieces of one answer; lost blocks are waited for."""
    model = question.model
    maximum_tokens = min(len(question.prompt_ids) + settings.max_new_tokens, model.maximum_tokens)
    async with TextSession(client, model, maximum_tokens, adapter=question.adapter) as session:
        stream = session.stream(question.prompt_ids, settings)
        lost_since_s: float | None = None
        while True:
            try:
                async with aclosing(stream) as pieces:
                    async for piece in pieces:
                        lost_since_s = None
                        yield piece, session.plan if question.tells_plan else None
                return
            except GenerationInterrupted:
                now_s = time.monotonic()
                lost_since_s = lost_since_s or now_s
                if now_s - lost_since_s >= question.patience_s:
                    raise
            await asyncio.sleep(RESUME_PERIOD_S)
            stream = session.resume()


def log_bug(what: str, error: BaseException) -> None:
    """Where it happened, without the error's text: that may hold somebody's words."""
    frames: list[str] = []
    trace: Any = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    log.error("%s failed by a bug: %s at %s", what, type(error).__name__, " < ".join(frames[::-1]))
