"""A network lab on one machine: hosts in network namespaces, joined by emulated links.

Real TCP, QUIC and NAT run over links with latency, jitter, rate and loss that can be cut and
healed, without a kernel that has netem. Each host is a network namespace with a TUN device, and
``link_emulator`` carries the packets between them. Only programs started on the hosts get traffic;
the hosts reach neither this machine nor what it is connected to.

The namespaces have no names and the devices are not persistent: the kernel takes both away when the
last process in them ends, and all of these end with us, even when we are killed. So there is
nothing to clean up after a crash. Needs Linux, root, /dev/net/tun and iproute2; nftables for NAT.

    python -m scripts.netlab check
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.table import Table

from scripts.link_emulator import EmulatorClient, Link
from scripts.network_namespace import command_prefix, new_namespace, open_tun, run_inside
from scripts.process_keeper import KeptProcess

__all__ = ["Gateway", "Host", "Lab", "LabUnavailable", "Link", "why_unavailable"]

PUBLIC_NETWORK = "44.99"
"""Looks like the internet, so that peers tell their public addresses from those behind a router."""
INSIDE_NETWORK = "10.{}"  # the gateways count up from 100
MTU_BYTES = 1500
MASQUERADE = """
table ip lab {
    chain out {
        type nat hook postrouting priority srcnat
        oifname "lab0" masquerade
    }
    chain in {
        type filter hook input priority filter
        iifname "lab0" ct state new drop
    }
}
"""
"""What comes uninvited is dropped, as home routers do; otherwise it would take the port that a hole
is to be punched from."""
PROBE = Path(__file__).with_name("network_probe.py")


class LabUnavailable(Exception):
    """This machine cannot run the lab; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Port:
    """A TUN device that is plugged into the emulator."""

    number: int
    address: str


