"""What users notice: blocks that nobody serves, probes that fail, many nodes gone at once; pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from swarm.status.snapshot import Incident, ModelStatus

FEWEST_LOST = 3
LOST_SHARE = 0.2
"""So large a part of the nodes gone between two looks is an incident, whatever it breaks."""
MOST_SPANS_NAMED = 6


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong now; the incident of the same kind and model stays open while it is found."""

    kind: str
    revision: str = ""
    model_name: str = ""
    detail: str = ""


def findings(models: Iterable[ModelStatus]) -> list[Finding]:
    """What is wrong with the models."""
    found = []
    for model in models:
        missing = [block for block, count in enumerate(model.replicas) if not count]
        if missing:
            spans = named_blocks(missing)
            found.append(Finding("blocks_missing", model.revision, model.name, spans))
        elif model.probe is not None and not model.probe.succeeded:
            problem = model.probe.problem
            found.append(Finding("probe_failing", model.revision, model.name, problem))
    return found


def changes(
    open_incidents: Sequence[Incident], found: Sequence[Finding]
) -> tuple[list[Finding], list[tuple[Incident, Finding]], list[Incident]]:
    """Findings that are new, incidents that go on, and those that are over.

    While the page is blind nothing else ends: it cannot know.
    """
    now = {(finding.kind, finding.revision): finding for finding in found}
    known = {(incident.kind, incident.revision): incident for incident in open_incidents}
    opened = [finding for key, finding in now.items() if key not in known]
    going_on = [(incident, now[key]) for key, incident in known.items() if key in now]
    blind = any(finding.kind == "page_blind" for finding in found)
    ended = [] if blind else [incident for key, incident in known.items() if key not in now]
    return opened, going_on, ended


def is_mass_loss(lost: int, before: int) -> bool:
    """Whether so many nodes going without a word, of those before, is an incident."""
    return lost >= FEWEST_LOST and lost >= LOST_SHARE * before


def named_blocks(blocks: Iterable[int]) -> str:
    """``0-9, 12``; long lists end with an ellipsis."""
    spans = []
    for _, group in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        members = [block for _, block in group]
        spans.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    named = spans[:MOST_SPANS_NAMED]
    return ", ".join(named + ["…"] * (len(spans) > MOST_SPANS_NAMED))
