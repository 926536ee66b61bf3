"""Faults on the processes of a node: killed, frozen, slowed down, asked to leave.

Applying one takes well under a millisecond and never waits, so that it happens at the moment that
was chosen, even from a callback on an event loop.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import ClassVar, Protocol

import psutil

from scripts.local_swarm import Member

SLOW_PERIOD_S = 0.02
"""About as long as a step, so that each of them is slowed and not only some."""


class Fault(Protocol):
    """Something bad that happens to one node (or to its surroundings)."""

    kind: ClassVar[str]
    ends_node: ClassVar[bool]
    """The node has to be started again afterwards; otherwise ``undo`` makes it well."""

    def apply(self) -> None: ...

    def undo(self) -> None:
        """End the fault; a second call, and one for a node that is gone, do nothing."""


class Processes:
    """The process of a node and those below it (its libp2p daemon), looked up once."""

    def __init__(self, member: Member) -> None:
        (self.node,) = psutil.Process(member.process.keeper_pid).children()
        self.daemons = tuple(self.node.children(recursive=True))

    def signal_node(self, number: signal.Signals) -> None:
        """Send a signal to the node alone; nothing when it is gone."""
        _send(self.node, number)

    def signal_daemons(self, number: signal.Signals) -> None:
        """Send a signal to all that the node has started."""
        for process in self.daemons:
            _send(process, number)

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to the node and to all that it has started."""
        self.signal_node(number)
        self.signal_daemons(number)

    def resident_bytes(self) -> int:
        """Memory of the node and its daemon; 0 when they are gone."""
        total = 0
        for process in (self.node, *self.daemons):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total


def _send(process: psutil.Process, number: signal.Signals) -> None:
    # psutil makes sure that the pid is still that of the process.
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


class Kill:
    """SIGKILL to the node and its daemon, as when the power goes."""

    kind: ClassVar[str] = "kill"
    ends_node: ClassVar[bool] = True

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def apply(self) -> None:
        self._processes.signal_all(signal.SIGKILL)

    def undo(self) -> None:
        """The dead stay dead."""


class Crash:
    """SIGKILL to the node alone; its daemon sees its parent die."""

    kind: ClassVar[str] = "crash"
    ends_node: ClassVar[bool] = True

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def apply(self) -> None:
        self._processes.signal_node(signal.SIGKILL)

    def undo(self) -> None:
        """The dead stay dead."""


class Freeze:
    """SIGSTOP to the node and its daemon: connections stay open, and nothing answers."""

    kind: ClassVar[str] = "freeze"
    ends_node: ClassVar[bool] = False

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def apply(self) -> None:
        self._processes.signal_all(signal.SIGSTOP)

    def undo(self) -> None:
        self._processes.signal_all(signal.SIGCONT)


class Slow:
    """The node runs ``factor`` times slower: it is stopped most of the time, again and again."""

    kind: ClassVar[str] = "slow"
    ends_node: ClassVar[bool] = False

    def __init__(self, processes: Processes, factor: float = 5.0) -> None:
        self._processes = processes
        self._running_s = SLOW_PERIOD_S / factor
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._alternate, name="slow node", daemon=True)

    def apply(self) -> None:
        self._thread.start()

    def undo(self) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _alternate(self) -> None:
        while not self._ended.is_set():
            self._processes.signal_node(signal.SIGSTOP)
            self._ended.wait(SLOW_PERIOD_S - self._running_s)
            self._processes.signal_node(signal.SIGCONT)
            self._ended.wait(self._running_s)


class Drain:
    """SIGTERM to the node: it hands its sessions over and leaves."""

    kind: ClassVar[str] = "drain"
    ends_node: ClassVar[bool] = True

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def apply(self) -> None:
        self._processes.signal_node(signal.SIGTERM)

    def undo(self) -> None:
        """It leaves by itself."""


_FAULTS = (Kill, Crash, Freeze, Slow, Drain)
PROCESS_FAULTS: dict[str, Callable[[Processes], Fault]] = {fault.kind: fault for fault in _FAULTS}
"""By kind; each takes the node's :class:`Processes`."""
ENDING_FAULTS = tuple(fault.kind for fault in _FAULTS if fault.ends_node)
"""After which a node has to be started again."""
