"""No process outlives its keeper's owner, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from scripts.process_keeper import KeptProcess

REPOSITORY = Path(__file__).parents[3]

# The daemon leaves the process group, as a libp2p daemon might.
WITH_DAEMON = "setsid sleep 1000 & echo started; exec sleep 1000"


def started_below(kept: KeptProcess) -> list[psutil.Process]:
    """The command and its daemon, once it has said that both run."""
    assert kept.stdout is not None
    assert kept.stdout.readline() == b"started\n"
    return list(psutil.Process(kept.keeper_pid).children(recursive=True))


def assert_all_end(processes: list[psutil.Process]) -> None:
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def test_stop_ends_daemons_too() -> None:
    with KeptProcess(["sh", "-c", WITH_DAEMON], stdout=subprocess.PIPE) as kept:
        below = started_below(kept)
        assert kept.poll() is None
        assert kept.stop() == -signal.SIGTERM
        assert_all_end(below)


def test_what_ignores_sigterm_is_killed_after_the_grace() -> None:
    script = "trap '' TERM; " + WITH_DAEMON
    with KeptProcess(["sh", "-c", script], stdout=subprocess.PIPE, grace_s=0.1) as kept:
        below = started_below(kept)
        assert kept.stop() == -signal.SIGKILL
        assert_all_end(below)


def test_kill_is_at_once() -> None:
    with KeptProcess(["sh", "-c", WITH_DAEMON], stdout=subprocess.PIPE, grace_s=1000) as kept:
        below = started_below(kept)
        assert kept.kill() == -signal.SIGKILL
        assert_all_end(below)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9)])
def test_the_exit_code_is_the_commands(script: str, code: int) -> None:
    with KeptProcess(["sh", "-c", script]) as kept:
        assert kept.wait(20) == code


def test_a_missing_program_is_said_so() -> None:
    with KeptProcess(["no-such-program"], stderr=subprocess.PIPE) as kept:
        assert kept.wait(20) == 127


OWNER = f"""
import subprocess
from scripts.process_keeper import KeptProcess
kept = KeptProcess(["sh", "-c", {WITH_DAEMON!r}], stdout=subprocess.PIPE)
kept.stdout.readline()
print("started", flush=True)
kept.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_survives_the_owner(number: signal.Signals) -> None:
    with KeptProcess(
        [sys.executable, "-c", OWNER],
        environment=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
    ) as outer:
        below = started_below(outer)
        assert len(below) == 4  # the owner, its keeper, the command, the daemon
        owner = next(process for process in below if process.ppid() == outer.keeper_pid)
        owner.send_signal(number)
        assert_all_end(below)
