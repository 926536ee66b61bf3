"""An operator that is killed again and again while it settles. Run as a program by test_kills.

A parent forks children that open the same books on disk and settle the same batches from the start,
as nodes do that got no answer. Children report every SQL statement on a pipe, and every answer that
a node would get; the parent kills them with SIGKILL after a seeded number of statements. What holds
is checked by the parent after all kills: nothing that was answered is lost, nothing is paid twice,
the log replays, and every checkpoint that was ever on disk is a prefix of it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from swarm.ledger.notes import Checkpoint, Note
from swarm.ledger.replay import replay
from swarm.ledger.tiles import TileFiles
from swarm.operator.books import Books
from swarm.operator.journal import Journal
from swarm.protocol.envelope import Envelope
from swarm.protocol.merkle import check_consistency
from tests.unit.operator.parties import START, TOKEN, Client, World, key, policy, settlement

Batch = tuple[Envelope, tuple[Envelope, ...]]
BATCHES = 12
VOUCHERS = 5
NODES = 3
MOST_STATEMENTS = 400
"""A round takes some more."""


@dataclass(frozen=True)
class Work:
    """What nodes present in round after round: the same sessions, with more done each time."""

    clients: list[Client]
    now: int

    def batches(self, round_number: int) -> list[Batch]:
        batches = []
        for number, client in enumerate(self.clients):
            node = f"node-{number % NODES}"
            vouchers = tuple(
                client.voucher(
                    node, tokens(number, session, round_number), round_number + 1, session
                )
                for session in range(VOUCHERS)
            )
            batches.append((settlement(node, vouchers, self.now), vouchers))
        return batches

    def worth(self, rounds: int) -> int:
        return sum(
            TOKEN * tokens(number, session, rounds)
            for number in range(BATCHES)
            for session in range(VOUCHERS)
        )


def tokens(number: int, session: int, round_number: int) -> int:
    return (1 + number + session) * (1 + round_number)


def prepare(folder: Path) -> Work:
    """Books on disk, and who will be paid from them."""
    world = World(Books(Journal.open(folder / "books.sqlite"), policy(), key("operator")))
    world.fund("alice", 10**10)
    for number in range(NODES):
        world.enrol(f"node-{number}")
    clients = [world.request("alice", units=10**8) for _ in range(BATCHES)]
    world.books.journal.close()
    return Work(clients, world.now)


def child(folder: Path, batches: list[Batch], first: int, statements: int, answers: int) -> None:
    """Settle all batches, publishing the log now and then; never returns."""
    journal = Journal.open(folder / "books.sqlite")
    journal.db.set_trace_callback(lambda _: _report(statements, b"."))
    books = Books(journal, policy(), key("operator"))
    tiles = TileFiles(folder / "public")
    now = START
    for number in range(first, first + len(batches)):
        batch, vouchers = batches[number % len(batches)]
        outcomes = books.settle(batch, vouchers, now)
        paid = sum(outcome.paid_units for outcome in outcomes)
        _report(answers, b"%d\n" % paid)
        note = books.checkpoint(key("log"), now)
        tiles.publish(journal.tree, journal.leaves, Checkpoint.parse(note.text).size, note)
    os._exit(0)


def main(folder: Path, kills: int) -> None:
    work = prepare(folder)
    answered = 0
    checkpoints: dict[int, bytes] = {}
    killed = 0
    for seed in range(kills):
        chance = random.Random(seed)
        moment = chance.randrange(1, MOST_STATEMENTS)
        ended, units = _run_and_kill(folder, work.batches(seed), chance.randrange(BATCHES), moment)
        killed += ended
        answered += units
        published = folder / "public" / "checkpoint"
        if published.exists():
            checkpoint = Checkpoint.parse(Note.parse(published.read_text()).text)
            checkpoints[checkpoint.size] = checkpoint.root
    answered += _run_and_kill(folder, work.batches(kills), 0, 10**9)[1]
    worth = work.worth(kills)
    journal = Journal.open(folder / "books.sqlite")
    rows = journal.db.execute("SELECT paid, value FROM channel").fetchall()
    assert len(rows) == BATCHES * VOUCHERS
    assert all(paid == value for paid, value in rows)
    replayed = replay(journal.leaves(0, journal.size), policy().mint_keys)
    assert sum(replayed.paid_by_node.values()) == worth
    assert dict(replayed.balances) == journal.balances()
    assert replayed.root() == journal.tree.root()
    for size, root in checkpoints.items():
        proof = journal.tree.consistency_proof(size)
        check_consistency(size, root, journal.size, journal.tree.root(), proof)
    # an answer is only given for what is on disk, so answers never promise more than was paid
    assert 0 < answered <= worth
    print(
        json.dumps(
            {"killed": killed, "answered": answered, "paid": worth, "checkpoints": len(checkpoints)}
        )
    )


def _run_and_kill(folder: Path, batches: list[Batch], first: int, moment: int) -> tuple[bool, int]:
    """Whether the child had to be killed before it was done, and what it answered."""
    statements_read, statements_write = os.pipe()
    answers_read, answers_write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            child(folder, batches, first, statements_write, answers_write)
        finally:
            os._exit(1)
    os.close(statements_write)
    os.close(answers_write)
    seen = 0
    while seen < moment and (data := os.read(statements_read, min(1024, moment - seen))):
        seen += len(data)
    was_killed = seen >= moment
    if was_killed:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert was_killed or status == 0, "the child failed by itself"
    with os.fdopen(answers_read, "rb") as answers:
        units = sum(int(line) for line in answers if line.endswith(b"\n"))
    os.close(statements_read)
    return was_killed, units


def _report(descriptor: int, data: bytes) -> None:
    os.write(descriptor, data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
