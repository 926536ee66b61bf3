"""What the doors of operators and witnesses share: bounded bodies, fixed errors, one thread.

Nobody gets a traceback, and nobody can make us hold more than a body, for more than a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from swarm.protocol.errors import ERROR_TEXTS, ErrorCode, ProtocolError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 1 << 20
BODY_TIMEOUT_S = 10.0
MAX_WAITING = 64
"""Calls that wait for the one thread; more are told to come back."""

STATUS = {
    ErrorCode.INTERNAL: 500,
    ErrorCode.NO_CAPACITY: 503,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.TOO_SLOW: 408,
    ErrorCode.BAD_SIGNATURE: 403,
    ErrorCode.FOREIGN_OBJECT: 404,
    ErrorCode.EQUIVOCATION: 409,
    ErrorCode.ROLLED_BACK: 409,
    ErrorCode.OVER_LIMIT: 429,
}
RETRY_AFTER_S = 5


class OneThread:
    """Calls, one after the other, on a thread of their own; what SQLite wants."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._waiting = 0

    async def run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Raises ProtocolError(NO_CAPACITY) when too many wait. A started call is finished."""
        if self._waiting >= MAX_WAITING:
            raise ProtocolError(ErrorCode.NO_CAPACITY, "too many requests at once")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._executor, partial(call, *arguments))
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Wait for the call that runs; those behind it are dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)


async def read_body(request: web.Request) -> bytes:
    """Raises ProtocolError: TOO_LARGE, TOO_SLOW."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise ProtocolError(ErrorCode.TOO_LARGE) from error
    except TimeoutError as error:
        raise ProtocolError(ErrorCode.TOO_SLOW) from error


def error_response(code: ErrorCode) -> web.Response:
    status = STATUS.get(code, 400)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
    body = {"error": code.name, "code": int(code), "text": ERROR_TEXTS[code]}
    return web.json_response(body, status=status, headers=headers)


@web.middleware
async def errors_are_codes(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Our errors become their code, everything else INTERNAL; only our log says more."""
    try:
        return await handler(request)
    except ProtocolError as error:
        logger.debug("%s %s refused: %s", request.method, request.path, error)
        return error_response(error.code)
    except web.HTTPException:
        raise
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return error_response(ErrorCode.INTERNAL)


def new_application() -> web.Application:
    return web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[errors_are_codes])
