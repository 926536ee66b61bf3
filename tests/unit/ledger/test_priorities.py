"""Before whom a node serves a session, by the allowance that it presents."""

from __future__ import annotations

import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.ledger import node_books
from swarm.ledger.channel import Signed
from swarm.ledger.commits import DirectCommits
from swarm.ledger.node_books import LedgerStore
from swarm.ledger.rules import is_eligible, route_seed
from swarm.node.accounts import (
    FUNDED_PRIORITY,
    LOWEST_PRIORITY,
    MEMBER_PRIORITY,
    LedgerTerms,
    NodeLedger,
)
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import ANONYMOUS, FUNDED, MEMBER, Allowance, sign
from swarm.protocol.messages import OpenSession
from swarm.protocol.prices import CURRENT_EPOCH
from swarm.virtual_time import LoopClock

REVISION = bytes(32)
OPERATOR = Ed25519PrivateKey.generate()


def opening(allowance_class: str, seed: bytes) -> OpenSession:
    """A session on an allowance of the operator."""
    key = Ed25519PrivateKey.generate()
    now = int(LoopClock().unix_s())
    allowance = Allowance(
        serial=secrets.token_hex(16),
        voucher_key=key.public_key().public_bytes_raw().hex(),
        maximum_units=1_000_000,
        per_node_units=1_000_000,
        not_before_unix_s=now,
        expires_unix_s=now + 3600,
        allowance_class=allowance_class,
        price_epoch=CURRENT_EPOCH,
        route_seed=seed.hex(),
    )
    signed = Signed.of(sign(allowance, OPERATOR))
    return OpenSession(
        model_revision=REVISION,
        first_block=0,
        end_block=1,
        rows=1,
        maximum_tokens=64,
        wire_dtype=1,
        wire_encoding=0,
        previous_peer="",
        allowance=signed.payload,
        allowance_signature=signed.signature,
        allowance_issuer=signed.public_key,
    )


@pytest.mark.parametrize(
    ("allowance_class", "drawn", "priority"),
    [
        (FUNDED, None, FUNDED_PRIORITY),
        (MEMBER, True, MEMBER_PRIORITY),
        (MEMBER, False, LOWEST_PRIORITY),
        (ANONYMOUS, True, LOWEST_PRIORITY),
        (ANONYMOUS, False, LOWEST_PRIORITY),
    ],
)
async def test_public_money_buys_turns_only_at_nodes_that_were_drawn(
    allowance_class: str, drawn: bool | None, priority: int
) -> None:
    node, client = Identity.generate(), Identity.generate()
    ledger = NodeLedger(
        node,
        LedgerStore(DirectCommits(node_books.SCHEMA)),
        LedgerTerms(
            REVISION,
            mflop_per_block_token=1,
            dtype_class="float32",
            operators=(OPERATOR.public_key().public_bytes_raw(),),
        ),
        LoopClock(),
    )
    seed = b""
    while drawn is not None and (not seed or is_eligible(seed, node.peer_id) is not drawn):
        seed = route_seed(b"beacon", secrets.token_hex(16), nodes_per_block=16)
    standing = ledger.admit(opening(allowance_class, seed), client.peer_id)
    assert standing.priority == priority
