"""Speaks to an aggregator over HTTP. Nothing that it says is believed without its key's signature.

A refused request raises RemoteError with the aggregator's code; one that got no answer raises
NetworkError and may be sent again: the same message twice changes nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

from swarm.client.finetune.federation.messages import RoundState, StoredAdapter, state_limit
from swarm.client.finetune.federation.rounds import Phase
from swarm.client.finetune.federation.service import POLL_S
from swarm.client.finetune.federation.signing import SIGNATURE, check_answer, request_headers
from swarm.client.finetune.federation.terms import MAX_TERMS_BYTES, FederationTerms
from swarm.coded_http import CodedHttp, read_answer
from swarm.ports import Clock
from swarm.protocol.errors import ErrorCode, ProtocolError, UsageError
from swarm.protocol.identity import Identity, PeerId

TIMEOUT_S = 30.0
SMALL_ANSWER_BYTES = 4096
_CHUNK_BYTES = 1 << 18


class AggregatorClient:
    """One participant at one aggregator. Use as an async context manager."""

    def __init__(self, url: str, identity: Identity, *, clock: Clock) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url!r} is no http:// or https:// address of an aggregator")
        self._http = CodedHttp(url, "aggregator")
        self._identity = identity
        self._clock = clock
        self._terms: FederationTerms | None = None

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def terms(self, aggregator: PeerId | None = None) -> FederationTerms:
        """What is agreed on, signed by ``aggregator``; None trusts whoever answers at the URL."""
        async with self._http.answer("GET", "/v1/terms", timeout_s=TIMEOUT_S) as response:
            body = await read_answer(response, MAX_TERMS_BYTES)
        terms = FederationTerms.from_json(body)
        if aggregator is not None and terms.aggregator != aggregator:
            raise ProtocolError(ErrorCode.BAD_SIGNATURE, "another aggregator than expected")
        check_answer(response.headers, terms.aggregator, "", body)
        self._terms = terms
        return terms

    async def state(self, after: str = "") -> RoundState:
        """The present state; with ``after`` as soon as it is another one than that version."""
        query = f"?after={after}" if after else ""
        invited = len(self._known_terms.invited)
        body = await self._signed(
            "GET", f"/v1/state{query}", b"", state_limit(invited), POLL_S + TIMEOUT_S
        )
        return RoundState.from_json(body, invited)

    async def send(self, round_id: bytes, phase: Phase, body: bytes) -> None:
        """One message of a round, by ``messages.write_message``."""
        path = f"/v1/rounds/{round_id.hex()}/{phase}"
        timeout_s = self._known_terms.answer_s + TIMEOUT_S
        await self._signed("POST", path, body, SMALL_ANSWER_BYTES, timeout_s)

    async def fetch_adapter(self, stored: StoredAdapter, path: Path) -> None:
        """Download it to ``path``; a wrong size or hash raises ProtocolError."""
        request = f"/v1/adapters/{stored.sha256}"
        headers = self._headers("GET", request, b"")
        digest, size_bytes = hashlib.sha256(), 0
        unfinished = path.with_name(path.name + ".unfinished")
        timeout_s = self._known_terms.answer_s + TIMEOUT_S
        try:
            with unfinished.open("wb") as file:
                async with self._http.answer(
                    "GET", request, headers=headers, timeout_s=timeout_s
                ) as response:
                    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                        size_bytes += len(chunk)
                        if size_bytes > stored.size_bytes:
                            raise ProtocolError(ErrorCode.TOO_LARGE, "more than was announced")
                        digest.update(chunk)
                        file.write(chunk)
            if digest.hexdigest() != stored.sha256:
                raise ProtocolError(ErrorCode.BAD_TENSOR, "an adapter with another hash")
            unfinished.replace(path)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error

    @property
    def _known_terms(self) -> FederationTerms:
        if self._terms is None:
            raise RuntimeError("ask for the terms first")
        return self._terms

    def _headers(self, method: str, path: str, body: bytes) -> dict[str, str]:
        unix_s = int(self._clock.unix_s())
        federation_id = self._known_terms.federation_id
        return request_headers(self._identity, federation_id, method, path, body, unix_s)

    async def _signed(
        self, method: str, path: str, body: bytes, maximum_bytes: int, timeout_s: float
    ) -> bytes:
        headers = self._headers(method, path, body)
        async with self._http.answer(
            method, path, body=body or None, headers=headers, timeout_s=timeout_s
        ) as response:
            answer = await read_answer(response, maximum_bytes)
        check_answer(response.headers, self._known_terms.aggregator, headers[SIGNATURE], answer)
        return answer
