"""The offline verifier: what it accepts, what it refuses, and what it may import."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from scripts import verify_proof
from scripts.verify_proof import Refused, check_file, parse_key
from swarm.client.vouchers import Grant, issue_for_ourselves
from swarm.ledger import notes
from swarm.ledger.channel import Signed
from swarm.ledger.commits import DirectCommits
from swarm.ledger.node_books import SCHEMA, LedgerReader, LedgerStore
from swarm.ledger.notes import Checkpoint, KeyType, LogProof, Note, VerifierKey
from swarm.ledger.proof_file import leaf_item, proof_file, voucher_items
from swarm.protocol import merkle
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import Receipt, Voucher, sign
from swarm.protocol.policy import Policy

NODE = Identity(Ed25519PrivateKey.from_private_bytes(bytes([9]) * 32))
FILE = Path(verify_proof.__file__)
LOG = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)
WITNESS = Ed25519PrivateKey.from_private_bytes(bytes([2]) * 32)


def verifier_key(key: Ed25519PrivateKey, name: str, kind: KeyType) -> VerifierKey:
    return VerifierKey(name, kind, key.public_key().public_bytes_raw())


LOG_KEY = parse_key(str(verifier_key(LOG, "ledger.example", KeyType.NOTE)))
WITNESS_KEY = parse_key(str(verifier_key(WITNESS, "witness.example", KeyType.COSIGNATURE)))


KENYA = Policy(countries=("KE",))


def voucher_of(grant: Grant, session: int, **changes: Any) -> Voucher:
    fields: dict[str, Any] = {
        "serial": grant.allowance.serial,
        "node": NODE.peer_id,
        "session": f"{session:032x}",
        "sequence": 1,
        "model": "ab" * 32,
        "first_block": 0,
        "end_block": 10,
        "adapter": "",
        "prefill_tokens": 100,
        "decode_tokens": 20,
        "backward_tokens": 0,
        "moved_bytes": 0,
        "transcript": "",
        "unix_s": 1_800_000_000,
        "policy": KENYA.digest.hex(),
    }
    return Voucher(**fields | changes)


def proof_by_vouchers(
    sessions: int, policy: Policy = KENYA, in_receipts: dict[str, str] | None = None
) -> str:
    commits = DirectCommits(SCHEMA)
    store = LedgerStore(commits)
    grant = issue_for_ourselves(1_800_000_000)

    async def fill() -> None:
        await store.begin(grant.signed, grant.allowance.serial, "payer", policy.to_bytes())
        for session in range(sessions):
            voucher = voucher_of(grant, session, policy=policy.digest.hex())
            common = {
                name: getattr(voucher, name)
                for name in asdict(voucher)
                if name not in ("transcript", "unix_s")
            }
            answered: dict[str, Any] = {
                "steps": 21,
                "transcript": "cd" * 32,
                "dtype_class": "float32",
                "unix_s": 1,
            }
            receipt = Receipt(**common | answered | (in_receipts or {}))
            await store.keep(
                Signed.of(sign(voucher, grant.key)), Signed.of(sign(receipt, NODE.private_key)), 5
            )

    asyncio.run(fill())
    reader = LedgerReader(commits.database)
    if not in_receipts:
        reader.verify()
    return proof_file(NODE.peer_id, voucher_items(reader))


def proof_by_log() -> str:
    leaves = [
        b'{"kind":"settle","id":"a%d","time":1,"postings":[["escrow:%s",%d],["budget:b",%d]],'
        b'"detail":{}}' % (number, NODE.peer_id.encode(), number, -number)
        for number in range(1, 8)
    ]
    hashes = [merkle.leaf_hash(leaf) for leaf in leaves]
    text = Checkpoint("ledger.example", len(leaves), merkle.root_of(hashes)).text
    note = Note(
        text,
        (
            notes.sign_note(text, LOG, "ledger.example"),
            notes.cosign(text, WITNESS, "witness.example", 1_800_000_000),
        ),
    )

    def inclusion(index: int, part: list[bytes]) -> list[bytes]:
        if len(part) == 1:
            return []
        split = 1 << ((len(part) - 1).bit_length() - 1)
        if index < split:
            return [*inclusion(index, part[:split]), merkle.root_of(part[split:])]
        return [*inclusion(index - split, part[split:]), merkle.root_of(part[:split])]

    items = [
        leaf_item(leaves[index], LogProof(index, tuple(inclusion(index, hashes)), note))
        for index in (2, 6)
    ]
    return proof_file(NODE.peer_id, items)


def test_vouchers_are_added_up() -> None:
    proven = check_file(proof_by_vouchers(3).encode())
    assert proven["subject"] == NODE.peer_id
    assert (proven["vouchers"], proven["prefill_tokens"], proven["decode_tokens"]) == (3, 300, 60)
    assert list(proven["issuers"].values()) == [3]


def resealed(body: str) -> bytes:
    return f"{body}sha256 {hashlib.sha256(body.encode()).hexdigest()}\n".encode()


def test_policies_are_shown() -> None:
    shown = {'{"countries":["KE"]}': 2}
    assert check_file(proof_by_vouchers(2).encode())["policies"] == shown
    assert check_file(proof_by_vouchers(2, Policy()).encode())["policies"] == {"none": 2}


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (KENYA, '{"countries":["TZ"]}'),
        (KENYA, '{"countries": ["KE"]}'),
        (KENYA, "{}"),
        (KENYA, ""),
        (KENYA, "\ud800"),
        (KENYA, 1),
        (KENYA, ["KE"]),
        (Policy(), '{"countries":["KE"]}'),
        (Policy(), ""),
    ],
)
def test_another_policy_than_the_voucher_names_is_refused(policy: Policy, text: object) -> None:
    header, subject, item, _, _ = proof_by_vouchers(1, policy).split("\n")
    changed = json.loads(item) | {"policy": text}
    with pytest.raises(Refused):
        check_file(resealed("\n".join([header, subject, json.dumps(changed)]) + "\n"))


def test_a_node_that_answers_for_another_policy_proves_nothing() -> None:
    for named in (Policy(countries=("TZ",)).digest.hex(), ""):
        with pytest.raises(Refused, match="differ in policy"):
            check_file(proof_by_vouchers(1, in_receipts={"policy": named}).encode())


def test_leaves_are_added_up() -> None:
    proven = check_file(proof_by_log().encode(), LOG_KEY, [WITNESS_KEY], 1)
    assert proven["leaves"] == 2
    assert proven["posted"] == {f"settle escrow:{NODE.peer_id}": 3 + 7}


def test_a_log_needs_its_key_and_its_witnesses() -> None:
    content = proof_by_log().encode()
    other = parse_key(str(verifier_key(WITNESS, "ledger.example", KeyType.NOTE)))
    for log, needed in ((None, 0), (other, 0), (LOG_KEY, 1)):
        with pytest.raises(Refused):
            check_file(content, log, [], needed)


@pytest.mark.parametrize("kind", ["vouchers", "log"])
def test_any_changed_byte_is_refused(kind: str) -> None:
    content = (proof_by_vouchers(1) if kind == "vouchers" else proof_by_log()).encode()
    for position in range(len(content)):
        for change in (1, 0x20, 0x80):
            changed = bytearray(content)
            changed[position] ^= change
            with pytest.raises(Refused):
                check_file(bytes(changed), LOG_KEY, [WITNESS_KEY], 1)


@pytest.mark.parametrize("kind", ["vouchers", "log"])
def test_a_forger_who_seals_again_is_refused_by_signatures(kind: str) -> None:
    content = proof_by_vouchers(1) if kind == "vouchers" else proof_by_log()
    header, subject, *items, _ = content.rstrip("\n").split("\n")
    item = items[0]
    for position in range(0, len(item), 3):
        replacement = "A" if item[position] != "A" else "B"
        body = "\n".join([header, subject, item[:position] + replacement + item[position + 1 :]])
        with pytest.raises(Refused):
            check_file(resealed(body + "\n"), LOG_KEY, [WITNESS_KEY], 1)
    doubled = "\n".join([header, subject, item, item]) + "\n"
    with pytest.raises(Refused, match="twice"):
        check_file(resealed(doubled), LOG_KEY, [WITNESS_KEY], 1)


def test_it_is_one_small_file_that_needs_cryptography_only() -> None:
    source = FILE.read_text()
    assert len(source.splitlines()) < 300
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported <= sys.stdlib_module_names | {"cryptography"}


def test_as_a_program(tmp_path: Path) -> None:
    path = tmp_path / "proof"
    path.write_text(proof_by_vouchers(1))
    command = [sys.executable, "-I", str(FILE), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert '"decode_tokens": 20' in done.stdout
    path.write_text(path.read_text().replace("sha256 ", "sha256  "))
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr) == (1, "refused: the file was changed\n")
