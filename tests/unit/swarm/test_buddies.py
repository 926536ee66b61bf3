"""Who watches whom."""

from __future__ import annotations

from collections import Counter

from swarm.buddies import BuddySettings, choose_watched, second_opinions
from swarm.protocol.identity import PeerId

NODES = [PeerId(f"peer {number}") for number in range(50)]
SETTINGS = BuddySettings()


def test_everybody_is_watched_by_three_and_watches_three() -> None:
    watched = {own: choose_watched(own, NODES, 3, 7) for own in NODES}
    assert all(len(set(chosen) - {own}) == 3 for own, chosen in watched.items())
    counts = Counter(peer for chosen in watched.values() for peer in chosen)
    assert set(counts.values()) == {3}
    assert len(counts) == 50


def test_the_ring_changes_with_the_turn() -> None:
    assert choose_watched(NODES[0], NODES, 3, 7) != choose_watched(NODES[0], NODES, 3, 8)


def test_small_swarms() -> None:
    assert choose_watched(NODES[0], NODES[:1], 3, 0) == []
    assert choose_watched(NODES[0], [], 3, 0) == []
    assert choose_watched(NODES[0], NODES[:3], 3, 0) in (NODES[1:3], NODES[2:0:-1])


def test_second_opinions_come_from_a_few_who_stand_near() -> None:
    accused = {NODES[0]: {NODES[1]}}
    asked = [
        own for own in NODES[1:] if second_opinions(own, accused, NODES, SETTINGS, 7) == [NODES[0]]
    ]
    watchers = {own for own in NODES if NODES[0] in choose_watched(own, NODES, 3, 7)}
    assert 5 <= len(asked) <= 6
    assert len(set(asked) & watchers - {NODES[1]}) >= 2


def test_who_has_testified_or_is_accused_is_not_asked() -> None:
    enough = {NODES[0]: set(NODES[1:4])}
    assert not any(second_opinions(own, enough, NODES, SETTINGS, 7) for own in NODES)
    own = {NODES[0]: {NODES[1]}}
    assert second_opinions(NODES[1], own, NODES, SETTINGS, 7) == []
    assert second_opinions(NODES[0], own, NODES, SETTINGS, 7) == []
