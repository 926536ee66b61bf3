"""The wires of the network lab: a process that carries IPv4 packets between TUN devices.

Pure parts first: ``Pipe`` decides when a packet arrives, from a seed and from the times handed in.
``Emulator`` moves the packets. It knows nothing of hosts or topologies: ``netlab`` tells it, over a
socket, which pipes there are and which a packet from one port to an address passes. It ends when
that socket closes, and its TUN devices with it.
"""

from __future__ import annotations

import array
import contextlib
import heapq
import itertools
import json
import os
import random
import select
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MESSAGE_BYTES = 65536
PACKET_BYTES = 65536
PACKETS_PER_READ = 64
IPV4_HEADER_BYTES = 20


@dataclass(frozen=True, slots=True)
class Link:
    """One link, alike in both directions."""

    latency_ms: float = 0.0
    """One way; a round trip takes twice as long."""
    jitter_ms: float = 0.0
    """Added to the latency, uniformly from 0 up to this. Packets keep their order."""
    rate_mbit_s: float | None = None
    """None: as fast as the machine carries packets."""
    loss: float = 0.0
    """Share of the packets that vanish, 0 to 1."""
    queue_ms: float = 200.0
    """Packets that would wait longer than this for the rate are dropped, as by a home router."""


@dataclass(slots=True)
class Pipe:
    """One direction of a link."""

    link: Link
    randomness: random.Random
    free_at_s: float = 0.0
    last_arrival_s: float = 0.0
    packets: int = 0
    size_bytes: int = 0
    lost: int = 0

    def arrival_s(self, now_s: float, size_bytes: int) -> float | None:
        """When a packet sent now arrives; None when it is lost. ``now_s`` must not go back."""
        link = self.link
        if link.loss and self.randomness.random() < link.loss:
            self.lost += 1
            return None
        sent_s = now_s
        if link.rate_mbit_s is not None:
            begin_s = max(now_s, self.free_at_s)
            if begin_s - now_s > link.queue_ms / 1e3:
                self.lost += 1
                return None
            sent_s = self.free_at_s = begin_s + size_bytes * 8 / (link.rate_mbit_s * 1e6)
        delay_ms = link.latency_ms
        if link.jitter_ms:
            delay_ms += self.randomness.uniform(0.0, link.jitter_ms)
        self.last_arrival_s = max(self.last_arrival_s, sent_s + delay_ms / 1e3)
        self.packets += 1
        self.size_bytes += size_bytes
        return self.last_arrival_s


@dataclass(slots=True)
class Route:
    """The way of packets from one port to one address (or to all others)."""

    pipes: tuple[Pipe, ...]
    port: int
    cut: bool = False


@dataclass(order=True, slots=True)
class Flight:
    """A packet on its way: at ``at_s`` it reaches the next pipe or, after the last, its port."""

    at_s: float
    number: int
    packet: bytes = field(compare=False)
    route: Route = field(compare=False)
    next_pipe: int = field(compare=False)


