"""Checks a log from its first leaf to its last, with nothing but its export and public keys.

It shares no code with the operator's accounts: what both computed alike was computed twice.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from swarm.ledger.notes import Checkpoint
from swarm.protocol.envelope import parse_envelope
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.ledger_objects import parse
from swarm.protocol.operator_objects import MintOrder

MAX_AMOUNT = (1 << 53) - 1
UNLIMITED = "mint"
"""The one account whose balance may be negative."""


@dataclass(slots=True)
class Replayed:
    """What a log adds up to, leaf by leaf."""

    mint_keys: Collection[bytes]
    """Keys of which two must have signed each issue."""
    balances: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    events: int = 0
    minted: int = 0
    block_tokens: int = 0
    paid_by_node: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _ids: set[str] = field(default_factory=set)
    _orders: set[str] = field(default_factory=set)
    _peaks: list[tuple[int, bytes]] = field(default_factory=list)
    """Roots of complete subtrees, largest first: all that the root of the whole needs."""

    def add(self, leaf: bytes) -> None:
        """Check one more leaf. Raises ProtocolError(BAD_PROOF) that says what is wrong with it."""
        self._hash(leaf)
        try:
            event = json.loads(leaf)
            kind, event_id, postings = event["kind"], event["id"], event["postings"]
            self._post(kind, postings)
            if event_id in self._ids:
                raise ValueError(f"event {event_id!r} is there twice")
            self._ids.add(event_id)
            if kind == "settlement":
                self._settlement(event["detail"])
            elif kind == "mint":
                self._mint(event["detail"], postings)
        except (ValueError, KeyError, TypeError, RecursionError, ProtocolError) as error:
            raise self._wrong(str(error)) from error
        self.events += 1

    def root(self) -> bytes:
        digest = sha256(b"").digest()
        for position, (_, peak) in enumerate(reversed(self._peaks)):
            digest = peak if position == 0 else sha256(b"\1" + peak + digest).digest()
        return digest

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ProtocolError(BAD_PROOF) unless exactly this log was signed."""
        if (checkpoint.size, checkpoint.root) != (self.events, self.root()):
            raise ProtocolError(
                ErrorCode.BAD_PROOF,
                f"{self.events} leaves with another root than the checkpoint's {checkpoint.size}",
            )

    def _hash(self, leaf: bytes) -> None:
        digest = sha256(b"\0" + leaf).digest()
        height = 0
        peaks = self._peaks
        while peaks and peaks[-1][0] == height:
            digest = sha256(b"\1" + peaks.pop()[1] + digest).digest()
            height += 1
        peaks.append((height, digest))

    def _post(self, kind: str, postings: list[list[Any]]) -> None:
        balances = self.balances
        total = 0
        for account, amount in postings:
            if type(amount) is not int or not -MAX_AMOUNT <= amount <= MAX_AMOUNT:
                raise ValueError(f"{amount!r} is no amount")
            total += amount
            balance = balances[account] = balances[account] + amount
            if account == UNLIMITED:
                if kind != "mint" or amount > 0:
                    raise ValueError("money is made or unmade by something that is no mint")
            elif balance < 0:
                raise ValueError(f"{account} is overdrawn by {-balance}")
        if total:
            raise ValueError(f"the event makes {total} out of nothing")

    def _settlement(self, detail: dict[str, Any]) -> None:
        self.block_tokens += detail["block_tokens"]
        self.paid_by_node[detail["node"]] += detail["paid"]

    def _mint(self, detail: dict[str, Any], postings: list[list[Any]]) -> None:
        envelope = parse_envelope(detail["order"])
        order = parse(MintOrder, envelope)
        signers = envelope.signers() & set(self.mint_keys)
        if len(signers) < 2:
            raise ValueError("an issue that two keys have not signed")
        if order.order in self._orders:
            raise ValueError("an order to mint was used twice")
        if postings != [
            [UNLIMITED, -order.amount_units],
            [f"budget:{order.budget}", order.amount_units],
        ]:
            raise ValueError("an issue that is not what was signed")
        self._orders.add(order.order)
        self.minted += order.amount_units

    def _wrong(self, why: str) -> ProtocolError:
        return ProtocolError(ErrorCode.BAD_PROOF, f"leaf {self.events}: {why}")


def replay(lines: Iterable[bytes], mint_keys: Collection[bytes]) -> Replayed:
    """Check an export, one leaf per line. Raises ProtocolError(BAD_PROOF) at the first bad one."""
    replayed = Replayed(mint_keys)
    for line in lines:
        replayed.add(line.rstrip(b"\n"))
    return replayed
