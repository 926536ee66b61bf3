"""What a verdict says of a finding, and how it is kept."""

from __future__ import annotations

import math
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.client.audit_evidence import NOTHING, Evidence
from swarm.client.validator.docket import Known
from swarm.client.validator.state import KeptVerdict, ValidatorState, summaries
from swarm.client.validator.verdicts import verdict_of
from swarm.ledger.audit_rule import SIXTEEN_BIT, Comparison
from swarm.ledger.channel import Signed
from swarm.ledger.operator_client import NodeStanding
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.ledger_objects import Receipt, Verdict, parse, sign, verified
from swarm.protocol.strict_json import MAX_INTEGER

NODE = Identity(Ed25519PrivateKey.from_private_bytes(b"n" * 32))
LAB = Identity(Ed25519PrivateKey.from_private_bytes(b"l" * 32))
NOW = 1_800_000_000


def evidence(sequence: int = 1) -> Evidence:
    receipt = Receipt(
        "11" * 16, NODE.peer_id, "22" * 16, sequence, "33" * 32, 3, 9, "",
        40, 7, 0, 0, 8, "44" * 32, "bfloat16", NOW,
    )  # fmt: skip
    return Evidence(receipt, Signed.of(sign(receipt, NODE.private_key)), 47, SIXTEEN_BIT)


def test_a_verdict_names_the_receipt_that_binds_it() -> None:
    found = evidence()
    verdict = verdict_of(found, Comparison(40, 0.0123456, 0.75), "failed", NOW + 0.9)
    assert verdict.segment == found.segment == evidence().segment != evidence(2).segment
    assert (verdict.node, verdict.first_block, verdict.end_block) == (NODE.peer_id, 3, 9)
    assert (verdict.first_position, verdict.end_position) == (0, 47)
    assert (verdict.median_millionths, verdict.p95_millionths) == (12346, 750000)
    assert (verdict.median_limit_millionths, verdict.p95_limit_millionths) == (30000, 50000)
    assert verdict.unix_s == NOW
    sealed = sign(verdict, LAB.private_key)
    assert verified(Verdict, sealed, LAB.public_key_bytes) == verdict


def test_what_is_no_number_and_what_was_never_measured_can_be_written() -> None:
    for comparison in (Comparison(40, 0.01, math.inf), Comparison(40, math.nan, 1.0), None):
        verdict = verdict_of(evidence(), comparison, "failed", NOW)
        assert MAX_INTEGER in (verdict.median_millionths, verdict.p95_millionths)
        assert parse(Verdict, sign(verdict, LAB.private_key)) == verdict
        assert verdict.reference_hash == NOTHING.hex()


def kept(sequence: int, outcome: str = "passed") -> KeptVerdict:
    found = evidence(sequence)
    verdict = verdict_of(found, Comparison(40, 0.01, 0.02), outcome, NOW + sequence)
    return KeptVerdict(
        found.segment, NODE.peer_id, outcome, sign(verdict, LAB.private_key), NOW + sequence
    )


async def test_the_state_survives_and_a_segment_has_one_verdict(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state = ValidatorState.open(path)
    assert path.stat().st_mode & 0o077 == 0
    await state.use([b"a" * 16, b"b" * 16])
    await state.use([b"a" * 16])
    suspect = Known(NOW, "suspect", failed=1)
    await state.keep({NODE.peer_id: suspect}, [kept(1), kept(2)])
    await state.keep({}, [kept(1, "failed"), kept(3)])
    await state.answered(kept(2).segment, "active")
    await state.heard(NODE.peer_id, NodeStanding("uni", "active"))
    await state.heard(PeerId("gone"), None)
    await state.remember("organisation", "Lab")
    await state.close()
    again = ValidatorState.open(path)
    assert again.used == {b"a" * 16, b"b" * 16}
    assert again.known == {NODE.peer_id: suspect}
    assert again.standings == {NODE.peer_id: NodeStanding("uni", "active")}
    assert again.meta == {"organisation": "Lab"}
    assert again.waiting == [kept(1), kept(3)]
    assert state.waiting == again.waiting
    await again.heard(NODE.peer_id, None)
    await again.close()
    (summary,) = summaries(path)
    assert summary.outcomes == {"passed": 3}
    assert (summary.waiting, summary.answer, summary.case) == (2, "active", "suspect")
    final = ValidatorState.open(path)
    assert final.standings == {}
    await final.close()
