"""Runs a training through the swarm from its first step to its last, whatever happens in between.

Rules:

1. What is computed in a step follows from settings, data and the state before it, and from nothing
   else: neither from the chain nor from what failed before.
2. The state after every k-th step is on the client's disk, taken from all hops at the same step.
   When a chain breaks, a new one is opened, restored from the last state, and the steps since are
   done again. So is it when the client itself starts again. No state is kept while an audit of a
   step before it runs; when one finds a hop wrong, the chain breaks.
3. A step counts when all hops have taken it. Losses of steps that are done again are replaced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from swarm.client.finetune.adapter_files import PROMPT, write_adapter
from swarm.client.finetune.beginning import wrong_beginning
from swarm.client.finetune.chain import TrainingChain
from swarm.client.finetune.chain_request import TrainingChainRequest
from swarm.client.finetune.ends import TrainingEnds
from swarm.client.finetune.model import BaseModel, chain_request
from swarm.client.finetune.objectives import Objective
from swarm.client.finetune.settings import FinetuneSettings
from swarm.client.finetune.snapshots import Snapshot, Snapshots
from swarm.client.finetune.steps import StepResult, Steps
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire
from swarm.ports import Clock
from swarm.protocol.errors import NetworkError, NoRouteError, RemoteError, SwarmError, UsageError
from swarm.protocol.tensors import DType, WireTensor

log = logging.getLogger(__name__)

HEAL_S = 180.0
"""How long a training waits for nodes without getting a step further."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0


class ChainSource(Protocol):
    """Opens training chains; ``client.app.SwarmClient`` does it."""

    async def __call__(self, request: TrainingChainRequest) -> TrainingChain: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    step: int
    total_steps: int
    result: StepResult
    duration_s: float


class TrainingObserver:
    """Is told how a training goes; the methods do nothing here."""

    def chain_opened(self, chain: TrainingChain) -> None:
        """A session is open on all hops."""

    def step_done(self, report: StepReport) -> None:
        """All hops have taken a step."""

    def snapshot_taken(self, step: int) -> None:
        """The state after ``step`` is on disk."""

    def went_back(self, step: int, reason: SwarmError) -> None:
        """The chain broke; the training goes on from the state after ``step``."""

    def evaluated(self, step: int, loss: float) -> None:
        """The mean loss of the held-out data."""


