"""The moments at which the matrix of faults strikes, defined by what the client sees; its cases.

A moment belongs to a *stage*: the hop whose node is to be hurt. None of them is a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.faults.network import OFFLINE, Partition
from scripts.faults.processes import Freeze, Kill
from scripts.faults.progress import Event

HEALED_AFTER_TOKENS = 4
"""In moments of healing, a first node of the stage is killed after so many tokens."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The ``count``-th event of a kind.

    ``of_stage``: only events with a node of the stage count, and it is that node which is hurt;
    otherwise it is the node that serves the stage now. ``metric``: not the event itself, but the
    first rise of this metric on the stage's node after it. ``healing``: counted from the death of
    the first node of the stage.
    """

    name: str
    phase: str
    what: str
    message: str = ""
    count: int = 1
    of_stage: bool = False
    metric: str = ""
    speculative: bool = False
    healing: bool = False

    def matches(self, event: Event) -> bool:
        """Whether the event is of this kind; whose it is must be checked apart."""
        return event.what == self.what and (not self.message or event.message == self.message)


PREFILLED = r'swarm_node_steps_total\{kind="prefill"\}'
DECODED = r'swarm_node_steps_total\{kind="decode"\}'

MOMENTS = (
    Moment("before the dial", "open", "dialling", of_stage=True),
    Moment("dialled", "open", "dialled", of_stage=True),
    Moment("session asked for", "open", "sent", "OpenSession", of_stage=True),
    Moment("session opened", "open", "received", "SessionOpened", of_stage=True),
    Moment("routes being set", "open", "sent", "SetRoute"),
    Moment("prompt sent", "prefill", "sent", "Step"),
    Moment("prompt computed", "prefill", "sent", "Step", metric=PREFILLED),
    Moment("prompt answered", "prefill", "received", "StepResult"),
    Moment("first token", "prefill", "token"),
    Moment("second step sent", "decode", "sent", "Step", count=2),
    Moment("step 3 computed", "decode", "sent", "Step", count=3, metric=DECODED),
    Moment("step 5 answered", "decode", "received", "StepResult", count=5),
    Moment("token 8", "decode", "token", count=8),
    Moment("step 15 sent", "decode", "sent", "Step", count=15),
    Moment("first rollback", "rollback", "rollback", speculative=True),
    Moment("second rollback", "rollback", "rollback", count=2, speculative=True),
    Moment("token 12 of speculation", "rollback", "token", count=12, speculative=True),
    Moment("replacement asked", "healing", "sent", "OpenSession", of_stage=True, healing=True),
    Moment(
        "replacement opened", "healing", "received", "SessionOpened", of_stage=True, healing=True
    ),
    Moment("replacement filled", "healing", "received", "Replayed", of_stage=True, healing=True),
)


HALF_FILLED = Moment(
    "replacement half filled", "healing", "received", "Replayed", of_stage=True, healing=True
)
"""With a context of two pieces of replay: the first has come, the second has not."""

DEADLY = (Kill.kind, Freeze.kind, Partition.kind)
"""What no replacement survives."""


@dataclass(frozen=True, slots=True)
class Case:
    """``kind`` strikes the nodes of ``stages`` at ``moment``."""

    kind: str
    moment: Moment
    stages: tuple[int, ...]

    @property
    def label(self) -> str:
        stages = "+".join(str(stage) for stage in self.stages)
        return f"{self.kind} hop {stages}, {self.moment.name}"


def cases(
    kinds: Sequence[str], moments: Sequence[Moment], stages: Sequence[int], *, pairs: bool
) -> list[Case]:
    """All combinations, ordered so that killed nodes have time to come back before their next turn.

    With ``pairs`` also two adjacent hops at once, while a prompt and while tokens pass.
    """
    found = [
        Case(kind, moment, (stage,))
        for kind in kinds
        for moment in moments
        for stage in (stages if kind != OFFLINE else stages[:1])
    ]
    if any(moment.healing for moment in moments):
        found += [
            Case(kind, HALF_FILLED, (stage,))
            for kind in kinds
            if kind in DEADLY
            for stage in stages
        ]
    if pairs:
        chosen = [moment for moment in moments if moment.name in ("prompt sent", "token 8")]
        found += [
            Case(kind, moment, (stage, stage + 1))
            for kind in kinds
            if kind != OFFLINE
            for moment in chosen
            for stage in stages
            if stage + 1 in stages
        ]
    return found


class Trigger:
    """Waits for one moment of one session and then calls ``fire`` once, with its last event.

    ``is_of_stage`` tells whether a peer hosts the stage.
    """

    def __init__(
        self, moment: Moment, is_of_stage: Callable[[Event], bool], fire: Callable[[Event], None]
    ) -> None:
        self._moment = moment
        self._is_of_stage = is_of_stage
        self._fire = fire
        self._seen = 0

    @property
    def has_fired(self) -> bool:
        return self._seen >= self._moment.count

    def hear(self, event: Event) -> None:
        """Take the next event of the session."""
        if self.has_fired or not self._moment.matches(event):
            return
        if self._moment.of_stage and not self._is_of_stage(event):
            return
        self._seen += 1
        if self.has_fired:
            self._fire(event)
