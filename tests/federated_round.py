"""One round of secure aggregation in one process, with participants who leave at chosen moments."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from swarm.client.finetune.secure_sum import Aggregator, Participant, Words
from swarm.protocol.identity import Identity, PeerId

ROUND = b"round 7"


def run_round(
    vectors: Mapping[Identity, Words],
    *,
    leave_before_masked: Collection[Identity] = (),
    leave_before_unmasking: Collection[Identity] = (),
) -> tuple[Words, dict[PeerId, Words]]:
    """The sum, and what the aggregator saw of each participant."""
    length = len(next(iter(vectors.values())))
    invited = [identity.peer_id for identity in vectors]
    aggregator = Aggregator(ROUND, invited, length)
    participants = {identity: Participant(identity, ROUND, invited) for identity in vectors}
    for participant in participants.values():
        aggregator.add_keys(participant.advertise())
    for identity, participant in participants.items():
        aggregator.add_shares(identity.peer_id, participant.share(aggregator.all_keys()))
    seen: dict[PeerId, Words] = {}
    for identity, participant in participants.items():
        if identity in leave_before_masked:
            continue
        received = aggregator.shares_for(identity.peer_id)
        seen[identity.peer_id] = participant.masked(vectors[identity], received)
        aggregator.add_masked(identity.peer_id, seen[identity.peer_id])
    stayed = aggregator.stayed()
    unmaskings = {
        identity.peer_id: participant.unmask(stayed)
        for identity, participant in participants.items()
        if identity not in leave_before_masked and identity not in leave_before_unmasking
    }
    return aggregator.total(unmaskings), seen
