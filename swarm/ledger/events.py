"""The leaves of the public log: events that move amounts between accounts, and sum to zero.

An event is one line of ASCII JSON; its bytes are the leaf, are hashed as they are, and are never
written anew. What the fields of `detail` mean for each kind is told in docs/ledger.md.

Accounts are pseudonyms, and money comes from one place only:

==================  ==============================================================================
``mint``            what was ever issued, as a negative balance
``budget:NAME``     public money, from which subsidised allowances are paid
``user:PEER``       what the holder of a key may spend
``holds``           all that is reserved for allowances; which is whose stays out of the log
``escrow:PEER``     what a node earned and may not spend yet
``fee``             what the operator keeps
==================  ==============================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarm.ledger.tiles import MAX_LEAF_BYTES
from swarm.protocol.errors import DecodeError, ErrorCode, UsageError
from swarm.protocol.strict_json import MAX_INTEGER

MINT = "mint"
HOLDS = "holds"
FEE = "fee"
ACCOUNT = re.compile(
    r"mint|fee|holds|budget:[a-z0-9-]{1,32}|(user|escrow):[1-9A-HJ-NP-Za-km-z]{1,64}"
)

KINDS = (
    "mint",
    "allowance",
    "release",
    "settlement",
    "vest",
    "forfeit",
    "expire",
    "uptime",
    "compensate",
    "enrol",
    "verdict",
    "revoke",
    "rotate",
    "model",
    "organisation",
    "member",
    "adapter",
)

Posting = tuple[str, int]


def budget(name: str) -> str:
    return f"budget:{name}"


def user(peer: str) -> str:
    return f"user:{peer}"


def escrow(peer: str) -> str:
    return f"escrow:{peer}"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the accounts, or that readers of them must know."""

    kind: str
    event_id: str
    """Unique in a log, and a function of the cause: a cause that comes twice is seen."""
    unix_s: int
    postings: tuple[Posting, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    """Texts, integers and lists of texts."""

    def encode(self) -> bytes:
        """The leaf. Raises UsageError for an event that no reader would accept."""
        if self.kind not in KINDS or sum(amount for _, amount in self.postings) != 0:
            raise UsageError(f"an event {self.kind} that does not sum to zero, or of unknown kind")
        for account, amount in self.postings:
            if not ACCOUNT.fullmatch(account) or not 0 < abs(amount) <= MAX_INTEGER:
                raise UsageError(f"a posting of {amount} to {account!r}")
        content = {
            "kind": self.kind,
            "id": self.event_id,
            "time": self.unix_s,
            "postings": self.postings,
            "detail": self.detail,
        }
        leaf = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
        if len(leaf) > MAX_LEAF_BYTES:
            raise UsageError(f"an event of {len(leaf)} bytes")
        return leaf


def decode_event(leaf: bytes) -> Event:
    """Read a leaf that may come from anybody. Raises DecodeError(BAD_FIELD)."""
    if len(leaf) > MAX_LEAF_BYTES:
        raise _refused("too long")
    try:
        content = json.loads(leaf.decode("ascii"))
        kind, event_id, unix_s = content["kind"], content["id"], content["time"]
        postings: Sequence[Sequence[Any]] = content["postings"]
        detail = content["detail"]
        if (
            len(content) != 5
            or kind not in KINDS
            or type(event_id) is not str
            or type(unix_s) is not int
            or type(detail) is not dict
        ):
            raise ValueError("fields")
        checked = []
        for account, amount in postings:
            if type(amount) is not int or not 0 < abs(amount) <= MAX_INTEGER:
                raise ValueError("amount")
            if type(account) is not str or not ACCOUNT.fullmatch(account):
                raise ValueError("account")
            checked.append((account, amount))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refused("no event") from error
    return Event(kind, event_id, unix_s, tuple(checked), detail)


def _refused(why: str) -> DecodeError:
    return DecodeError(ErrorCode.BAD_FIELD, f"leaf: {why}")
