"""Whatever bytes a peer sends, in whatever state: an error, a closed stream, and the node goes on.

5,000 examples. After each one the same node must serve a good session, and hold nothing of the bad
one; memory must not grow with what peers claim.
"""

from __future__ import annotations

import asyncio
import resource
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import msgpack
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.connection import Connection
from swarm.protocol.codec import encode
from swarm.protocol.errors import ErrorCode, NetworkError, ProtocolError
from swarm.protocol.messages import (
    MESSAGE_TYPES,
    Attach,
    CloseSession,
    Error,
    Hello,
    Message,
    OpenSession,
    Ping,
    SessionClosed,
    SessionOpened,
    SetRoute,
    Step,
    StepResult,
)
from swarm.protocol.tensors import DType, Encoding, WireTensor
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.virtual_time import VirtualTimeLoop

EXAMPLES = 5000
MEMORY_GROWTH_BYTES = 128 * 1024 * 1024
REACHED = {
    ErrorCode.BAD_FRAME,
    ErrorCode.UNKNOWN_MESSAGE,
    ErrorCode.BAD_FIELD,
    ErrorCode.TOO_LARGE,
    ErrorCode.UNSUPPORTED_DTYPE,
    ErrorCode.UNEXPECTED_MESSAGE,
    ErrorCode.UNKNOWN_SESSION,
    ErrorCode.TOO_SLOW,
}
"""Refusals that the examples must provoke, or they have stopped to test anything."""
REVISION = bytes(range(32))
TENSOR = WireTensor(DType.FLOAT32, (1, 2, 4), bytes(32))

Part = bytes | bytearray | memoryview


def samples(client: str) -> list[Message]:
    """One good message of each kind, and some that are good in form only."""
    step = Step(step=1, position=0, output_tokens=1, activations=TENSOR)
    opening = OpenSession(REVISION, 0, 2, 1, 64, int(DType.FLOAT32), 0, client)
    packed = WireTensor(DType.FLOAT32, (1, 2, 4), bytes(32), Encoding.ZSTD)
    return [
        Hello(1, 1, "test"),
        opening,
        SetRoute(route_version=1, next_peer=client, next_session_id=bytes(16)),
        Attach(bytes(16), 1),
        step,
        Step(step=1, position=0, output_tokens=1, activations=packed),
        StepResult(step=1, position=0, activations=TENSOR),
        Ping(7),
        Error(1),
        CloseSession(),
        SessionOpened(bytes(16), 1, 1),
    ]


def frame(tag: int, header: bytes, payload: Part = b"") -> bytes:
    prefix = struct.pack(">II", len(header) + len(payload), tag << 24 | len(header))
    return prefix + header + bytes(payload)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=64)
    | st.text(max_size=32),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.integers(0, 20) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def hostile_bytes(draw: st.DrawFn) -> bytes:
    """Bytes derived from a good message, or from nothing."""
    message = draw(st.sampled_from(samples("12D3KooWnobody")))
    head, payload = encode(message)
    good = bytes(head) + bytes(payload)
    match draw(st.integers(0, 9)):
        case 0:
            return good[: draw(st.integers(0, len(good)))]
        case 1:
            return good + draw(st.binary(min_size=1, max_size=64))
        case 2:
            return bytes([*good[:4], draw(st.integers(0, 255)), *good[5:]])
        case 3:
            place = draw(st.integers(0, len(good) - 1))
            return good[:place] + draw(st.binary(min_size=1, max_size=4)) + good[place + 1 :]
        case 4:
            sizes = struct.pack(
                ">II", draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**32 - 1))
            )
            return sizes + good[8:]
        case 5:
            values = msgpack.unpackb(bytes(head)[8:], strict_map_key=False)
            field = draw(st.sampled_from([*values, 99]) if values else st.just(99))
            values[field] = draw(ANYTHING)
            return frame(message.TAG, msgpack.packb(values), payload)
        case 6:
            kind = draw(st.sampled_from(MESSAGE_TYPES))
            values = draw(st.dictionaries(st.integers(0, 12), ANYTHING, max_size=12))
            return frame(kind.TAG, msgpack.packb(values), draw(st.binary(max_size=64)))
        case 7:
            claimed = draw(
                st.sampled_from([(1, 2, 4), (1, 1, 2**20), (2**31, 2**31, 2), (1, 0, 4)])
            )
            bomb = draw(st.sampled_from(BOMBS))
            header = {1: 1, 2: 0, 3: 1, 4: [int(DType.FLOAT32), int(Encoding.ZSTD), list(claimed)]}
            return frame(Step.TAG, msgpack.packb(header), bomb)
        case 8:
            codes = [draw(st.integers(0, 255)), draw(st.integers(0, 255)), [1, 2, 4]]
            return frame(Step.TAG, msgpack.packb({1: 1, 2: 0, 3: 1, 4: codes}), bytes(32))
        case _:
            return draw(st.binary(max_size=256))


