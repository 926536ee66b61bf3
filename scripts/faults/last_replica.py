"""The last replica of some blocks dies: a clear error soon, and later the answer goes on."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from scripts.faults.answers import Task
from scripts.faults.arena import Arena
from scripts.faults.sessions import Watched
from swarm.client.config import SamplingSettings
from swarm.protocol.errors import NoRouteError

STRIKE_AFTER_TOKENS = 5
ERROR_LIMIT_S = 10.0
ANSWER_TIMEOUT_S = 60.0


@dataclass(slots=True)
class LastReplica:
    """What a user saw; all is good when ``problems`` is empty."""

    error: str = ""
    error_after_s: float | None = None
    """From the death of the last replica."""
    problems: list[str] = field(default_factory=list)


async def lose_all_replicas(
    arena: Arena, watched: Watched, task: Task, stage: int, kind: str = "kill"
) -> LastReplica:
    """Hurt all nodes of a stage in the middle of an answer; mend them; let the answer go on."""
    seen = LastReplica()
    await arena.mended()
    span = arena.span(stage)
    tokens: list[int] = []
    struck_s = 0.0
    settings = SamplingSettings(max_new_tokens=len(task.answer))
    async with watched.text_session(task) as session:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                async for piece in session.stream(task.prompt, settings):
                    tokens += piece.token_ids
                    if len(tokens) >= STRIKE_AFTER_TOKENS and not struck_s:
                        struck_s = max(arena.hurt(one, kind) for one in arena.live(stage))
        except NoRouteError as error:
            seen.error = str(error)
            seen.error_after_s = time.monotonic() - struck_s
            if seen.error_after_s > ERROR_LIMIT_S:
                seen.problems.append(f"the error came after {seen.error_after_s:.1f} s")
            blocks = tuple(range(span.first_block, span.end_block))
            if error.missing_blocks != blocks:
                seen.problems.append(f"the error names blocks {error.missing_blocks}")
            if f"{span.first_block}-{span.end_block - 1}" not in seen.error:
                seen.problems.append(f"the error does not say which blocks: {seen.error}")
        except TimeoutError:
            seen.problems.append("neither an answer nor an error came")
        else:
            seen.problems.append("the answer went on although nobody had the blocks")
        for fighter in [one for one in arena.fighters.values() if one.stage == stage]:
            arena.mend_soon(fighter)
        await arena.wait_for_live(stage, 1)
        left = SamplingSettings(max_new_tokens=len(task.answer) - len(tokens))
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            async for piece in session.stream([*task.prompt, *tokens], left):
                tokens += piece.token_ids
    if tuple(tokens) != task.answer:
        seen.problems.append("the resumed answer is not that of the model")
    return seen
