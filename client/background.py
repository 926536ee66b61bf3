"""An event loop on its own thread, so that synchronous programs can use the async client.

The loop keeps running between calls: heartbeats go on while the program computes or waits for its
user. Async programs don't need this.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

CANCEL_GRACE_S = 5.0
"""How long an interrupted call waits for its coroutine to clean up."""


class BackgroundLoop:
    """Owns a daemon thread that runs one event loop until ``close``."""

    def __init__(self, name: str = "swarm-client") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        # A weak reference: a loop that nobody holds any more is not kept alive until exit.
        self._at_exit = partial(_close_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def is_closed(self) -> bool:
        return not self._thread.is_alive() or self._loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run on the loop and wait. An interrupt (Ctrl-C) cancels the coroutine and is raised."""
        if self.is_closed:
            coroutine.close()
            raise RuntimeError("the swarm client is closed")
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a synchronous call on the client's own event loop would never end")
        call = _Call(coroutine)
        self._loop.call_soon_threadsafe(call.start, self._loop)
        try:
            return call.outcome.result()
        except BaseException:
            if not call.outcome.done():  # an interrupt while waiting, no error of the coroutine
                self._loop.call_soon_threadsafe(call.cancel)
                with suppress(BaseException):
                    call.outcome.exception(CANCEL_GRACE_S)
            raise

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run on the loop without waiting; dropped when the loop is closed already."""
        if self.is_closed:
            coroutine.close()
            return
        asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what still runs, stop the loop and end the thread; a second call does nothing."""
        atexit.unregister(self._at_exit)
        if self.is_closed:
            return
        with suppress(TimeoutError, CancelledError):
            asyncio.run_coroutine_threadsafe(_cancel_all_others(), self._loop).result(
                CANCEL_GRACE_S
            )
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CANCEL_GRACE_S)
        if not self._thread.is_alive():
            self._loop.close()


def _close_if_alive(reference: weakref.ref[BackgroundLoop]) -> None:
    background = reference()
    if background is not None:
        background.close()


class _Call(Generic[Result]):
    """One coroutine on its way through the loop; ``outcome`` is done when its task is."""

    def __init__(self, coroutine: Coroutine[Any, Any, Result]) -> None:
        self._coroutine = coroutine
        self._task: asyncio.Task[Result] | None = None
        self.outcome: Future[Result] = Future()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._task = loop.create_task(self._coroutine)
        self._task.add_done_callback(self._finish)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _finish(self, task: asyncio.Task[Result]) -> None:
        if task.cancelled():
            self.outcome.set_exception(CancelledError())
        elif (error := task.exception()) is not None:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())


async def _cancel_all_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
