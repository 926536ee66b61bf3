"""What an audit needs of a training session, and what a session needs of audits.

``client.finetune.chain.TrainingChain`` is the session, ``client.finetune.auditing`` the audits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from swarm.client.finetune.chain_request import TrainingChainRequest
from swarm.client.finetune.commitments import MicroBatchRecord
from swarm.client.finetune.link import TrainingLink
from swarm.client.planner import Planner
from swarm.protocol.errors import SwarmError
from swarm.protocol.identity import PeerId


class AuditFailed(SwarmError):
    """A hop's work is not what its blocks compute, or it contradicts itself or others."""


@dataclass(frozen=True, slots=True)
class TakenStep:
    """A step of the optimizer that all hops have taken, and what they said of it.

    Tuples by hop have an entry for each hop of the chain, in the order of their blocks.
    """

    step: int
    scale: float
    learning_rate: float
    micro_batches: tuple[MicroBatchRecord, ...]
    square_sums: tuple[float, ...]
    """By hop: of its gradients."""
    hashes_before: tuple[bytes, ...]
    """By hop: of its state before the step; empty where it is not known."""
    hashes_after: tuple[bytes, ...]


class AuditedTraining(Protocol):
    """A session between two steps."""

    @property
    def request(self) -> TrainingChainRequest: ...

    @property
    def planner(self) -> Planner: ...

    @property
    def links(self) -> Sequence[TrainingLink]: ...

    def refuted(self, peer: PeerId, reason: AuditFailed) -> None:
        """End the session, if the peer is one of its hops."""


class StepAuditor(Protocol):
    """Looks at the steps of trainings."""

    @property
    def wrong(self) -> Collection[PeerId]:
        """Who was found to compute something else: no chain uses them."""

    def watch(self, training: AuditedTraining) -> None:
        """A session has begun; it is ended when a hop of it is found wrong."""

    async def contradicted(
        self, training: AuditedTraining, peers: Sequence[PeerId], step: int, reason: AuditFailed
    ) -> None:
        """One hop contradicts the client, or two contradict each other; the session ends."""

    async def step_taken(self, training: AuditedTraining, taken: TakenStep) -> None:
        """Look at a step, by lot; what takes long goes on beside the training.

        Raises HopFailed when it is clear at once that a hop is wrong.
        """

    async def settled(self) -> None:
        """Wait until no audit runs."""
