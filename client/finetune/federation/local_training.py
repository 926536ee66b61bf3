"""Trains one round of a federation through the swarm, on data that stay on this computer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from swarm.client.finetune.ends import TrainingEnds
from swarm.client.finetune.federated import adapter_names
from swarm.client.finetune.federation.files import Tensors
from swarm.client.finetune.federation.member import Learned
from swarm.client.finetune.federation.terms import FederationTerms
from swarm.client.finetune.model import BaseModel
from swarm.client.finetune.objectives import Objective
from swarm.client.finetune.snapshots import Snapshots
from swarm.client.finetune.trainer import ChainSource, Trainer, TrainingObserver
from swarm.ports import Clock
from swarm.protocol.errors import UsageError


@dataclass(frozen=True, slots=True)
class SwarmTraining:
    """A participant's way to learn; goes on with a round's snapshot if there is one."""

    open_chain: ChainSource
    ends: TrainingEnds
    base: BaseModel
    terms: FederationTerms
    objective: Objective
    clock: Clock
    held_out: Objective | None = None
    data_digest: str = ""
    observer: TrainingObserver | None = None
    micro_batches_in_flight: int = 3
    snapshot_every: int = 50

    async def __call__(self, number: int, before: Tensors, folder: Path) -> Learned:
        """Raises as ``Trainer.run`` does."""
        settings = replace(
            self.terms.round_settings(number),
            micro_batches_in_flight=self.micro_batches_in_flight,
            snapshot_every=self.snapshot_every,
        )
        trainer = Trainer(
            self.open_chain,
            self.ends,
            self.base,
            settings,
            self.objective,
            folder,
            clock=self.clock,
            data_digest=self.data_digest,
            held_out=self.held_out,
            observer=self.observer,
        )
        is_done = await trainer.run(resume=True, beginning=before)
        snapshot = Snapshots(folder).load_latest()
        if not is_done or snapshot is None:
            raise UsageError(f"the training in {folder} has not come to its end")
        names = adapter_names(snapshot.tensors)
        return Learned({name: snapshot.tensors[name] for name in names}, self.objective.size)
