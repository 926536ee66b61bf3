"""What an aggregator refuses, and how a round goes on without those who do not answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pytest

from swarm.client.finetune.federated import counted_examples
from swarm.client.finetune.federation.messages import (
    RoundState,
    StoredAdapter,
    read_message,
    write_message,
)
from swarm.client.finetune.federation.rounds import MAX_ATTEMPTS, Message, Phase, Round
from swarm.client.finetune.federation.signing import (
    SIGNATURE,
    answer_headers,
    check_answer,
    check_request,
    request_headers,
)
from swarm.client.finetune.federation.terms import FederationTerms, default_minimum
from swarm.client.finetune.secure_sum import Advertised, Participant, Unmasking, Words, encode
from swarm.client.finetune.settings import FinetuneSettings
from swarm.protocol.errors import ErrorCode, NoRouteError, ProtocolError, UsageError
from swarm.protocol.identity import Identity, PeerId

LENGTH = 9
TRAIN_S, ANSWER_S = 100.0, 10.0
MEMBERS = [Identity.generate() for _ in range(3)]
PEERS = [member.peer_id for member in MEMBERS]


def round_id(number: int) -> bytes:
    return bytes([number]) * 16


class Table:
    """One round, its participants, and a clock that the test moves."""

    def __init__(self, minimum: int = 2) -> None:
        self.now_s = 0.0
        self.round = Round(PEERS, minimum, LENGTH, train_s=TRAIN_S, answer_s=ANSWER_S)
        self.round.begin(round_id(1), 0.0)
        self.fresh = 2
        self.participants: dict[PeerId, Participant] = {}

    def advance(self) -> bool:
        changed = self.round.advance(self.now_s, round_id(self.fresh))
        self.fresh += changed
        return changed

    def send(self, member: Identity, message: Message, phase: Phase | None = None) -> None:
        """As it arrives over the wire."""
        phase = phase or self.round.phase
        body = write_message(message)
        arrived = read_message(phase, member.peer_id, body, invited=3, length=LENGTH)
        digest = body.hex()
        self.round.take(member.peer_id, phase, self.round.round_id, digest, arrived, self.now_s)

    def message(self, member: Identity) -> Message:
        """What an honest participant says now."""
        table = self.round.aggregator
        peer = member.peer_id
        match self.round.phase:
            case Phase.ADVERTISE:
                self.participants[peer] = Participant(member, self.round.round_id, PEERS)
                return self.participants[peer].advertise()
            case Phase.SHARE:
                return self.participants[peer].share(table.all_keys())
            case Phase.MASKED:
                return self.participants[peer].masked(vector(member), table.shares_for(peer))
        return self.participants[peer].unmask(table.stayed())

    def all_send(self, members: Sequence[Identity]) -> None:
        for member in members:
            self.send(member, self.message(member))

    def reach(self, phase: Phase, members: Sequence[Identity] = MEMBERS) -> None:
        while self.round.phase is not phase:
            self.all_send(members)
            assert self.advance()


def vector(member: Identity) -> Words:
    place = PEERS.index(member.peer_id) + 1
    return encode(np.append(np.full(LENGTH - 1, place / 8), place), len(PEERS))


def total_of(members: Collection[Identity]) -> Words:
    total: Words = np.zeros(LENGTH, dtype=np.uint64)
    for member in members:
        total += vector(member)
    return total


def refused(code: ErrorCode) -> pytest.RaisesExc[ProtocolError]:
    return pytest.raises(ProtocolError, match=f"^{code.name}:")


def test_all_stay() -> None:
    table = Table()
    table.reach(Phase.SUM)
    assert np.array_equal(table.round.total(), total_of(MEMBERS))
    assert counted_examples(table.round.total()) == 6
    assert not table.advance()


@pytest.mark.parametrize("phase", [Phase.SHARE, Phase.MASKED, Phase.UNMASK])
def test_who_does_not_answer_in_time_has_dropped_out(phase: Phase) -> None:
    table = Table()
    table.reach(phase)
    stay = MEMBERS[:2]
    table.all_send(stay)
    late = table.message(MEMBERS[2])
    table.now_s += ANSWER_S - 1
    assert not table.advance()  # there is time left
    table.now_s += 1
    with refused(ErrorCode.NOT_VALID_NOW):
        table.send(MEMBERS[2], late)
    assert table.advance()
    with refused(ErrorCode.NOT_VALID_NOW):
        table.send(MEMBERS[2], late, phase)
    table.reach(Phase.SUM, stay)
    # A vector that is there already counts, also without its owner.
    counted = MEMBERS if phase is Phase.UNMASK else stay
    assert np.array_equal(table.round.total(), total_of(counted))


@pytest.mark.parametrize("phase", [Phase.SHARE, Phase.MASKED, Phase.UNMASK])
def test_too_few_answer_and_the_round_is_repeated_without_the_others(phase: Phase) -> None:
    table = Table()
    table.reach(phase)
    before = table.round.round_id
    table.all_send(MEMBERS[:1])
    table.now_s += ANSWER_S
    assert table.advance()
    assert table.round.attempts == 2
    assert table.round.phase is Phase.ADVERTISE
    assert table.round.round_id != before
    table.all_send(MEMBERS[:1])
    assert not table.advance()  # one alone is never enough: others are waited for again
    table.all_send(MEMBERS[1:2])
    table.now_s += TRAIN_S
    assert table.advance()
    table.reach(Phase.SUM, MEMBERS[:2])
    assert np.array_equal(table.round.total(), total_of(MEMBERS[:2]))


def test_trainings_are_waited_for() -> None:
    table = Table()
    table.all_send(MEMBERS[:1])
    for _ in range(3):
        table.now_s += TRAIN_S
        assert not table.advance()
    assert table.round.attempts == 1
    table.all_send(MEMBERS[1:])
    assert table.advance()
    assert table.round.phase is Phase.SHARE


def test_a_minimum_above_the_threshold() -> None:
    table = Table(minimum=3)
    table.reach(Phase.MASKED)
    table.all_send(MEMBERS[:2])
    table.now_s += ANSWER_S
    assert table.advance()
    assert table.round.phase is Phase.ADVERTISE
    assert table.round.attempts == 2


def test_a_round_that_always_fails_ends() -> None:
    table = Table()
    for _ in range(MAX_ATTEMPTS - 1):
        table.reach(Phase.SHARE)
        table.now_s += ANSWER_S
        table.advance()
    table.reach(Phase.SHARE)
    table.now_s += ANSWER_S
    with pytest.raises(NoRouteError):
        table.advance()


def test_the_same_again_changes_nothing_and_another_is_refused() -> None:
    table = Table()
    for member in MEMBERS:
        message = table.message(member)
        table.send(member, message)
        table.send(member, message)
    with refused(ErrorCode.EQUIVOCATION):
        table.send(MEMBERS[0], Participant(MEMBERS[0], round_id(1), PEERS).advertise())
    table.advance()
    first = [table.message(member) for member in MEMBERS]
    for member, message in zip(MEMBERS, first, strict=True):
        table.send(member, message)
    table.advance()
    for member in MEMBERS:
        words = table.message(member)
        table.send(member, words)
        table.send(member, words)
    table.send(MEMBERS[0], first[0], Phase.SHARE)  # its answer was lost: still known
    with refused(ErrorCode.EQUIVOCATION):
        table.send(MEMBERS[0], np.zeros(LENGTH, dtype=np.uint64))
    table.advance()
    table.reach(Phase.SUM)
    assert np.array_equal(table.round.total(), total_of(MEMBERS))


def test_strangers_and_other_rounds() -> None:
    table = Table()
    stranger = Identity.generate()
    keys = Participant(stranger, round_id(1), [*PEERS, stranger.peer_id]).advertise()
    with refused(ErrorCode.NOT_NAMED_BY_SESSION):
        table.send(stranger, keys)
    message = table.message(MEMBERS[0])
    with refused(ErrorCode.NOT_VALID_NOW):
        table.round.take(PEERS[0], Phase.ADVERTISE, round_id(9), "", message, 0.0)
    # Keys of another one, or of another round, under one's own name
    for signed in (message, Participant(MEMBERS[1], round_id(9), PEERS).advertise()):
        with refused(ErrorCode.BAD_FIELD):
            table.send(MEMBERS[1], signed)
    assert table.round.answered == 0


def test_who_has_not_advertised_has_no_say_later() -> None:
    table = Table()
    table.all_send(MEMBERS[:2])
    table.now_s += TRAIN_S
    table.advance()
    shares = {peer: bytes(148) for peer in PEERS}
    with refused(ErrorCode.UNEXPECTED_MESSAGE):
        table.send(MEMBERS[2], shares)


def test_keys_that_nobody_can_use() -> None:
    table = Table()
    member = MEMBERS[0]
    low_order = bytes(32)
    signature = member.sign(b"federated keys v1", round_id(1) + low_order + low_order)
    with refused(ErrorCode.BAD_FIELD):
        table.send(member, Advertised(member.peer_id, low_order, low_order, signature))


@pytest.mark.parametrize("length", [0, LENGTH - 1, LENGTH + 1])
def test_vectors_of_another_length(length: int) -> None:
    table = Table()
    table.reach(Phase.MASKED)
    with refused(ErrorCode.BAD_TENSOR):
        table.send(MEMBERS[0], np.zeros(length, dtype=np.uint64))


def test_unmasking_of_others_than_stayed() -> None:
    table = Table()
    table.reach(Phase.UNMASK)
    honest = table.message(MEMBERS[0])
    assert isinstance(honest, Unmasking)
    own = honest.own_mask_shares
    for bad in (
        Unmasking({PEERS[0]: own[PEERS[0]]}, {}),
        Unmasking(own, {PEERS[1]: own[PEERS[1]]}),
        Unmasking({}, own),
    ):
        with refused(ErrorCode.BAD_FIELD):
            table.send(MEMBERS[0], bad)


def test_shares_of_another_secret_do_not_pass_for_a_sum() -> None:
    table = Table()
    table.reach(Phase.UNMASK)
    for member in MEMBERS:
        honest = table.message(member)
        assert isinstance(honest, Unmasking)
        wrong = {peer: bytes(65) + b"\1" for peer in honest.own_mask_shares}
        table.send(member, Unmasking(wrong if member is MEMBERS[0] else honest.own_mask_shares, {}))
    table.advance()
    with pytest.raises(ProtocolError):
        counted_examples(table.round.total())
    table.round.repeat(table.round.stayed, table.now_s, round_id(9))
    table.reach(Phase.SUM)
    assert np.array_equal(table.round.total(), total_of(MEMBERS))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b"7", b'{"shares": 3}', b'{"shares": {"a": "zz"}}', b"x" * 9999],
)
def test_bodies_of_nonsense(body: bytes) -> None:
    for phase in (Phase.ADVERTISE, Phase.SHARE, Phase.MASKED, Phase.UNMASK):
        with pytest.raises(ProtocolError):
            read_message(phase, PEERS[0], body, invited=3, length=LENGTH)


def test_requests_are_worth_nothing_elsewhere() -> None:
    member, federation = MEMBERS[0], bytes(16)
    path, body = "/v1/rounds/00/share", b"body"
    headers = request_headers(member, federation, "POST", path, body, 1000)

    def check(
        federation_id: bytes = federation, method: str = "POST", at: str = path, now: float = 1000
    ) -> None:
        check_request(headers, federation_id, PEERS, method, at, now)

    check()
    for different in (
        {"federation_id": bytes([1]) * 16},
        {"method": "GET"},
        {"at": "/v1/rounds/01/share"},
        {"at": "/v1/rounds/00/unmask"},
    ):
        with refused(ErrorCode.BAD_SIGNATURE):
            check(**different)
    with refused(ErrorCode.NOT_VALID_NOW):
        check(now=2000)
    with refused(ErrorCode.NOT_NAMED_BY_SESSION):
        check_request(headers, federation, PEERS[1:], "POST", path, 1000)
    with refused(ErrorCode.BAD_FIELD):
        check_request({"Swarm-Peer": PEERS[0]}, federation, PEERS, "POST", path, 1000)
    answer = answer_headers(MEMBERS[1], headers[SIGNATURE], b"yes")
    check_answer(answer, PEERS[1], headers[SIGNATURE], b"yes")
    for aggregator, request, content in (
        (PEERS[2], headers[SIGNATURE], b"yes"),
        (PEERS[1], "another", b"yes"),
        (PEERS[1], headers[SIGNATURE], b"no"),
    ):
        with refused(ErrorCode.BAD_SIGNATURE):
            check_answer(answer, aggregator, request, content)


def make_terms(**changes: object) -> FederationTerms:
    given: dict[str, object] = {
        "federation_id": bytes(16),
        "aggregator": PEERS[0],
        "model": "tiny",
        "model_revision": bytes(32),
        "recipe": FinetuneSettings(target_modules=("q_proj",)),
        "invited": tuple(PEERS),
        "rounds": 3,
        "minimum": default_minimum(3),
        "train_s": TRAIN_S,
        "answer_s": ANSWER_S,
    }
    return FederationTerms(**given | changes)  # type: ignore[arg-type]


def test_terms_and_states_pass_the_wire() -> None:
    terms = make_terms()
    again = FederationTerms.from_json(terms.to_json())
    assert again.recipe.fingerprint() == terms.recipe.fingerprint()
    assert again.invited == terms.invited
    table = Table()
    table.reach(Phase.SHARE)
    keys = tuple(table.round.aggregator.all_keys())
    stored = StoredAdapter("0" * 64, 100)
    state = RoundState("v", 2, 1, round_id(1), Phase.SHARE, stored, keys, {}, tuple(PEERS))
    assert RoundState.from_json(state.to_json(), 3) == state


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"round": 2', b'"round": -2'),
        (b'"phase": "masked"', b'"phase": "party"'),
        (b'"size_bytes": 100', b'"size_bytes": 1000000000000'),
        (b'"sha256": "00', b'"sha256": "zz'),
        (b'"keys": []', b'"keys": [{}]'),
        (b'"keys": []', b'"keys": 1'),
        (b'"shares": {}', b'"shares": {"somebody": "00"}'),
        (b'"shares": {}', b'"shares": []'),
        (b'"stayed": []', b'"stayed": [[]]'),
        (b'"stayed": []', b'"stayed": ' + b"[" * 9 + b"]" * 9),
        (b'"version": "v"', b'"version": "' + b"v" * 200 + b'"'),
        (b'"version": "v"', b'"version": "v&after=w"'),
    ],
)
def test_states_of_a_hostile_aggregator(old: bytes, new: bytes) -> None:
    stored = StoredAdapter("0" * 64, 100)
    good = RoundState("v", 2, 1, round_id(1), Phase.MASKED, stored).to_json()
    assert RoundState.from_json(good, 3).number == 2
    assert old in good
    with pytest.raises(ProtocolError):
        RoundState.from_json(good.replace(old, new), 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"invited": (PEERS[0],)},
        {"invited": (PEERS[0], PEERS[0])},
        {"invited": (PEERS[0], PeerId("nobody"))},
        {"minimum": 1},
        {"minimum": 4},
        {"rounds": 0},
        {"recipe": FinetuneSettings(method="prompt", target_modules=("q_proj",))},
    ],
)
def test_terms_without_sense(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        make_terms(**changes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"epochs": 1', b'"epochs": 100000'),
        (b'"rank": 16', b'"rank": "16"'),
        (b'"rank": 16', b'"rank": true'),
        (b'"rounds": 3', b'"rounds": 3.5'),
        (b'"train_s": 100.0', b'"train_s": 1e999'),
        (b'"q_proj"', b"7"),
    ],
)
def test_terms_of_a_hostile_aggregator(old: bytes, new: bytes) -> None:
    good = make_terms().to_json()
    assert old in good
    with pytest.raises(ProtocolError):
        FederationTerms.from_json(good.replace(old, new))
