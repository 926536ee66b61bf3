"""A client's side of HTTP services that refuse with our error codes: operators, aggregators."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType

import aiohttp

from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError, RemoteError

MAX_REFUSAL_BYTES = 4096


class CodedHttp:
    """One service. Use as an async context manager; may be shared by many tasks."""

    def __init__(self, url: str, name: str) -> None:
        """``name`` is what users call it, as in "the operator at ... does not answer"."""
        self._url = url.rstrip("/")
        self._name = name
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> CodedHttp:
        # Each request has a time-out of its own.
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @asynccontextmanager
    async def answer(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        body: str | bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer that is no refusal, to be read within the time-out.

        Raises RemoteError with the service's code, NetworkError when it does not answer.
        """
        if self._session is None:
            raise RuntimeError("use it as an async context manager")
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method, self._url + path, data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                if response.status != 200:
                    raise await self._refusal(response)
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NetworkError(f"the {self._name} at {self._url} does not answer") from error

    async def _refusal(self, response: aiohttp.ClientResponse) -> RemoteError:
        """What an answer other than 200 says, by its code."""
        retry_after_s = response.headers.get("Retry-After", "0")
        retry_after_ms = 1000 * int(retry_after_s) if retry_after_s.isdigit() else 0
        try:
            code = ErrorCode(json.loads(await read_answer(response, MAX_REFUSAL_BYTES))["code"])
        except (ValueError, KeyError, TypeError, ProtocolError):
            code = ErrorCode.INTERNAL
        return RemoteError(code, peer=self._name, retry_after_ms=retry_after_ms)


async def read_answer(response: aiohttp.ClientResponse, maximum_bytes: int) -> bytes:
    """A whole body. Raises ProtocolError(TOO_LARGE)."""
    parts = []
    left = maximum_bytes
    async for chunk in response.content.iter_any():
        left -= len(chunk)
        if left < 0:
            raise ProtocolError(ErrorCode.TOO_LARGE, "an answer that is too long")
        parts.append(chunk)
    return b"".join(parts)
