"""The folder that a client has while it lives, for a key that nobody is to see twice.

A client that is killed leaves its folder behind; the next one on the computer removes it. Whose
folder it is follows from a lock on a file in it, which the system gives back when its process ends,
in whatever way. The file gets its name when it is locked, so that nobody takes a new folder for one
that was left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "swarm-client-"
LOCK_FILE = "lock"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder that only its owner can read, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    with (folder / f"{LOCK_FILE}.new").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{LOCK_FILE}.new").rename(folder / LOCK_FILE)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned_folders() -> None:
    """Those whose process has ended; what other users made is left alone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, or removed by another client
            _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    """Raises OSError for a folder without a lock, and BlockingIOError for one that is in use."""
    # Without waiting: what somebody else has put there may be a pipe.
    descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