class Emulator:
    """Carries packets until the control socket closes."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._ports: dict[int, int] = {}  # file descriptor of each port
        self._pipes: dict[str, Pipe] = {}
        self._routes: dict[tuple[int, bytes], Route] = {}  # address b"": any other
        self._flights: list[Flight] = []
        self._numbers = itertools.count()

    def apply(self, command: dict[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
        """Carry out one command of ``netlab``; its answer."""
        match command:
            case {"do": "port", "port": port}:
                os.set_blocking(descriptors[0], False)
                self._ports[port] = descriptors[0]
            case {"do": "pipe", "pipe": name, "link": link}:
                if name in self._pipes:
                    self._pipes[name].link = Link(**link)
                else:
                    own = random.Random(f"{self._seed}/{name}")
                    self._pipes[name] = Pipe(Link(**link), own)
            case {"do": "route", "port": port, "address": address, "pipes": pipes, "to": to}:
                key = (port, socket.inet_aton(address) if address else b"")
                self._routes[key] = Route(tuple(self._pipes[name] for name in pipes), to)
            case {"do": "cut", "port": port, "address": address, "cut": cut}:
                self._routes[port, socket.inet_aton(address)].cut = cut
            case {"do": "counts"}:
                return {
                    name: {"packets": pipe.packets, "bytes": pipe.size_bytes, "lost": pipe.lost}
                    for name, pipe in self._pipes.items()
                }
            case _:
                raise ValueError(f"unknown command {command}")
        return {}

    def run(self, control: socket.socket) -> None:
        """The loop: commands, packets in, packets that have arrived."""
        while True:
            timeout_s = None
            if self._flights:
                timeout_s = max(0.0, self._flights[0].at_s - time.monotonic())
            # select has microseconds, epoll milliseconds
            waiting = [control.fileno(), *self._ports.values()]
            readable, _, _ = select.select(waiting, [], [], timeout_s)
            if control.fileno() in readable and not self._answer(control):
                return
            for port, descriptor in self._ports.items():
                if descriptor in readable:
                    self._read(port, descriptor)
            self._move(time.monotonic())

    def _answer(self, control: socket.socket) -> bool:
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 1)
        if not message:
            return False
        control.send(json.dumps(self.apply(json.loads(message), descriptors)).encode())
        return True

    def _read(self, port: int, descriptor: int) -> None:
        now_s = time.monotonic()
        for _ in range(PACKETS_PER_READ):
            try:
                packet = os.read(descriptor, PACKET_BYTES)
            except OSError:
                return
            if len(packet) < IPV4_HEADER_BYTES or packet[0] >> 4 != 4:
                continue  # IPv6 of an interface that has just come up
            route = self._routes.get((port, packet[16:20])) or self._routes.get((port, b""))
            if route is not None:
                self._send(Flight(now_s, next(self._numbers), packet, route, 0))

    def _send(self, flight: Flight) -> None:
        """Put the packet on its next pipe, or deliver it after the last."""
        if flight.route.cut:
            return
        if flight.next_pipe == len(flight.route.pipes):
            # A full or closing device loses the packet, as any network may.
            with contextlib.suppress(OSError):
                os.write(self._ports[flight.route.port], flight.packet)
            return
        pipe = flight.route.pipes[flight.next_pipe]
        arrival_s = pipe.arrival_s(flight.at_s, len(flight.packet))
        if arrival_s is not None:
            flight.at_s = arrival_s
            flight.next_pipe += 1
            heapq.heappush(self._flights, flight)

    def _move(self, now_s: float) -> None:
        while self._flights and self._flights[0].at_s <= now_s:
            self._send(heapq.heappop(self._flights))


class EmulatorClient:
    """The other end of the control socket, in the lab's process."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def port(self, port: int, descriptor: int) -> None:
        """Hand over a TUN device; the emulator has its own copy afterwards."""
        self._ask({"do": "port", "port": port}, [descriptor])

    def pipe(self, name: str, link: Link) -> None:
        """Make a pipe, or change it while packets pass."""
        self._ask({"do": "pipe", "pipe": name, "link": asdict(link)})

    def route(self, port: int, address: str, pipes: Sequence[str], to: int) -> None:
        """Packets from ``port`` to ``address`` (empty: any other) pass ``pipes`` to port ``to``."""
        command = {"do": "route", "port": port, "address": address, "pipes": list(pipes), "to": to}
        self._ask(command)

    def cut(self, port: int, address: str, *, cut: bool) -> None:
        """Cut or heal one direction; packets on their way are lost too."""
        self._ask({"do": "cut", "port": port, "address": address, "cut": cut})

    def counts(self) -> dict[str, dict[str, int]]:
        """Packets, bytes and losses of each pipe so far."""
        return self._ask({"do": "counts"})

    def close(self) -> None:
        """End the emulator."""
        self._control.close()

    def _ask(self, command: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        self._control.sendmsg([json.dumps(command).encode()], [rights] if descriptors else [])
        answer = self._control.recv(16 * MESSAGE_BYTES)
        if not answer:
            raise ConnectionError(f"the link emulator refused {command['do']}")
        result: dict[str, Any] = json.loads(answer)
        return result


def main(arguments: Sequence[str]) -> None:
    """``link_emulator.py CONTROL_FD SEED``"""
    # Late packets would be our own jitter: go before the programs under test, where allowed.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    with socket.socket(fileno=int(arguments[0])) as control:
        Emulator(arguments[1]).run(control)


if __name__ == "__main__":
    main(sys.argv[1:])
