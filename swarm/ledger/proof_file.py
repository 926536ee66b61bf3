"""Proofs of work in one file, for people who have no reason to trust us.

Text, one item a line, in an order of ours; the last line has the SHA-256 of all before it::

    sovereign-swarm ledger proof v1
    {"subject":"12D3KooW..."}
    {"allowance":{...},"voucher":{...},"receipt":{...},"policy":"{\\"countries\\":[\\"KE\\"]}"}
    {"leaf":"...","proof":"c2sp.org/tlog-proof@v1\\n..."}
    sha256 9f86d0...

``policy`` is the text of what the voucher names by its digest, where there is one and it is known.
The subject of a user's file is ``received``: what nodes did for the holder of the allowances' keys.

``scripts/verify_proof.py`` checks such a file offline and uses nothing of this project.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable

from swarm.ledger.node_books import LedgerReader
from swarm.ledger.notes import LogProof
from swarm.protocol import strict_json
from swarm.protocol.ledger_objects import Allowance, Receipt, Voucher

HEADER = "sovereign-swarm ledger proof v1"
RECEIVED = "received"
"""Subject of a file about what a user received."""


def voucher_items(reader: LedgerReader) -> Iterable[str]:
    """One item for each channel of a node: who vouched, for what, and what the node answered."""
    allowances = {}
    for signed, _ in reader.allowances():
        serial = strict_json.parse(Allowance, signed.payload).serial
        allowances[serial] = signed.envelope(Allowance).to_json()
    policies = reader.policies()
    for entry in reader.channels():
        yield voucher_item(
            allowances[entry.serial],
            entry.voucher.envelope(Voucher).to_json(),
            entry.receipt.envelope(Receipt).to_json(),
            policies.get(entry.policy, ""),
        )


def voucher_item(allowance: str, voucher: str, receipt: str, policy: str) -> str:
    """An item of envelopes; ``policy`` is the text of the one that was kept, where it is known."""
    named = f',"policy":{json.dumps(policy)}' if policy else ""
    return f'{{"allowance":{allowance},"voucher":{voucher},"receipt":{receipt}{named}}}'


def leaf_item(leaf: bytes, proof: LogProof) -> str:
    """An item for a leaf of the public log."""
    content = {"leaf": base64.b64encode(leaf).decode("ascii"), "proof": str(proof)}
    return json.dumps(content, separators=(",", ":"))


def proof_file(subject: str, items: Iterable[str]) -> str:
    """The whole file. ``subject`` is the node or account that it is about."""
    head = json.dumps({"subject": subject}, separators=(",", ":"))
    body = "".join(f"{line}\n" for line in (HEADER, head, *items))
    return f"{body}sha256 {hashlib.sha256(body.encode('ascii')).hexdigest()}\n"