class Host:
    """A test host: a network namespace with one address."""

    def __init__(self, name: str, namespace: int, port: Port) -> None:
        self.name = name
        self.namespace = namespace
        self.port = port
        self._processes: list[KeptProcess] = []

    @property
    def address(self) -> str:
        return self.port.address

    @property
    def command_prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs on this host, while the lab lives."""
        return command_prefix(self.namespace)

    def popen(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        grace_s: float = 10.0,
    ) -> KeptProcess:
        """Start a program on this host; it ends with the lab at the latest."""
        process = KeptProcess(
            [*self.command_prefix, *command],
            environment=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            grace_s=grace_s,
        )
        self._processes.append(process)
        return process

    def run(self, command: Sequence[str], *, timeout_s: float = 60.0, text: str = "") -> str:
        """Run a program on this host to its end; its standard output.

        Raises subprocess.CalledProcessError (with stderr) and subprocess.TimeoutExpired.
        """
        done = subprocess.run(
            [*self.command_prefix, *command],
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
        return done.stdout

    def close(self) -> None:
        """End its programs and let the namespace go."""
        for process in self._processes:
            process.ask_to_stop()
        for process in self._processes:
            with process:
                pass
        os.close(self.namespace)


class Gateway(Host):
    """A home router: hosts behind it share its address by masquerading (nftables)."""

    def __init__(self, name: str, namespace: int, port: Port, inside: Port) -> None:
        super().__init__(name, namespace, port)
        self.inside = inside


class Lab:
    """Hosts and links; leaving the ``with`` block ends everything. Raises LabUnavailable.

    The same seed gives the same losses and jitter for the same packets. Between hosts without a
    link nothing passes.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._hosts: list[Host] = []
        self._ports = 0
        self._inside_networks = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lab:
        reason = why_unavailable()
        if reason is not None:
            raise LabUnavailable(reason)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        script = str(Path(__file__).with_name("link_emulator.py"))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", script, str(theirs.fileno()), str(self._seed)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._emulator = EmulatorClient(ours)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for host in self._hosts:
            host.close()
        self._hosts.clear()
        self._emulator.close()
        if self._process is not None:
            self._process.wait(30.0)

    def host(self, name: str, *, behind: Gateway | None = None, link: Link | None = None) -> Host:
        """A new host, in the open or behind a gateway (``link``: its way to that gateway)."""
        if behind is None:
            namespace, port = self._new_host(PUBLIC_NETWORK)
            host = Host(name, namespace, port)
        else:
            network = behind.inside.address.rpartition(".")[0].rpartition(".")[0]
            namespace, port = self._new_host(network)
            host = Host(name, namespace, port)
            host.run(["ip", "route", "add", "default", "dev", "lab0"])
            self._pipes(f"{name}-{behind.name}", link or Link())
            up, down = f"{name}-{behind.name}/up", f"{name}-{behind.name}/down"
            self._emulator.route(port.number, "", [up], behind.inside.number)
            self._emulator.route(behind.inside.number, port.address, [down], port.number)
        self._hosts.append(host)
        return host

    def gateway(self, name: str) -> Gateway:
        """A NAT router; ``host(..., behind=it)`` puts hosts behind it. Link it like any host."""
        if shutil.which("nft") is None:
            raise LabUnavailable("NAT needs the package nftables")
        namespace, port = self._new_host(PUBLIC_NETWORK)
        self._inside_networks += 1
        inside = self._new_port(
            INSIDE_NETWORK.format(99 + self._inside_networks), "lab1", namespace
        )
        gateway = Gateway(name, namespace, port, inside)
        gateway.run(["tee", "/proc/sys/net/ipv4/ip_forward"], text="1")
        gateway.run(["nft", "-f", "-"], text=MASQUERADE)
        self._hosts.append(gateway)
        return gateway

    def link(self, one: Host, other: Host, link: Link) -> None:
        """Join two hosts by a link of their own, or change the link they have."""
        name = f"{one.name}-{other.name}"
        self._pipes(name, link)
        self._emulator.route(one.port.number, other.address, [f"{name}/up"], other.port.number)
        self._emulator.route(other.port.number, one.address, [f"{name}/down"], one.port.number)

    def star(self, hosts: Sequence[Host], link: Link) -> None:
        """Join hosts through a router: any two are ``link`` apart, and each shares its own rate.

        A host's access link has the rate both ways and half of latency and jitter; the loss of
        ``link`` is that of the whole way.
        """
        loss = 1 - (1 - link.loss) ** 0.5
        half_ms, half_jitter_ms = link.latency_ms / 2, link.jitter_ms / 2
        access = replace(link, latency_ms=half_ms, jitter_ms=half_jitter_ms, loss=loss)
        for host in hosts:
            self._pipes(host.name, access)
        for one in hosts:
            for other in hosts:
                if one is not other:
                    pipes = [f"{one.name}/up", f"{other.name}/down"]
                    self._emulator.route(one.port.number, other.address, pipes, other.port.number)

    def cut(self, one: Host, other: Host) -> None:
        """Let nothing pass between two linked hosts, without telling them."""
        self._set_cut(one, other, cut=True)

    def heal(self, one: Host, other: Host) -> None:
        """Undo ``cut``."""
        self._set_cut(one, other, cut=False)

    def counts(self) -> dict[str, dict[str, int]]:
        """Packets, bytes and losses by pipe: ``"a-b/up"`` of links, ``"a/up"`` of a star."""
        return self._emulator.counts()

    def _set_cut(self, one: Host, other: Host, *, cut: bool) -> None:
        self._emulator.cut(one.port.number, other.address, cut=cut)
        self._emulator.cut(other.port.number, one.address, cut=cut)

    def _pipes(self, name: str, link: Link) -> None:
        self._emulator.pipe(f"{name}/up", link)
        self._emulator.pipe(f"{name}/down", link)

    def _new_host(self, network: str) -> tuple[int, Port]:
        namespace = new_namespace()
        try:
            run_inside(namespace, "ip", "link", "set", "lo", "up")
            return namespace, self._new_port(network, "lab0", namespace)
        except BaseException:
            os.close(namespace)
            raise

    def _new_port(self, network: str, device: str, namespace: int) -> Port:
        self._ports += 1
        port = Port(self._ports, f"{network}.{self._ports // 250}.{self._ports % 250 + 1}")
        tun = open_tun(namespace, device)
        try:
            run_inside(namespace, "ip", "addr", "add", f"{port.address}/16", "dev", device)
            mtu = str(MTU_BYTES)
            run_inside(namespace, "ip", "link", "set", device, "mtu", mtu, "up")
            self._emulator.port(port.number, tun)
        finally:
            os.close(tun)
        return port


