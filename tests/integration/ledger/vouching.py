"""A process that keeps books under load until it is killed; forked again and again by its test.

    python -m tests.integration.ledger.vouching LEDGER SEED ROUNDS

Each round forks a child, which opens the books and takes vouchers of several sessions at once. A
receipt is "sent" by writing it to a pipe after it was kept, as a node does. The parent kills the
child with SIGKILL after a number of receipts and a moment that the seed chooses, and then compares:
every receipt that came through the pipe must have its voucher in the books. Prints a summary.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.client.vouchers import Grant, issue_for_ourselves
from swarm.ledger.channel import Signed
from swarm.ledger.node_books import LedgerReader, LedgerStore
from swarm.node.accounts import LedgerTerms, NodeLedger
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import Receipt, Voucher, sign
from swarm.protocol.messages import OpenSession, SignedVoucher
from swarm.protocol.strict_json import parse
from swarm.virtual_time import LoopClock

NODE = Identity(Ed25519PrivateKey.from_private_bytes(b"n" * 32))
MODEL = bytes(32)
SESSIONS = 6
LINE_BYTES = 32 + 1 + 12 + 1


def request_of(grant: Grant) -> OpenSession:
    return OpenSession(
        model_revision=MODEL,
        first_block=0,
        end_block=4,
        rows=1,
        maximum_tokens=64,
        wire_dtype=1,
        wire_encoding=0,
        previous_peer=NODE.peer_id,
        allowance=grant.signed.payload,
        allowance_signature=grant.signed.signature,
        allowance_issuer=grant.signed.public_key,
    )


async def vouch(ledger: NodeLedger, pipe: int, session: bytes) -> None:
    """One session: vouchers as fast as they are answered."""
    grant = issue_for_ourselves(time.time())
    request = request_of(grant)
    standing = ledger.admit(request, NODE.peer_id)
    account = ledger.account(standing, request, session)
    sequence = 0
    while True:
        sequence += 1
        voucher = Voucher(
            serial=grant.allowance.serial,
            node=NODE.peer_id,
            session=session.hex(),
            sequence=sequence,
            model=MODEL.hex(),
            first_block=0,
            end_block=4,
            adapter="",
            prefill_tokens=0,
            decode_tokens=16 * sequence,
            backward_tokens=0,
            moved_bytes=0,
            transcript="",
            unix_s=int(time.time()),
        )
        signed = Signed.of(sign(voucher, grant.key))
        pending = account.accept(SignedVoucher(signed.payload, signed.signature))
        answer = await account.keep(pending)
        receipt = parse(Receipt, answer.payload)
        os.write(pipe, f"{receipt.session} {receipt.sequence:012d}\n".encode())
        if sequence % 50 == 0:
            await account.close()


async def work(path: Path, pipe: int, round_number: int) -> None:
    store = LedgerStore.open(path)
    ledger = NodeLedger(NODE, store, LedgerTerms(MODEL, 7, "float32"), LoopClock())
    async with asyncio.TaskGroup() as group:
        for number in range(SESSIONS):
            session = (round_number * SESSIONS + number).to_bytes(16, "big")
            group.create_task(vouch(ledger, pipe, session))


def one_round(path: Path, round_number: int, dice: random.Random) -> dict[str, int]:
    """The highest receipt of each session that came out before the kill."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            asyncio.run(work(path, writing, round_number))
        finally:
            os._exit(1)
    os.close(writing)
    seen: dict[str, int] = {}
    kill_after = dice.randrange(1, 40)
    received = b""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        lines = 0
        killed = False
        while chunk := pipe.read(LINE_BYTES):
            received += chunk
            lines = received.count(b"\n")
            if lines >= kill_after and not killed:
                time.sleep(dice.random() * 0.002)  # so that it falls anywhere in a commit
                os.kill(child, signal.SIGKILL)
                killed = True
    os.waitpid(child, 0)
    for line in received.decode().split("\n")[:-1]:
        session, sequence = line.split(" ")
        seen[session] = max(seen.get(session, 0), int(sequence))
    return seen


def main() -> None:
    path, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dice = random.Random(seed)
    promised: dict[str, int] = {}
    for number in range(rounds):
        promised |= one_round(path, number, dice)
        database = sqlite3.connect(path)
        kept = dict(database.execute("SELECT session, sequence FROM channel").fetchall())
        database.close()
        lost = [s for s, sequence in promised.items() if kept.get(s, 0) < sequence]
        if lost:
            print(json.dumps({"lost": lost, "round": number}))
            sys.exit(1)
    reader = LedgerReader.open(path)
    length, _ = reader.verify()
    print(
        json.dumps(
            {
                "rounds": rounds,
                "receipts": sum(promised.values()),
                "sessions": len(promised),
                "events": length,
                "lost": [],
            }
        )
    )


if __name__ == "__main__":
    main()
