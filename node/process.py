"""A node as a process of its computer: its key, held by one process at a time, and its signals."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarm.protocol.errors import ConfigError
from swarm.protocol.identity import Identity

LEAVE_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_identity(path: Path) -> Iterator[Identity]:
    """Load the key, or make it, and keep other processes from using it meanwhile.

    Two nodes with one key would be one peer in two places, and both unreachable. Raises
    ConfigError when the key is in use, readable by others or cannot be written.
    """
    try:
        identity = Identity.load_or_create(path)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot use the key file {path}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"a running node uses the key {path}; give each node its own: --identity FILE"
            ) from None
        yield identity
    finally:
        os.close(descriptor)


@contextmanager
def leave_on_signals(leaving: asyncio.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets ``leaving``, the second one cancels the current task."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def received() -> None:
        if leaving.is_set() and task is not None:
            task.cancel()
        leaving.set()

    for number in LEAVE_SIGNALS:
        loop.add_signal_handler(number, received)
    try:
        yield
    finally:
        for number in LEAVE_SIGNALS:
            loop.remove_signal_handler(number)
