"""Hostile bytes over the real network at a real node, whose memory and service are watched.

The wide search is in ``tests/sim/test_hostile_bytes.py``; here are the worst of each kind, against
the process that volunteers run.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from pathlib import Path

import msgpack
import psutil
import pytest
import zstandard

from scripts.local_swarm import LocalSwarm, Span, SwarmPlan
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings
from swarm.client.hops import SessionRequest
from swarm.connection import Connection
from swarm.hivemind_network import HivemindNetwork, NetworkSettings
from swarm.protocol.codec import encode
from swarm.protocol.errors import NetworkError, ProtocolError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import Attach, Error, Hello, OpenSession, Step
from swarm.protocol.tensors import DType, Encoding, WireTensor
from swarm.protocol.version import STREAM_PROTOCOL

HIDDEN = 576
BLOCKS = 30
MEMORY_GROWTH_BYTES = 96 * 1024 * 1024


@pytest.fixture(scope="module")
def swarm(smollm2_path: Path) -> Iterator[LocalSwarm]:
    with LocalSwarm(SwarmPlan(smollm2_path, (Span(0, BLOCKS),))) as swarm:
        yield swarm


def frame(tag: int, header: bytes, payload: bytes = b"") -> bytes:
    return (
        struct.pack(">II", len(header) + len(payload), tag << 24 | len(header)) + header + payload
    )


def raw(*messages: Hello | OpenSession | Attach | Step) -> bytes:
    return b"".join(bytes(part) for message in messages for part in encode(message))


def bomb(stated: bool) -> bytes:
    compressor = zstandard.ZstdCompressor(level=3, write_content_size=stated)
    packer = compressor.compressobj(size=1 << 30) if stated else compressor.compressobj()
    zeros = bytes(1 << 22)
    return b"".join(packer.compress(zeros) for _ in range(256)) + packer.flush()


def nested(levels: int) -> bytes:
    return frame(Hello.TAG, b"\x81\x01" + b"\x91" * levels + b"\x00")


def hostile_streams(revision: bytes, client: PeerId) -> list[bytes]:
    """What each stream sends, from its first byte on."""
    hello = Hello(1, 1)
    opening = OpenSession(revision, 0, BLOCKS, 1, 64, int(DType.FLOAT32), 0, client)
    good = WireTensor(DType.FLOAT32, (1, 1, HIDDEN), bytes(HIDDEN * 4))
    not_finite = WireTensor(DType.FLOAT32, (1, 1, HIDDEN), b"\x00\x00\xc0\x7f" * HIDDEN)
    huge = WireTensor(DType.FLOAT32, (1, 1, HIDDEN), b"\xff\xff\x7f\x7f" * HIDDEN)

    def packed(payload: bytes, shape: tuple[int, ...]) -> bytes:
        tensor = [int(DType.FLOAT32), int(Encoding.ZSTD), list(shape)]
        return frame(Step.TAG, msgpack.packb({1: 1, 2: 0, 3: 1, 4: tensor}), payload)

    def step(tensor: WireTensor, number: int = 1, position: int = 0) -> bytes:
        return raw(Step(number, position, 1, tensor))

    session = raw(hello, opening)
    return [
        b"",
        b"\x00" * 64,
        b"\xff" * 64,
        b"GET / HTTP/1.1\r\n\r\n",
        nested(100),
        nested(300),
        nested(3000),
        frame(200, b"\x80"),
        frame(Hello.TAG, b"\xc1"),
        struct.pack(">II", 2**32 - 1, (Hello.TAG << 24) | 0xFFFFFF),
        raw(Hello(7, 9)),
        raw(hello, Attach(bytes(16), 1)),
        raw(hello) + step(good),
        session + packed(bomb(stated=True), (1, 1, HIDDEN)),
        session + packed(bomb(stated=False), (1, 1, HIDDEN)),
        session + packed(b"", (2**31, 2**31, 2**31)),
        session + step(not_finite),
        session + step(huge),
        session + step(good, number=5),
        session + step(good, position=9),
        session + step(good, position=2**21),
        session + step(WireTensor(DType.FLOAT32, (1, 1, 1), bytes(4))),
        session + step(WireTensor(DType.BFLOAT16, (1, 1, HIDDEN), bytes(HIDDEN * 2))),
        session + session,
        raw(hello, OpenSession(bytes(32), 0, BLOCKS, 1, 64, 1, 0, client)),
        raw(hello, OpenSession(revision, 0, 999, 1, 64, 1, 0, client)),
        raw(hello, OpenSession(revision, 0, BLOCKS, 64, 1 << 22, 1, 0, client)),
    ]


async def provoke(network: HivemindNetwork, node: PeerId, content: bytes) -> list[int]:
    """Send, listen until nothing more comes, close; the error codes that came back."""
    codes: list[int] = []
    stream = await network.open(node, STREAM_PROTOCOL)
    async with Connection(stream) as connection:
        connection.maximum_payload_bytes = 1 << 16
        try:
            await stream.send(content)
            async with asyncio.timeout(1.0):
                while True:
                    message = await connection.receive()
                    if isinstance(message, Error):
                        codes.append(message.code)
        except (NetworkError, ProtocolError, TimeoutError):
            return codes


async def serves_well(peers: list[str], revision: bytes) -> None:
    async with await SwarmClient.connect(ClientSettings(peers=tuple(peers))) as client:
        request = SessionRequest(revision, HIDDEN, 1, 8, DType.FLOAT32)
        chain = await client.open_chain(request, number_of_blocks=BLOCKS)
        tensor = WireTensor(DType.FLOAT32, (1, 1, HIDDEN), bytes(HIDDEN * 4))
        result = await chain.step(tensor, 0, output_tokens=1)
        assert result.shape == (1, 1, HIDDEN)
        await chain.close()


def test_the_worst_bytes_of_each_kind(
    swarm: LocalSwarm, smollm2_path: Path, tmp_path: Path
) -> None:
    revision = Checkpoint.open(smollm2_path).revision
    node = swarm.nodes[0]
    process = node_process(node.peer_id, swarm)
    settings = NetworkSettings(
        listen_addresses=("/ip4/127.0.0.1/tcp/0",),
        initial_peers=tuple(swarm.peers),
        serve_directory=False,
    )

    async def main() -> None:
        await serves_well(swarm.peers, revision)
        before_bytes = process.memory_info().rss
        network = await HivemindNetwork.create(tmp_path / "hostile.key", settings)
        try:
            contents = hostile_streams(revision, network.peer_id)
            answers = await asyncio.gather(
                *(provoke(network, PeerId(node.peer_id), content) for content in contents)
            )
        finally:
            await network.close()
        assert sum(1 for codes in answers if codes) >= 20, answers
        assert process.memory_info().rss - before_bytes < MEMORY_GROWTH_BYTES
        await serves_well(swarm.peers, revision)

    asyncio.run(main())
    assert process.is_running()


def node_process(peer_id: str, swarm: LocalSwarm) -> psutil.Process:
    """The python process of a node: the largest one under its keeper."""
    member = next(node for node in swarm.nodes if node.peer_id == peer_id)
    keeper = psutil.Process(member.process.keeper_pid)
    return max(keeper.children(recursive=True), key=lambda process: process.memory_info().rss)
