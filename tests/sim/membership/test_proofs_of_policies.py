"""Vouchers and receipts of a session name the policy that was kept, and a proof shows its terms."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from scripts.verify_proof import check_file
from swarm import virtual_time
from swarm.client import ledger_store
from swarm.client.cli import app
from swarm.ledger.commits import DirectCommits
from swarm.ledger.feed import BrokenFeed
from swarm.ledger.node_books import LedgerReader
from swarm.protocol import strict_json
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import Voucher
from swarm.protocol.policy import Policy
from swarm.protocol.tensors import WireTensor
from tests.sim.conftest import ToySwarm

MakeTensor = Callable[[Random, int, int], WireTensor]
KEPT = Policy(avoid=(Identity.generate().peer_id,))


def copy_of(database: sqlite3.Connection, path: Path) -> Path:
    target = sqlite3.connect(path)
    database.backup(target)
    target.close()
    return path


@pytest.fixture
def books(toy_swarm: type[ToySwarm], make_tensor: MakeTensor, tmp_path: Path) -> list[Path]:
    """Books of a client and of two nodes after a session under a policy and one without."""

    async def run() -> list[Path]:
        swarm = toy_swarm([(0, 4), (4, 8)])
        await swarm.start()
        commits = DirectCommits(ledger_store.SCHEMA)
        ledger = ledger_store.ClientLedger(commits)
        for policy in (KEPT, None):
            async with swarm.chain(maximum_tokens=64, policy=policy) as chain:
                for position in range(20):
                    await chain.step(make_tensor(Random(position), 1, 1), position, output_tokens=1)
            await ledger.keep(chain.accounts)
        await swarm.assert_nothing_left()
        paths = [copy_of(commits.database, tmp_path / "client.ledger")]
        for index, node in enumerate(swarm.nodes):
            reader = LedgerReader(node.books)
            named = [
                strict_json.parse(Voucher, entry.voucher.payload).policy
                for entry in reader.channels()
            ]
            assert sorted(named) == ["", KEPT.digest.hex()]
            paths.append(copy_of(node.books, tmp_path / f"node{index}.ledger"))
        return paths

    return virtual_time.run(run())


def test_a_proof_shows_the_policy_that_was_kept(books: list[Path], tmp_path: Path) -> None:
    client, *nodes = books
    output = tmp_path / "proof"
    kept = {KEPT.to_bytes().decode(): 1, "none": 1}
    for option, path, times in (
        *(("--node-ledger", node, 1) for node in nodes),
        ("--ledger", client, 2),
    ):
        command = ["ledger", "prove", str(output), option, str(path)]
        done = CliRunner().invoke(app, command + ["--received"] * (option == "--ledger"))
        assert done.exit_code == 0, done.output
        assert f"{times} sessions under without 1 peers" in done.output
        assert f"{times} sessions under no policy" in done.output
        proven = check_file(output.read_bytes())
        assert proven["policies"] == dict.fromkeys(kept, times)
        assert proven["vouchers"] == 2 * times
        assert len(proven["nodes"]) == times


def test_a_policy_that_was_changed_in_the_books(books: list[Path]) -> None:
    """Neither the books nor a proof that is made from them hold any more."""
    _, node, _ = books
    database = sqlite3.connect(node)
    LedgerReader(database).verify()
    database.execute("UPDATE policy SET content = ?", ('{"countries":["KE"]}',))
    with pytest.raises(BrokenFeed, match="was changed"):
        LedgerReader(database).verify()
    database.execute("DELETE FROM policy")
    with pytest.raises(BrokenFeed, match="is missing"):
        LedgerReader(database).verify()
    database.close()


def test_a_proof_without_the_text_shows_the_digest(books: list[Path], tmp_path: Path) -> None:
    client, _, _ = books
    database = sqlite3.connect(client)
    database.execute("DELETE FROM policy")
    database.commit()
    database.close()
    output = tmp_path / "proof"
    command = ["ledger", "prove", str(output), "--received", "--ledger", str(client)]
    done = CliRunner().invoke(app, command)
    assert f"2 sessions under the policy with SHA-256 {KEPT.digest.hex()}" in done.output
    proven = check_file(output.read_bytes())
    assert proven["policies"] == {f"SHA-256 {KEPT.digest.hex()}": 2, "none": 2}
    _, subject, *items, _, _ = output.read_text().split("\n")
    assert json.loads(subject) == {"subject": "received"}
    assert not any("policy" in json.loads(item) for item in items)
