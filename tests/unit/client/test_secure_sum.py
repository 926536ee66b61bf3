"""Masks cancel to the last bit, whoever drops out; one vector alone looks like noise."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest

from swarm.client.finetune.secure_sum import Aggregator, Participant, Words, decode, encode
from swarm.client.finetune.shamir import join_secret, split_secret
from swarm.protocol.errors import NoRouteError, ProtocolError, UsageError
from swarm.protocol.identity import Identity
from tests.federated_round import ROUND, run_round

LENGTH = 4096


def make_vectors(count: int) -> dict[Identity, Words]:
    """Small updates, as an adapter's are: hardly random when looked at as bytes."""
    dice = np.random.default_rng(1)
    return {Identity.generate(): encode(dice.normal(0, 1e-3, LENGTH), count) for _ in range(count)}


def exact_sum(vectors: dict[Identity, Words], without: set[Identity]) -> Words:
    total: Words = np.zeros(LENGTH, dtype=np.uint64)
    for identity, vector in vectors.items():
        if identity not in without:
            total += vector
    return total


def bit_balance(words: Words) -> float:
    """How far the share of ones among all bits is from a half, in standard deviations."""
    bits = np.unpackbits(words.view(np.uint8))
    return float((bits.mean() - 0.5) / (0.5 / len(bits) ** 0.5))


def chi_square(words: Words) -> float:
    """Of the bytes against even odds, in standard deviations from what noise would give."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / (2 * 255) ** 0.5)


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_the_sum_is_exact_whoever_leaves(leaving: int) -> None:
    vectors = make_vectors(5)
    gone = set(itertools.islice(vectors, leaving))
    total, _ = run_round(vectors, leave_before_masked=gone)
    assert np.array_equal(total, exact_sum(vectors, gone))


def test_leaving_after_the_vector_is_counted_still() -> None:
    vectors = make_vectors(3)
    first, second, _ = vectors
    total, _ = run_round(vectors, leave_before_unmasking=[second])
    assert np.array_equal(total, exact_sum(vectors, set()))
    with pytest.raises(NoRouteError):  # one alone cannot take the masks away
        run_round(vectors, leave_before_unmasking=[first, second])
    with pytest.raises(NoRouteError):
        run_round(vectors, leave_before_masked=[first, second])


def test_one_vector_looks_like_noise() -> None:
    vectors = make_vectors(3)
    total, seen = run_round(vectors)
    for identity, plain in vectors.items():
        assert chi_square(plain) > 1000  # the test does tell an update from noise
        masked = seen[identity.peer_id]
        assert abs(bit_balance(masked)) < 5
        assert abs(chi_square(masked)) < 6
        correlation = np.corrcoef(masked.astype(np.float64), plain.view(np.int64))[0, 1]
        assert abs(correlation) < 5 / LENGTH**0.5
    assert chi_square(total) > 1000  # the sum is meant to be read


def test_keys_of_strangers_and_forged_keys_are_refused() -> None:
    members = [Identity.generate() for _ in range(3)]
    peers = [one.peer_id for one in members]
    participants = [Participant(one, ROUND, peers) for one in members]
    keys = [participant.advertise() for participant in participants]
    stranger = Participant(Identity.generate(), ROUND, peers).advertise()
    with pytest.raises(ProtocolError):
        Participant(members[0], ROUND, peers).share([*keys, stranger])
    with pytest.raises(ProtocolError):
        Aggregator(ROUND, peers, LENGTH).add_keys(stranger)
    # An aggregator that puts its own keys in another's place
    forged = type(stranger)(peers[1], stranger.channel_key, stranger.mask_key, keys[1].signature)
    with pytest.raises(ProtocolError):
        participants[0].share([keys[0], forged, keys[2]])
    # Keys of another round
    old = Participant(members[1], b"round 6", peers).advertise()
    with pytest.raises(ProtocolError):
        Participant(members[0], ROUND, peers).share([keys[0], old, keys[2]])


def test_nobody_unmasks_twice() -> None:
    """Else an aggregator could ask for both secrets of one participant."""
    members = [Identity.generate() for _ in range(3)]
    peers = [one.peer_id for one in members]
    participants = [Participant(one, ROUND, peers) for one in members]
    keys = [participant.advertise() for participant in participants]
    shares = {
        one.peer_id: part.share(keys) for one, part in zip(members, participants, strict=True)
    }
    received = {sender: box[peers[0]] for sender, box in shares.items()}
    participants[0].masked(np.zeros(4, dtype=np.uint64), received)
    participants[0].unmask(peers[:2])
    with pytest.raises(ProtocolError):
        participants[0].unmask(peers)


def test_numbers_that_do_not_fit_are_refused() -> None:
    values = np.array([0.5, -3.25, 1e3])
    assert np.array_equal(decode(encode(values, 3)), values)
    for bad in (np.nan, np.inf, 1e12):
        with pytest.raises(UsageError):
            encode(np.array([bad]), 3)


def test_shares_of_a_secret() -> None:
    secret = bytes(range(32))
    shares = split_secret(secret, 5, 3)
    for holders in itertools.combinations(shares, 3):
        assert join_secret({holder: shares[holder] for holder in holders}) == secret
    for too_few in itertools.combinations(shares, 2):
        with contextlib.suppress(ValueError):  # or nonsense that is too large for a secret
            assert join_secret({holder: shares[holder] for holder in too_few}) != secret