def _bombs() -> list[bytes]:
    """256 MiB of zeros in a few kilobytes: with the size stated, without it, and twice over."""
    zeros = bytes(1 << 20)
    stated = zstandard.ZstdCompressor(level=3).compressobj(size=256 << 20)
    unstated = zstandard.ZstdCompressor(level=3, write_content_size=False).compressobj()
    bombs = []
    for compressor in (stated, unstated):
        parts = [compressor.compress(zeros) for _ in range(256)]
        bombs.append(b"".join(parts) + compressor.flush())
    return [*bombs, bombs[0] * 2]


BOMBS = _bombs()


class Target:
    """One node in virtual time that all examples attack."""

    def __init__(self, toy_swarm: Any) -> None:
        self.runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        self.swarm: Any = None
        self._toy_swarm = toy_swarm
        self.runner.run(self._start())

    async def _start(self) -> None:
        self.swarm = self._toy_swarm([(0, 2)])
        await self.swarm.start()

    async def attack(self, state: int, hostile: bytes) -> None:
        """Send the bytes in one of three states and wait until the node has made up its mind."""
        node = self.swarm.nodes[0]
        stream = await self.swarm.client.open(node.peer.peer_id, STREAM_PROTOCOL)
        connection = Connection(stream)
        hello, opening, *_ = samples(self.swarm.client.peer_id)
        try:
            if state >= 1:
                await connection.send(hello)
            if state >= 2:
                await connection.send(opening)
            await stream.send(hostile)
            connection.maximum_payload_bytes = 1 << 16
            async with asyncio.timeout(60):  # virtual: a begun frame times out before
                while True:
                    message = await connection.receive()
                    if isinstance(message, SessionClosed):
                        break
        except (NetworkError, TimeoutError, ProtocolError):
            pass
        finally:
            await connection.close()
        while node.service.streams:  # noqa: ASYNC110  (virtual time: costs nothing)
            await asyncio.sleep(1)

    async def check_alive(self, random: Random, make_tensor: Any, toy_blocks: Any) -> None:
        sent = make_tensor(random, 1, 3)
        async with self.swarm.chain(maximum_tokens=8) as chain:
            received = await chain.step(sent, 0, output_tokens=3)
        assert bytes(received.data) == toy_blocks(0, 2, 1).step(bytes(sent.data), 3, 0)
        await self.swarm.assert_nothing_held()


@pytest.fixture
def target(toy_swarm: Any) -> Iterator[Target]:
    target = Target(toy_swarm)
    yield target
    target.runner.close()


@pytest.mark.timeout(900)  # a minute of computing, more where the cores are shared
def test_hostile_bytes_never_hurt(target: Target, make_tensor: Any, toy_blocks: Any) -> None:
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    random = Random(1)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(state=st.integers(0, 2), hostile=hostile_bytes())
    def attack(state: int, hostile: bytes) -> None:
        target.runner.run(target.attack(state, hostile))
        target.runner.run(target.check_alive(random, make_tensor, toy_blocks))

    attack()
    target.runner.run(target.swarm.assert_nothing_left())
    refusals = set(target.swarm.nodes[0].counted.codes)
    assert refusals >= REACHED, f"the attack no longer reaches {REACHED - refusals}"
    assert ErrorCode.INTERNAL not in refusals
    grown_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes
    assert grown_bytes < MEMORY_GROWTH_BYTES
