"""Processes that cannot outlive us: neither they nor what they start, however we end.

Each command runs under a keeper, a small process of its own that holds the read end of a pipe.
When the pipe closes, because we said so or because we were killed, the keeper asks the command to
end (SIGTERM), waits a bounded time, kills whatever is left below it and ends with the command's
exit code. On Linux the keeper adopts orphans of the command (a node's libp2p daemon, say), so that
nothing slips away by changing its process group.

This file is both: the library, and, run by its path, the keeper.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

KILL_AT_ONCE = b"k"
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class KeptProcess:
    """A command under its keeper. Leaving the ``with`` block stops it.

    ``grace_s`` bounds what a SIGTERM may take until the rest is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        grace_s: float = 10.0,
    ) -> None:
        self.command = tuple(command)
        self.grace_s = grace_s
        read_end, self._control = os.pipe()
        keeper = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
        try:
            self._keeper = subprocess.Popen(
                [*keeper, str(read_end), str(grace_s), *command],
                pass_fds=(read_end,),
                start_new_session=True,
                env=None if environment is None else dict(environment),
                cwd=folder,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
        except BaseException:
            os.close(self._control)
            self._control = -1
            raise
        finally:
            os.close(read_end)

    @property
    def keeper_pid(self) -> int:
        """The keeper; the command and all it started are below it."""
        return self._keeper.pid

    @property
    def stdout(self) -> IO[bytes] | None:
        """The command's standard output when it was asked for with ``PIPE``."""
        return self._keeper.stdout

    @property
    def stdin(self) -> IO[bytes] | None:
        """The command's standard input when it was asked for with ``PIPE``."""
        return self._keeper.stdin

    def poll(self) -> int | None:
        """The command's exit code (negative: the signal that ended it), None while it runs."""
        return self._keeper.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        return self._keeper.wait(timeout_s)

    def ask_to_stop(self) -> None:
        """Start stopping without waiting, so that several can stop at once."""
        if self._control >= 0:
            os.close(self._control)
            self._control = -1

    def stop(self) -> int:
        """SIGTERM, a bounded wait, then SIGKILL to what is left. The command's exit code."""
        self.ask_to_stop()
        # The keeper's own bound is grace_s; the rest is for a busy machine.
        return self._keeper.wait(self.grace_s + 30.0)

    def kill(self) -> int:
        """SIGKILL to the command and everything below it, as when the power goes."""
        if self._control >= 0 and self.poll() is None:
            os.write(self._control, KILL_AT_ONCE)
        return self.stop()

    def __enter__(self) -> KeptProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        for stream in (self._keeper.stdin, self._keeper.stdout, self._keeper.stderr):
            if stream is not None:
                stream.close()


def _set_process_option(option: int, value: int) -> None:
    """``prctl``; does nothing where there is none, and the process group must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _descendants(root: int) -> list[int]:
    """Processes below ``root``, from /proc; empty where there is none."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _kill_group(group: int) -> None:
    """Where there is no /proc this is what reaches the command's own children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or zombies only
        os.killpg(group, signal.SIGKILL)


def _kill_everything_below() -> None:
    for _ in range(100):  # something may fork while we look; the bound is against a fork bomb
        below = _descendants(os.getpid())
        if not below:
            return
        for process in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _reap_orphans()


def _reap_orphans() -> None:
    while True:
        try:
            process, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            return


def keep(control: int, grace_s: float, command: Sequence[str]) -> int:
    """The keeper's life: start the command, watch it and the pipe, leave nothing behind."""
    _set_process_option(PR_SET_CHILD_SUBREAPER, 1)
    os.set_inheritable(control, False)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = subprocess.Popen(
        command,
        start_new_session=True,
        # Should the keeper itself be killed: it has one thread, so the death signal means just it.
        preexec_fn=lambda: _set_process_option(PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        deadline: float | None = None
        while child.poll() is None:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                break
            for key, _ in selector.select(remaining):
                if key.fd == wake_read:
                    os.read(wake_read, 4096)
                elif os.read(control, 1) == KILL_AT_ONCE:
                    deadline = time.monotonic()
                else:
                    selector.unregister(control)
                    # Only the command itself: it may need its daemons to say goodbye.
                    child.send_signal(signal.SIGTERM)
                    deadline = min(deadline or float("inf"), time.monotonic() + grace_s)
        _kill_group(child.pid)
        status = child.wait()
        _kill_everything_below()
    return status


def main(arguments: Sequence[str]) -> None:
    """``process_keeper.py CONTROL_FD GRACE_S COMMAND...``"""
    control, grace_s, *command = arguments
    try:
        status = keep(int(control), float(grace_s), command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)
    if status < 0:  # end the same way, so that the exit code tells the signal
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
