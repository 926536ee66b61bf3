"""Proofs of work in one file, for people who have no reason to trust us.

Text, one item a line, in an order of ours; the last line has the SHA-256 of all before it::

    sovereign-swarm ledger proof v1
    {"subject":"12D3KooW..."}
    {"allowance":{...},"voucher":{...},"receipt":{...}}
    {"leaf":"...","proof":"c2sp.org/tlog-proof@v1\\n..."}
    sha256 9f86d0...

``scripts/verify_proof.py`` checks such a file offline and uses nothing of this project.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable

from swarm.ledger.node_books import ChannelEntry, LedgerReader
from swarm.ledger.notes import LogProof
from swarm.protocol import strict_json
from swarm.protocol.ledger_objects import Allowance, Receipt, Voucher

HEADER = "sovereign-swarm ledger proof v1"


def voucher_items(reader: LedgerReader) -> Iterable[str]:
    """One item for each channel of a node: who vouched, for what, and what the node answered."""
    allowances = {}
    for signed, _ in reader.allowances():
        serial = strict_json.parse(Allowance, signed.payload).serial
        allowances[serial] = signed.envelope(Allowance).to_json()
    for entry in reader.channels():
        yield _voucher_item(allowances[entry.serial], entry)


def _voucher_item(allowance: str, entry: ChannelEntry) -> str:
    voucher = entry.voucher.envelope(Voucher).to_json()
    receipt = entry.receipt.envelope(Receipt).to_json()
    return f'{{"allowance":{allowance},"voucher":{voucher},"receipt":{receipt}}}'


def leaf_item(leaf: bytes, proof: LogProof) -> str:
    """An item for a leaf of the public log."""
    content = {"leaf": base64.b64encode(leaf).decode("ascii"), "proof": str(proof)}
    return json.dumps(content, separators=(",", ":"))


def proof_file(subject: str, items: Iterable[str]) -> str:
    """The whole file. ``subject`` is the node or account that it is about."""
    head = json.dumps({"subject": subject}, separators=(",", ":"))
    body = "".join(f"{line}\n" for line in (HEADER, head, *items))
    return f"{body}sha256 {hashlib.sha256(body.encode('ascii')).hexdigest()}\n"