def why_unavailable() -> str | None:
    """What keeps this machine from running the lab; None when nothing does."""
    if sys.platform != "linux":
        return "the network lab needs Linux"
    if os.geteuid() != 0:
        return "the network lab needs root, for network namespaces"
    if not Path("/dev/net/tun").exists():
        return "the network lab needs /dev/net/tun"
    for program in ("ip", "nsenter"):
        if shutil.which(program) is None:
            return f"the network lab needs the program {program!r} (iproute2, util-linux)"
    try:
        os.close(new_namespace())
    except OSError as error:
        return f"the network lab cannot make network namespaces: {error.strerror}"
    return None


def measure(one: Host, other: Host, probe: str, amount: int, *, timeout_s: float = 60.0) -> float:
    """Let ``network_probe`` measure from ``one`` to ``other`` over TCP.

    ``"round-trip"``: the median in ms of ``amount`` echoes. ``"rate"``: Mbit/s of payload while
    sending ``amount`` bytes.
    """
    python = [sys.executable, "-I", "-S", str(PROBE)]
    with other.popen([*python, "serve", other.address], stdout=subprocess.PIPE) as server:
        if server.stdout is None:
            raise RuntimeError("the probe has no standard output")
        port = server.stdout.readline().decode().strip()
        answer = one.run([*python, probe, other.address, port, str(amount)], timeout_s=timeout_s)
    return float(json.loads(answer))


def check(console: Console) -> bool:
    """Build two hosts, measure them against what the link states, print a table."""
    link = Link(latency_ms=25, rate_mbit_s=100)
    rows: list[tuple[str, str, str, bool]] = []
    with console.status("measuring"), Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        lab.link(a, b, link)
        round_trip_ms = measure(a, b, "round-trip", 20)
        rows.append(("round trip", "50 ms", f"{round_trip_ms:.1f} ms", 49 < round_trip_ms < 55))
        rate = measure(a, b, "rate", 20_000_000)
        rows.append(("rate", "100 Mbit/s", f"{rate:.0f} Mbit/s of payload", 70 < rate < 100))
        lab.cut(a, b)
        try:
            measure(a, b, "round-trip", 1, timeout_s=1.0)
            rows.append(("cut", "nothing passes", "something passed", False))
        except subprocess.TimeoutExpired:
            rows.append(("cut", "nothing passes", "nothing passes", True))
        lab.heal(a, b)
        healed_ms = measure(a, b, "round-trip", 5)
        rows.append(("healed", "50 ms", f"{healed_ms:.1f} ms", 49 < healed_ms < 55))
    table = Table("what", "stated", "measured", "")
    for what, stated, measured, good in rows:
        table.add_row(what, stated, measured, "[green]ok[/]" if good else "[red]off[/]")
    console.print(table)
    return all(good for *_, good in rows)


def main() -> None:
    """``python -m scripts.netlab check``"""
    parser = argparse.ArgumentParser(prog="python -m scripts.netlab")
    parser.add_argument("command", choices=["check"], help="measure two hosts against their link")
    parser.parse_args()
    console = Console()
    try:
        sys.exit(0 if check(console) else 1)
    except (LabUnavailable, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
