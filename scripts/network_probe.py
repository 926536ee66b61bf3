"""Measures a network from the inside: a server and its clients over TCP, standard library only.

``netlab`` runs it on its hosts:

    network_probe.py serve ADDRESS                    # prints its port
    network_probe.py round-trip ADDRESS PORT COUNT    # prints the median in ms
    network_probe.py rate ADDRESS PORT SIZE_BYTES     # prints Mbit/s of payload
    network_probe.py origin ADDRESS PORT              # prints the address that the server sees
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence

ECHO, SINK, ORIGIN = b"e", b"s", b"o"
CHUNK_BYTES = 65536


def serve(address: str) -> None:
    """Answer connections until killed. The first byte chooses what a connection is for."""
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            connection, peer = server.accept()
            threading.Thread(target=_answer, args=(connection, peer[0]), daemon=True).start()


def _answer(connection: socket.socket, peer: str) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        purpose = connection.recv(1)
        if purpose == ORIGIN:
            connection.sendall(peer.encode())
        while purpose in (ECHO, SINK):
            received = connection.recv(CHUNK_BYTES)
            if not received:
                break
            if purpose == ECHO:
                connection.sendall(received)
        if purpose == SINK:
            connection.sendall(b"!")


def _connect(address: str, port: int, purpose: bytes) -> socket.socket:
    connection = socket.create_connection((address, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(purpose)
    return connection


def round_trip_ms(address: str, port: int, count: int) -> float:
    """The median of ``count`` one-byte echoes on one connection."""
    times_ms = []
    with _connect(address, port, ECHO) as connection:
        for _ in range(count):
            started_s = time.monotonic()
            connection.sendall(b"x")
            connection.recv(1)
            times_ms.append((time.monotonic() - started_s) * 1e3)
    return statistics.median(times_ms)


def rate_mbit_s(address: str, port: int, size_bytes: int) -> float:
    """Payload per second until the server has it all, TCP's slow start included."""
    chunk = bytes(CHUNK_BYTES)
    with _connect(address, port, SINK) as connection:
        started_s = time.monotonic()
        for offset in range(0, size_bytes, CHUNK_BYTES):
            connection.sendall(chunk[: size_bytes - offset])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        return size_bytes * 8 / (time.monotonic() - started_s) / 1e6


def origin(address: str, port: int) -> str:
    """The address under which the server knows us."""
    with _connect(address, port, ORIGIN) as connection:
        return connection.recv(64).decode()


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    match arguments:
        case ["serve", address]:
            serve(address)
        case ["round-trip", address, port, count]:
            print(json.dumps(round_trip_ms(address, int(port), int(count))))
        case ["rate", address, port, size_bytes]:
            print(json.dumps(rate_mbit_s(address, int(port), int(size_bytes))))
        case ["origin", address, port]:
            print(json.dumps(origin(address, int(port))))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
