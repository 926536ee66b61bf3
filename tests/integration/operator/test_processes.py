"""The commands as people use them: an operator, two witnesses, a node and a user over loopback."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.ledger.merkle_tree import MerkleTree
from swarm.ledger.notes import Checkpoint, Note, VerifierKey, sign_note
from swarm.ledger.operator_client import OperatorClient, Settled
from swarm.operator.cosigning import submission
from swarm.operator.settings import BOOKS_FILE, create_folder, load_settings
from swarm.operator.witness import Witness, load_witness
from swarm.protocol.envelope import Envelope
from swarm.protocol.errors import ConfigError, ErrorCode, NetworkError, RemoteError
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import ANONYMOUS, Allowance, sign
from swarm.protocol.merkle import leaf_hash
from swarm.protocol.operator_objects import AllowanceRequest, Enrolment
from tests.unit.operator.parties import MODEL, TOKEN, Client, key, peer, settlement

SWARM = str(Path(sys.executable).with_name("swarm"))
DEADLINE_S = 60.0
REPOSITORY = Path(__file__).parents[3]


def swarm(*arguments: str | Path, fails_with: int = 0) -> str:
    ended = subprocess.run([SWARM, *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.returncode == fails_with, ended.stderr
    return ended.stdout


def verified_offline(*arguments: str | Path) -> str:
    """What the one-file verifier says, which has nothing but the file and the keys."""
    script = REPOSITORY / "scripts" / "verify_proof.py"
    ended = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@contextmanager
def running(*arguments: str | Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A process that says where it listens; ends it gently unless it is dead already."""
    process = subprocess.Popen([SWARM, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        (url,) = re.findall(r"http://\S+", said)
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) in (0, -signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(client: OperatorClient, size: int, cosigned_by: list[VerifierKey]) -> Note:
    """The first checkpoint with so many leaves and signatures."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        note = await client.checkpoint()
        enough = len(note.verified_by(cosigned_by)) == len(cosigned_by)
        if Checkpoint.parse(note.text).size >= size and enough:
            return note
        await asyncio.sleep(0.05)
    raise AssertionError("no such checkpoint")


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """An operator's folder, and the three mint keys beside it."""
    publics = []
    for name in "abc":
        identity = Identity.generate()
        identity.save(tmp_path / f"{name}.key")
        publics.append(identity.public_key_bytes.hex())
    folder = tmp_path / "books"
    create_folder(folder, "operator.example/ledger", publics, f"127.0.0.1:{free_port()}")
    settings = folder / "operator.toml"
    settings.write_text(
        "checkpoint_interval_s = 0.1\ncosign_interval_s = 0.1\n"
        + settings.read_text()
        + "[policy]\nminimum_node_age_s = 0\n"
    )
    return folder


def test_making_an_operator(tmp_path: Path) -> None:
    publics = [swarm("operator", "key", tmp_path / f"{n}.key").split()[0] for n in "abc"]
    init = ("operator", "init", tmp_path / "books", "--origin", "operator.example/ledger")
    keys = [part for public in publics for part in ("--mint-key", public)]
    swarm(*init, *keys[:4], fails_with=2)
    said = swarm(*init, *keys)
    assert str(load_settings(tmp_path / "books").log_verifier) in said
    swarm(*init, *keys, fails_with=2)  # never over what is there
    swarm("operator", "key", tmp_path / "a.key", fails_with=2)


def request(voucher_key: Ed25519PrivateKey) -> AllowanceRequest:
    public = voucher_key.public_key().public_bytes_raw().hex()
    now = int(time.time())
    return AllowanceRequest(secrets.token_hex(16), "", public, ANONYMOUS, "", 10**7, 600, now)


async def test_mint_settle_prove_and_verify(books: Path, tmp_path: Path) -> None:
    log = load_settings(books).log_verifier
    witness_folder = tmp_path / "witness"
    printed = swarm(
        "witness", "init", witness_folder, "--name", "w.example", "--log", str(log),
        "--listen", "127.0.0.1:0",
    )  # fmt: skip
    witness_key = VerifierKey.parse(printed.strip())
    with running("witness", "run", witness_folder) as (witness_url, _):
        with (books / "operator.toml").open("a") as file:
            file.write(f'[[witnesses]]\nurl = "{witness_url}"\nkey = "{witness_key}"\n')
        with running("operator", "run", books) as (url, process):
            mint = ("operator", "mint", "public", "5", "--operator", url, "--reason", "a test")
            swarm(*mint, "--key", tmp_path / "a.key", fails_with=3)
            swarm(*mint, "--key", tmp_path / "a.key", "--key", tmp_path / "c.key")
            swarm(
                "operator", "price", books, MODEL, "--blocks", "30", "--mflop", "7",
                "--operator", url,
            )  # fmt: skip
            async with OperatorClient(url) as client:
                settled = await _earn(client)
                # killed, and back: an answer that was given still holds, the rest comes again
                process.kill()
                process.wait()
                with pytest.raises(NetworkError):
                    await client.totals()
        with running("operator", "run", books) as (url, _):
            async with OperatorClient(url) as client:
                batch, vouchers = settled
                assert await client.settle(batch, vouchers) == [Settled(0, None)]
                # its mint, price, enrolment, reservation and settlement, and nothing else
                note = await until(client, 5, [witness_key])
                assert Checkpoint.parse(note.text).size == 5
                account = await client.account(f"escrow:{peer('node')}")
                assert account["balance"] == 90 * TOKEN * 97 // 100
                (entry,) = account["entries"]
                leaf = await client.leaf(entry["index"])
                proof = await client.proof(entry["index"])
                assert proof.verify(leaf_hash(leaf), log, [witness_key]) == 1
                assert (await client.node(peer("node")))["state"] == "active"
                totals = await client.totals()
                assert totals["served"]["block_tokens"] == 900
            said = swarm(
                "operator", "verify", "--operator", url, "--log-key", str(log),
                "--witness", str(witness_key), "--save", tmp_path / "export.jsonl",
            )  # fmt: skip
            assert "5 events add up" in said
            assert "1 witnesses" in said
            # what a donor hands to somebody who has nothing but the keys of log and witness
            proof_file = tmp_path / "proof"
            account_name = f"escrow:{peer('node')}"
            swarm("ledger", "prove", proof_file, "--operator", url, "--account", account_name)
            keys = ("--log-key", str(log), "--witness", str(witness_key), "--needed", "1")
            assert str(90 * TOKEN * 97 // 100) in verified_offline(proof_file, *keys)
    leaves = (tmp_path / "export.jsonl").read_bytes().splitlines()
    assert MerkleTree(map(leaf_hash, leaves)).root() == Checkpoint.parse(note.text).root


async def _earn(client: OperatorClient) -> tuple[Envelope, list[Envelope]]:
    terms = await client.terms()
    now = int(time.time())
    enrolment = Enrolment(peer("node"), peer("node"), "", 1, now)
    await client.enrol(sign(enrolment, key("node")))
    voucher_key = Ed25519PrivateKey.generate()
    asked = sign(request(voucher_key), voucher_key)
    allowance, issued = await client.allowance(asked, terms.operator_key)
    assert (await client.allowance(asked, terms.operator_key))[0] == allowance
    assert isinstance(allowance, Allowance)
    user = Client(voucher_key, allowance, asked, issued)
    vouchers = [user.voucher("node", 90)]
    batch = settlement("node", tuple(vouchers), now)
    assert await client.settle(batch, vouchers) == [Settled(90 * TOKEN, None)]
    stolen = settlement("node", (user.voucher("other", 9),), now)
    assert await client.settle(stolen, [user.voucher("other", 9)]) == [
        Settled(0, ErrorCode.FOREIGN_OBJECT)
    ]
    with pytest.raises(RemoteError) as refused:
        await client.settle(sign(enrolment, key("node")), vouchers)
    assert refused.value.code is ErrorCode.BAD_FIELD
    return batch, vouchers


HOSTILE_BODIES: tuple[bytes, ...] = (
    b"",
    b"\n",
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"payload":"","payloadType":"x","signatures":[]}',
    b"{}\n" * 1000,
    b'{"a":1,"a":2}',
    b"x" * (1 << 20),
    b"y" * ((1 << 20) + 1),
)


async def test_hostile_requests_get_a_code(books: Path) -> None:
    paths = (
        "allowances", "settlements", "enrolments", "orders", "verdicts", "revocations",
        "rotations",
    )  # fmt: skip
    with running("operator", "run", books) as (url, _):
        async with aiohttp.ClientSession() as session:
            for path in paths:
                for body in HOSTILE_BODIES:
                    async with session.post(f"{url}/v1/{path}", data=BytesIO(body)) as response:
                        answer = await response.text()
                        assert 400 <= response.status < 500, (path, body[:20])
                        assert set(json.loads(answer)) == {"error", "code", "text"}
            for path in (
                "v1/proofs/0", "v1/proofs/-1", "v1/proofs/1e3", "v1/leaves/99", "v1/events/x",
                "v1/export?from=x", "v1/accounts/x?before=y", "v1/nodes/..%2f..", "tile/../log.key",
                "tile/%2e%2e/%2e%2e/log.key", "tile/0", "v1/nothing",
            ):  # fmt: skip
                async with session.get(f"{url}/{path}") as response:
                    assert 400 <= response.status < 500, path
                    assert "Traceback" not in await response.text()
            async with session.get(f"{url}/v1/accounts/nobody") as response:
                assert (await response.json())["balance"] == 0


def test_one_process_for_one_folder(books: Path) -> None:
    with running("operator", "run", books):
        swarm("operator", "run", books, fails_with=2)
    assert (books / BOOKS_FILE).stat().st_mode & 0o077 == 0
    (books / "operator.key").chmod(0o644)
    swarm("operator", "run", books, fails_with=2)


@pytest.mark.parametrize(
    "change",
    [
        "unknown = 1",
        'listen = "nowhere"',
        "checkpoint_interval_s = 0",
        "[policy]\nunknown = 1",
        "[policy]\nnodes_per_allowance = 0",
        '[policy]\nanonymous_units = "many"',
        '[[witnesses]]\nurl = "http://x"\nkey = "y"',
        "= broken",
    ],
)
def test_wrong_settings_are_named(books: Path, change: str) -> None:
    path = books / "operator.toml"
    kept = [
        line
        for line in path.read_text().splitlines()
        if line.split(" = ")[0] not in ("listen", "minimum_node_age_s", "[policy]")
    ]
    path.write_text("\n".join([*kept[:4], change, *kept[4:]]))
    with pytest.raises(ConfigError):
        load_settings(books)


def test_a_witness_signs_no_two_histories(tmp_path: Path) -> None:
    log_key = Ed25519PrivateKey.generate()
    origin = "log.example"
    public = VerifierKey(origin, 1, log_key.public_key().public_bytes_raw())  # type: ignore[arg-type]
    swarm("witness", "init", tmp_path / "w", "--name", "w.example", "--log", str(public))
    settings = load_witness(tmp_path / "w")

    def opened() -> Witness:
        return Witness.open(
            tmp_path / "w" / "state",
            Identity.load(tmp_path / "w" / "witness.key"),
            "w",
            settings.logs,
        )

    def note(tree: MerkleTree, name: str = origin, signer: Ed25519PrivateKey = log_key) -> Note:
        text = Checkpoint(name, tree.size, tree.root()).text
        return Note(text, (sign_note(text, signer, name),))

    tree = MerkleTree(sha256(b"%d" % number).digest() for number in range(5))
    fork = MerkleTree(sha256(b"!%d" % number).digest() for number in range(9))
    witness = opened()

    def answer(old: int, proof: list[bytes], submitted: Note) -> int:
        return witness.add_checkpoint(submission(old, proof, submitted).decode()).status

    assert answer(0, [], note(tree)) == 200
    assert answer(5, [], note(tree)) == 200  # again: a newer time on the same state
    first = note(tree)
    for number in range(5, 9):
        tree.append(sha256(b"%d" % number).digest())
    assert answer(0, [], note(tree)) == 409
    assert answer(4, tree.consistency_proof(4), note(tree)) == 409
    assert answer(5, tree.consistency_proof(5)[:-1], note(tree)) == 422
    assert answer(5, fork.consistency_proof(5), note(fork)) == 422
    assert answer(9, [], first) == 400
    assert answer(5, [], note(tree, "other.example")) == 404
    assert answer(5, [], note(tree, signer=Ed25519PrivateKey.generate())) == 403
    assert witness.add_checkpoint("nonsense").status == 400
    witness.close()
    witness = opened()  # it remembers
    assert answer(0, [], first) == 409
    assert answer(5, tree.consistency_proof(5), note(tree)) == 200
    assert answer(9, [], note(fork)) == 409
    witness.close()
