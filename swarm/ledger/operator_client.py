"""Speaks to an operator over HTTP: what clients, nodes and outsiders ask of it.

Nothing that it answers is believed beyond its signatures: callers pin the operator's and the log's
keys. Answers are bounded. A refused request raises RemoteError with the operator's code; one that
got no answer raises NetworkError and may be sent again, all of them are idempotent.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

from swarm.coded_http import CodedHttp, read_answer
from swarm.ledger.notes import MAX_NOTE_BYTES, LogProof, Note, VerifierKey
from swarm.ledger.tiles import MAX_LEAF_BYTES
from swarm.protocol.envelope import MAX_ENVELOPE_BYTES, Envelope, parse_envelope
from swarm.protocol.errors import ErrorCode, ProtocolError, RemoteError
from swarm.protocol.ledger_objects import Allowance, verified

MAX_ANSWER_BYTES = 1 << 20
TIMEOUT_S = 30.0
EXPORT_TIMEOUT_S = 3600.0
EXPORT_CHUNK_BYTES = 1 << 18
MAX_QUARANTINED = 1000


@dataclass(frozen=True, slots=True)
class Terms:
    """What an operator says of itself; to be pinned by whoever deals with it."""

    origin: str
    log_key: VerifierKey
    operator_key: bytes
    mint_keys: frozenset[bytes]
    witnesses: tuple[VerifierKey, ...]
    minimum_node_age_s: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a voucher: units paid now, and the code of what was wrong, or None."""

    paid_units: int
    code: ErrorCode | None


