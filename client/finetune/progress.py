"""What a user sees of a training: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from swarm.client.finetune.chain import TrainingChain
from swarm.client.finetune.trainer import StepReport, TrainingObserver
from swarm.client.output import explain, note
from swarm.protocol.errors import SwarmError

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY = 10
_SPEED_STEPS = 20


class Speed:
    """Tokens per second and time left, from the latest steps. Pure."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=_SPEED_STEPS)
        self.tokens = 0
        self.duration_s = 0.0

    def add(self, tokens: int, duration_s: float) -> None:
        self._recent.append((tokens, duration_s))
        self.tokens += tokens
        self.duration_s += duration_s

    @property
    def tokens_per_s(self) -> float:
        took_s = sum(duration_s for _, duration_s in self._recent)
        return sum(tokens for tokens, _ in self._recent) / took_s if took_s else 0.0

    def left_s(self, steps: int) -> float:
        """For so many more steps like the latest ones."""
        if not self._recent:
            return 0.0
        return steps * sum(duration_s for _, duration_s in self._recent) / len(self._recent)


class Watcher(TrainingObserver):
    """Shows people how it goes; ``quiet`` says nothing."""

    def __init__(self, progress: Progress | None, *, quiet: bool) -> None:
        self._progress = progress
        self._quiet = quiet
        self._task = progress.add_task("training", total=None) if progress is not None else None
        self.speed = Speed()
        self.held_out: dict[int, float] = {}
        self.went_back_times = 0

    def chain_opened(self, chain: TrainingChain) -> None:
        hops = " > ".join(
            f"{hop.display_name or hop.peer_id[-6:]} ({hop.first_block}-{hop.end_block - 1})"
            for hop in chain.plan.hops
        )
        self._say(f"training through {hops}")

    def step_done(self, report: StepReport) -> None:
        self.speed.add(report.result.tokens, report.duration_s)
        left = readable_time(self.speed.left_s(report.total_steps - report.step))
        text = f"loss {report.result.loss:.4f}  {self.speed.tokens_per_s:.0f} tokens/s  {left} left"
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task,
                total=report.total_steps,
                completed=report.step,
                description=text,
            )
        elif report.step % LINE_EVERY == 0 or report.step in (1, report.total_steps):
            self._say(f"step {report.step}/{report.total_steps}  {text}")

    def went_back(self, step: int, reason: SwarmError) -> None:
        self.went_back_times += 1
        self._say(f"{explain(reason)}; going on from step {step}")

    def evaluated(self, step: int, loss: float) -> None:
        self.held_out[step] = loss
        self._say(f"held-out loss after step {step}: {loss:.4f}")

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)
        else:
            note(text)


def readable_time(duration_s: float) -> str:
    """``3:07`` or ``1:02:45``."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
