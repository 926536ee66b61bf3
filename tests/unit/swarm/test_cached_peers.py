from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.cached_peers import MAXIMUM_PEERS, load_peers, save_peers, worth_keeping
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.records import NodeRecord

MakeRecord = Callable[..., NodeRecord]


def peer(number: int) -> PeerId:
    seed = (number + 1).to_bytes(32, "big")
    return Identity(Ed25519PrivateKey.from_private_bytes(seed)).peer_id


def address(number: int) -> str:
    return f"/ip4/192.0.2.{number % 250}/tcp/31330/p2p/{peer(number)}"


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "peers.txt"
    assert load_peers(path) == ()
    save_peers(path, [address(1), address(2), address(1)])
    assert load_peers(path) == (address(1), address(2))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    save_peers(path, [address(3)])
    assert load_peers(path) == (address(3),)
    assert [item.name for item in path.parent.iterdir()] == ["peers.txt"]


def test_a_spoilt_file_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "peers.txt"
    path.write_bytes(
        b"\xff\xfe\n\n# note\n/ip4/192.0.2.1/tcp/1\n/ip4/192.0.2.1/p2p/nobody\n" + b"x" * 10_000_000
    )
    assert load_peers(path) == ()
    path.write_text(f"rubbish\n  {address(1)}  \n/{'x' * 300}/p2p/{peer(1)}\n")
    assert load_peers(path) == (address(1),)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "peers.txt"
    save_peers(path, [address(1)])

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_peers(path, [address(2)])
    assert load_peers(path) == (address(1),)
    assert len(list(tmp_path.iterdir())) == 1


def test_old_and_reachable_nodes_come_first(make_record: MakeRecord) -> None:
    def node(number: int, **changes: object) -> NodeRecord:
        place = address(number).split("/p2p/")[0]
        return make_record(0, 1, peer_id=peer(number), addresses=(place,), **changes)

    relayed = f"/ip4/192.0.2.9/tcp/1/p2p/{peer(9)}/p2p-circuit"
    records = [
        node(1, started_unix_s=300, reachable_directly=True),
        node(2, started_unix_s=100, reachable_directly=True),
        node(3, started_unix_s=50),
        node(4),
        make_record(0, 1, peer_id=peer(5)),
        make_record(0, 1, peer_id=peer(6), addresses=(relayed,)),
    ]
    kept = worth_keeping(records, own=peer(4), before=[address(8), address(2)])
    assert kept == [address(2), address(1), address(3), address(8)]


def test_the_file_is_bounded(make_record: MakeRecord, tmp_path: Path) -> None:
    records = [
        make_record(0, 1, peer_id=peer(number), addresses=(f"/ip4/192.0.2.1/tcp/{number + 1}",) * 8)
        for number in range(MAXIMUM_PEERS + 20)
    ]
    path = tmp_path / "peers.txt"
    save_peers(path, worth_keeping(records))
    assert len(load_peers(path)) == MAXIMUM_PEERS