@dataclass(frozen=True, slots=True)
class NodeStanding:
    """What an operator says of a node."""

    organisation: str
    state: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A node with failed segments, at which other validators shall look by their own challenges."""

    node: str
    organisation: str
    accused_by: tuple[str, ...]


class OperatorClient:
    """One operator. Use as an async context manager; may be shared by many tasks."""

    def __init__(self, url: str) -> None:
        self._http = CodedHttp(url, "operator")

    async def __aenter__(self) -> OperatorClient:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def terms(self) -> Terms:
        answer = await self._json("GET", "/v1/terms")
        try:
            return Terms(
                str(answer["origin"]),
                VerifierKey.parse(answer["log_key"]),
                bytes.fromhex(answer["operator_key"]),
                frozenset(bytes.fromhex(key) for key in answer["mint_keys"]),
                tuple(VerifierKey.parse(key) for key in answer["witnesses"]),
                int(answer["minimum_node_age_s"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(ErrorCode.BAD_FIELD, "terms of no operator") from error

    async def allowance(self, request: Envelope, operator_key: bytes) -> tuple[Allowance, Envelope]:
        """The allowance for a request, checked to be the pinned operator's."""
        answer = await self._request("POST", "/v1/allowances", [request], MAX_ENVELOPE_BYTES)
        sealed = parse_envelope(answer)
        return verified(Allowance, sealed, operator_key), sealed

    async def settle(self, settlement: Envelope, vouchers: Sequence[Envelope]) -> list[Settled]:
        """Present vouchers; one outcome for each, in their order."""
        answer = await self._json("POST", "/v1/settlements", [settlement, *vouchers])
        try:
            outcomes = [
                Settled(int(each["paid"]), ErrorCode(each["code"]) if each["code"] else None)
                for each in answer["outcomes"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(ErrorCode.BAD_FIELD, "no outcomes of a settlement") from error
        if len(outcomes) != len(vouchers):
            raise ProtocolError(ErrorCode.BAD_FIELD, "not one outcome for each voucher")
        return outcomes

    async def enrol(self, enrolment: Envelope, certificate: Envelope | None = None) -> None:
        await self._json(
            "POST", "/v1/enrolments", [enrolment, *([certificate] if certificate else [])]
        )

    async def order(self, order: Envelope) -> int:
        """Send a signed order; returns the index of its event in the log."""
        return int((await self._json("POST", "/v1/orders", [order]))["index"])

    async def revoke(self, revocation: Envelope) -> int:
        return int((await self._json("POST", "/v1/revocations", [revocation]))["index"])

    async def verdict(self, verdict: Envelope) -> str:
        return str((await self._json("POST", "/v1/verdicts", [verdict]))["state"])

    async def account(self, account: str, before: int | None = None) -> dict[str, Any]:
        page = "" if before is None else f"?before={before}"
        return await self._json("GET", f"/v1/accounts/{quote(account)}{page}")

    async def node(self, node: str) -> dict[str, Any]:
        return await self._json("GET", f"/v1/nodes/{quote(node)}")

    async def node_standing(self, node: str) -> NodeStanding | None:
        """None for a node that is not enrolled."""
        try:
            answer = await self.node(node)
            return NodeStanding(str(answer["organisation"]), str(answer["state"]))
        except RemoteError as error:
            if error.code is not ErrorCode.FOREIGN_OBJECT:
                raise
            return None
        except KeyError as error:
            raise ProtocolError(ErrorCode.BAD_FIELD, "no standing of a node") from error

    async def quarantined(self) -> list[Quarantined]:
        """All of them, at most ``MAX_QUARANTINED``."""
        found: list[Quarantined] = []
        while len(found) < MAX_QUARANTINED:
            after = found[-1].node if found else ""
            answer = await self._json("GET", f"/v1/quarantined?after={quote(after)}")
            try:
                page = [
                    Quarantined(
                        str(each["node"]), str(each["organisation"]), tuple(each["accused_by"])
                    )
                    for each in answer["nodes"]
                ]
            except (KeyError, TypeError) as error:
                raise ProtocolError(ErrorCode.BAD_FIELD, "no list of nodes") from error
            found += [each for each in page if each.node > after]
            if not page or page[-1].node <= after:
                break
        return found[:MAX_QUARANTINED]

    async def validators(self) -> dict[bytes, str]:
        """Keys whose verdicts count, and their organisations."""
        answer = await self._json("GET", "/v1/validators")
        try:
            return {
                bytes.fromhex(each["key"]): str(each["organisation"])
                for each in answer["validators"]
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(ErrorCode.BAD_FIELD, "no list of validators") from error

    async def totals(self) -> dict[str, Any]:
        return await self._json("GET", "/v1/totals")

    async def leaf(self, index: int) -> bytes:
        return await self._request("GET", f"/v1/leaves/{index}", (), MAX_LEAF_BYTES)

    async def proof(self, index: int) -> LogProof:
        answer = await self._request("GET", f"/v1/proofs/{index}", (), 2 * MAX_NOTE_BYTES)
        return LogProof.parse(_text(answer))

    async def checkpoint(self) -> Note:
        return Note.parse(_text(await self._request("GET", "/checkpoint", (), MAX_NOTE_BYTES)))

    async def export(self, size: int) -> AsyncIterator[bytes]:
        """The first ``size`` leaves, one after the other."""
        rest = b""
        async with self._http.answer(
            "GET", f"/v1/export?to={size}", timeout_s=EXPORT_TIMEOUT_S
        ) as response:
            async for chunk in response.content.iter_chunked(EXPORT_CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > MAX_LEAF_BYTES:
                    raise ProtocolError(ErrorCode.TOO_LARGE, "an endless leaf")
                for line in lines:
                    yield line

    async def _json(
        self, method: str, path: str, envelopes: Sequence[Envelope] = ()
    ) -> dict[str, Any]:
        answer = await self._request(method, path, envelopes, MAX_ANSWER_BYTES)
        try:
            content = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(ErrorCode.BAD_FIELD, "no JSON") from error
        if not isinstance(content, dict):
            raise ProtocolError(ErrorCode.BAD_FIELD, "no JSON object")
        return content

    async def _request(
        self, method: str, path: str, envelopes: Sequence[Envelope], maximum_bytes: int
    ) -> bytes:
        body = "\n".join(envelope.to_json() for envelope in envelopes) or None
        async with self._http.answer(method, path, body=body, timeout_s=TIMEOUT_S) as response:
            return await read_answer(response, maximum_bytes)


def _text(answer: bytes) -> str:
    try:
        return answer.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(ErrorCode.BAD_FIELD, "no text") from error
