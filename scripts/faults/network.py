"""Faults on the network: a swarm whose members live on hosts of the network lab, and lose them.

The client lives on a host of its own, too: the main thread enters the host's namespace before it
starts any other thread or process, and all of these are then born there.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from scripts.local_swarm import Place
from scripts.netlab import Host, Lab, Link

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
LINK = Link(latency_ms=1.0)
OFFLINE = "offline"
"""The kind of fault that hits no node: the client itself has no network for a while."""
OFFLINE_S = 20.0


def enter_namespace(namespace: int) -> None:
    """Move the calling thread to a network namespace. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def run_in_namespace(namespace: int, function: Callable[[], T]) -> T:
    """What ``function`` returns or raises in a thread of its own in the namespace."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            enter_namespace(namespace)
            results.append(function())
        except BaseException as error:  # carried to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class Hosts:
    """A star of hosts for a client, a seed and nodes."""

    def __init__(self, lab: Lab, nodes: int) -> None:
        self._lab = lab
        # Cuts come from the event loop and are healed from threads; the lab knows one at a time.
        self._lock = threading.Lock()
        self.client = lab.host("client")
        self.seed = lab.host("seed")
        self.nodes = tuple(lab.host(f"node-{number}") for number in range(1, nodes + 1))
        self._all = (self.client, self.seed, *self.nodes)
        lab.star(self._all, LINK)

    @property
    def places(self) -> tuple[Place, ...]:
        """Of the seed and the nodes, in order."""
        return tuple(Place(host.address, host.command_prefix) for host in self._all[1:])

    def of(self, place: Place) -> Host:
        """The host at which a place is."""
        return next(host for host in self._all if host.address == place.listen_ip)

    def cut_off(self, host: Host) -> None:
        """Let nothing pass between a host and all others."""
        with self._lock:
            for other in self._others(host):
                self._lab.cut(host, other)

    def connect(self, host: Host) -> None:
        """Undo ``cut_off``."""
        with self._lock:
            for other in self._others(host):
                self._lab.heal(host, other)

    def _others(self, host: Host) -> Sequence[Host]:
        return [other for other in self._all if other is not host]


class Partition:
    """A host is cut off: its processes run, and nothing that they send arrives."""

    kind: ClassVar[str] = "partition"
    ends_node: ClassVar[bool] = False

    def __init__(self, hosts: Hosts, host: Host) -> None:
        self._hosts = hosts
        self._host = host

    def apply(self) -> None:
        self._hosts.cut_off(self._host)

    def undo(self) -> None:
        self._hosts.connect(self._host)