class Trainer:
    """One training."""

    def __init__(
        self,
        open_chain: ChainSource,
        ends: TrainingEnds,
        base: BaseModel,
        settings: FinetuneSettings,
        objective: Objective,
        output: Path,
        *,
        clock: Clock,
        data_digest: str = "",
        held_out: Objective | None = None,
        observer: TrainingObserver | None = None,
        heal_s: float = HEAL_S,
    ) -> None:
        self._open_chain = open_chain
        self._ends = ends
        self._base = base
        self._settings = settings
        self._output = output
        self._clock = clock
        self._held_out = held_out
        self._observer = observer or TrainingObserver()
        self._heal_s = heal_s
        self._snapshots = Snapshots(output)
        self._steps = Steps(ends, base, settings, objective)
        self._identity = {
            "model": base.revision.hex(),
            "data": data_digest,
            "settings": settings.fingerprint(),
        }
        self._step = 0
        self._losses: list[float] = []
        self._stopping = False
        longest = (
            objective.longest if held_out is None else max(objective.longest, held_out.longest)
        )
        self._maximum_tokens = max(settings.micro_batch_tokens, longest)

    @property
    def total_steps(self) -> int:
        return self._steps.total

    @property
    def step(self) -> int:
        return self._step

    @property
    def losses(self) -> Sequence[float]:
        """Of the steps so far."""
        return tuple(self._losses)

    def stop(self) -> None:
        """End after the present step with a snapshot, or with the latest one when a chain breaks.

        May be called from any thread.
        """
        self._stopping = True

    async def run(
        self, *, resume: bool = False, beginning: Mapping[str, torch.Tensor] | None = None
    ) -> bool:
        """Train to the end, or until :meth:`stop`; True when all steps are done.

        ``beginning`` is an adapter to start from, by the names of a snapshot; else one is made.
        Raises UsageError when the snapshots belong to another training, NoRouteError when the swarm
        has lacked nodes for too long: what was done is on disk then.
        """
        snapshot = self._snapshots.load_latest() if resume else None
        if snapshot is None:
            self._snapshots.clear()
            if beginning is not None:
                snapshot = Snapshot(0, dict(beginning), (), self._identity)
                await asyncio.to_thread(self._snapshots.save, snapshot)
        else:
            self._check_identity(snapshot)
        try:
            return await self._run(snapshot)
        finally:
            self._steps.close()

    async def _run(self, snapshot: Snapshot | None) -> bool:
        patience = _Patience(self._clock, self._heal_s)
        while True:
            try:
                chain = await self._open_chain(
                    chain_request(self._base, self._settings, self._maximum_tokens)
                )
                try:
                    self._observer.chain_opened(chain)
                    snapshot = await self._begin(chain, snapshot)
                    done = await self._train(chain, snapshot, patience)
                finally:
                    await chain.close()
            except (NetworkError, NoRouteError, RemoteError) as error:
                latest = self._snapshots.load_latest()
                if latest is not None:
                    snapshot = latest
                    self._go_back(snapshot)
                self._observer.went_back(self._step, error)
                if self._stopping:
                    return False
                await patience.wait_or_raise(error)
                continue
            if done is not None:
                return done
            snapshot = self._snapshots.load_latest()

    async def _train(
        self, chain: TrainingChain, snapshot: Snapshot, patience: _Patience
    ) -> bool | None:
        """Steps until the end (True), :meth:`stop` (False), or a node wants to leave (None)."""
        saved = snapshot.step
        if self._step == 0:
            await self._evaluate(chain)
        while self._step < self.total_steps and not self._stopping and not chain.draining:
            await self._train_step(chain, self._step + 1)
            patience.got_on()
            is_last = self._step == self.total_steps
            if self._step % self._settings.snapshot_every == 0 and not is_last:
                await self._save(chain)
                saved = self._step
        if saved != self._step:
            await self._save(chain)
        if self._step < self.total_steps:
            return False if self._stopping else None
        if self._step > 0:
            await self._evaluate(chain)
        self._write_adapter()
        return True

    async def _train_step(self, chain: TrainingChain, step: int) -> None:
        began_s = self._clock.monotonic_s()
        result = await self._steps.take(chain, step)
        self._step = step
        self._losses.append(result.loss)
        duration_s = self._clock.monotonic_s() - began_s
        self._observer.step_done(StepReport(step, self.total_steps, result, duration_s))

    async def _evaluate(self, chain: TrainingChain) -> None:
        if self._held_out is not None:
            loss = await self._steps.evaluate(chain, self._step, self._held_out)
            self._observer.evaluated(self._step, loss)

    # --- states
    async def _begin(self, chain: TrainingChain, snapshot: Snapshot | None) -> Snapshot:
        if snapshot is None:
            return await self._save(chain, is_beginning=True)
        self._go_back(snapshot)
        state = {
            name: tensor_to_wire(tensor.reshape(1, 1, -1), DType.FLOAT32)
            for name, tensor in snapshot.tensors.items()
            if not name.startswith(PROMPT)
        }
        await chain.restore(snapshot.step, state)
        return snapshot

    def _go_back(self, snapshot: Snapshot) -> None:
        self._step = snapshot.step
        self._losses = list(snapshot.losses)
        shapes = self._steps.own.state_shapes()
        self._steps.own.import_state(
            {
                name: tensor.reshape(shapes[name])
                for name, tensor in snapshot.tensors.items()
                if name in shapes
            }
        )

    async def _save(self, chain: TrainingChain, *, is_beginning: bool = False) -> Snapshot:
        await chain.audited()  # a step that is refuted must be in no snapshot
        state = await chain.export_state(self._step)
        tensors = {name: _tensor(wire).reshape(-1) for name, wire in state.items()}
        if is_beginning and (wrong := wrong_beginning(tensors, chain.request.terms)) is not None:
            await chain.begins_wrong(wrong)
        for name, tensor in self._steps.own.export_state().items():
            tensors[name] = tensor.reshape(-1).clone()
        snapshot = Snapshot(self._step, tensors, tuple(self._losses), self._identity)
        await asyncio.to_thread(self._snapshots.save, snapshot)
        self._observer.snapshot_taken(self._step)
        return snapshot

    def _check_identity(self, snapshot: Snapshot) -> None:
        """The same model, data and settings, or the result would be of neither."""
        if snapshot.identity == self._identity:
            return
        before: Mapping[str, Any] = snapshot.identity
        for key, name in (("model", "model"), ("data", "data")):
            if before.get(key) != self._identity[key]:
                raise UsageError(f"{self._output} holds a training with another {name}")
        settings: Mapping[str, Any] = before.get("settings") or {}
        changed = [
            key for key, value in self._settings.fingerprint().items() if settings.get(key) != value
        ]
        raise UsageError(
            f"{self._output} holds a training with other settings: {', '.join(changed)}; "
            "use the same ones, or begin anew without --resume"
        )

    def _write_adapter(self) -> None:
        snapshot = self._snapshots.load_latest()
        if snapshot is None or snapshot.step != self._step:
            raise UsageError(f"the last snapshot in {self._output} is gone")
        write_adapter(
            self._output,
            snapshot.tensors,
            self._settings,
            model_name=self._base.name,
            model_type=self._base.model_type,
            model_revision=self._base.revision,
            model_config=self._ends.config,
        )


class _Patience:
    """For how long a training that gets no further is tried again."""

    def __init__(self, clock: Clock, heal_s: float) -> None:
        self._clock = clock
        self._heal_s = heal_s
        self._got_on_s = clock.monotonic_s()
        self._pause_s = FIRST_PAUSE_S

    def got_on(self) -> None:
        self._got_on_s = self._clock.monotonic_s()
        self._pause_s = FIRST_PAUSE_S

    async def wait_or_raise(self, error: SwarmError) -> None:
        if self._clock.monotonic_s() - self._got_on_s > self._heal_s:
            raise error
        await self._clock.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def _tensor(wire: WireTensor) -> torch.Tensor:
    return tensor_from_wire(wire, torch.float32)
