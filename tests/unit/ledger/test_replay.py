"""A replay accepts what the operator wrote, and nothing that was changed afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from swarm.ledger.events import Event, decode_event
from swarm.ledger.merkle_tree import MerkleTree
from swarm.ledger.notes import Checkpoint
from swarm.ledger.replay import replay
from swarm.protocol.errors import DecodeError, ErrorCode, ProtocolError, UsageError
from swarm.protocol.merkle import leaf_hash
from tests.unit.operator.parties import ORIGIN, World, peer


@pytest.fixture(scope="module")
def world() -> World:
    w = World()
    w.mint("public", 10**9)
    w.fund("alice", 10**7)
    w.enrol("node")
    client = w.request("alice")
    w.settle("node", client.voucher("node", 10))
    w.now += 4 * 24 * 3600
    w.books.release_expired(w.now)
    return w


@pytest.fixture
def leaves(world: World) -> list[bytes]:
    return list(world.books.journal.leaves(0, 1000))


def test_it_comes_to_the_same_balances_and_root(world: World, leaves: list[bytes]) -> None:
    replayed = replay((leaf + b"\n" for leaf in leaves), world.books.policy.mint_keys)
    journal = world.books.journal
    assert dict(replayed.balances) == journal.balances()
    assert replayed.root() == journal.tree.root()
    replayed.check(Checkpoint(ORIGIN, len(leaves), journal.tree.root()))
    assert replayed.paid_by_node == {peer("node"): 7000}
    for size in range(len(leaves)):
        part = replay(leaves[:size], world.books.policy.mint_keys)
        assert part.root() == journal.tree.root(size)
        with pytest.raises(ProtocolError):
            part.check(Checkpoint(ORIGIN, len(leaves), journal.tree.root()))


def changed(leaves: list[bytes], kind: str, change: Callable[[dict[str, Any]], object]) -> None:
    for position, leaf in enumerate(leaves):
        event = json.loads(leaf)
        if event["kind"] == kind:
            change(event)
            leaves[position] = json.dumps(event, separators=(",", ":")).encode()
            return
    raise AssertionError(f"no event {kind}")


def set_amounts(*amounts: int) -> Callable[[dict[str, Any]], object]:
    def change(event: dict[str, Any]) -> None:
        for posting, amount in zip(event["postings"], amounts, strict=False):
            posting[1] = amount

    return change


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("settlement", set_amounts(-7001)),
        ("mint", set_amounts(-(10**10), 10**10)),
        ("mint", lambda event: event["detail"].clear()),
        ("allowance", set_amounts(-(10**8), 10**8)),
        ("allowance", lambda event: event.update(postings=[["mint", -5], ["holds", 5]])),
        ("allowance", set_amounts(-1.5, 1.5)),  # type: ignore[arg-type]
        ("settlement", lambda event: event.pop("detail")),
        ("release", lambda event: event.update(id=f"enrol:{'0' * 64}") or event.pop("id")),
    ],
)
def test_changes_are_found(
    world: World, leaves: list[bytes], kind: str, change: Callable[[dict[str, Any]], object]
) -> None:
    changed(leaves, kind, change)
    with pytest.raises(ProtocolError) as error:
        replay(leaves, world.books.policy.mint_keys)
    assert error.value.code is ErrorCode.BAD_PROOF


def test_an_order_to_mint_works_once_and_an_event_is_there_once(
    world: World, leaves: list[bytes]
) -> None:
    keys = world.books.policy.mint_keys
    for repeated in (leaves[1], leaves[1].replace(b'"id":"mint:', b'"id":"again:')):
        with pytest.raises(ProtocolError):
            replay([*leaves, repeated], keys)
    with pytest.raises(ProtocolError):
        replay(leaves, frozenset(list(keys)[:1]))
    assert b'"mint"' in leaves[1]


def test_what_only_moves_money_rightly_still_changes_the_root(
    world: World, leaves: list[bytes]
) -> None:
    changed(leaves, "settlement", lambda event: event["detail"].update(block_tokens=10**6))
    replayed = replay(leaves, world.books.policy.mint_keys)
    assert replayed.root() != world.books.journal.tree.root()
    assert replayed.root() == MerkleTree(map(leaf_hash, leaves)).root()


@pytest.mark.parametrize(
    "event",
    [
        Event("unknown", "x", 1),
        Event("vest", "x", 1, (("fee", 1),)),
        Event("vest", "x", 1, (("fee", 0), ("holds", 0))),
        Event("vest", "x", 1, (("nobody", 1), ("fee", -1))),
        Event("vest", "x", 1, (("holds", 2**53), ("fee", -(2**53)))),
        Event("verdict", "x", 1, (), {"verdict": "v" * 70_000}),
    ],
)
def test_no_event_that_readers_would_refuse(event: Event) -> None:
    with pytest.raises(UsageError):
        event.encode()


def test_events_are_read_strictly(leaves: list[bytes]) -> None:
    for leaf in leaves:
        event = decode_event(leaf)
        assert event.encode() == leaf
    for wrong in (b"", b"[]", b"{}", leaves[0][:-1], leaves[1].replace(b"mint", b"mind")):
        with pytest.raises(DecodeError):
            decode_event(wrong)
