"""A stream within one process behaves like one over the network."""

from __future__ import annotations

import asyncio

import pytest

from swarm.local_stream import WINDOW_BYTES, stream_to_ourselves
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import PeerId

PEER = PeerId("12D3KooWJW6bMxNDtTZ541p4vx3TKSgDJcpztXaH58UWd45yn5LC")


async def test_bytes_arrive_in_order_on_both_sides() -> None:
    one, other = stream_to_ourselves(PEER)
    await one.send(b"ab", memoryview(b"cd"))
    await other.send(b"xyz")
    assert await other.receive_exactly(3) == b"abc"
    assert await one.receive_exactly(3) == b"xyz"
    assert await other.receive_exactly(1) == b"d"
    assert one.remote_peer == other.remote_peer == PEER


async def test_a_sender_waits_for_a_slow_reader() -> None:
    one, other = stream_to_ourselves(PEER)
    sending = asyncio.create_task(one.send(bytes(WINDOW_BYTES), b"1"))
    await other.receive_exactly(1)
    await asyncio.wait_for(sending, 5)
    blocked = asyncio.create_task(one.send(bytes(2 * WINDOW_BYTES)))
    done, _ = await asyncio.wait({blocked}, timeout=0.01)
    assert not done
    await other.receive_exactly(3 * WINDOW_BYTES)
    await asyncio.wait_for(blocked, 5)


@pytest.mark.parametrize("closer", [0, 1])
async def test_closing_ends_both_directions(closer: int) -> None:
    ends = stream_to_ourselves(PEER)
    reading = asyncio.create_task(ends[0].receive_exactly(1))
    filling = asyncio.create_task(ends[0].send(bytes(2 * WINDOW_BYTES)))
    await asyncio.sleep(0)
    await ends[closer].close()
    await ends[closer].close()
    with pytest.raises(NetworkError):
        await reading
    await asyncio.wait_for(filling, 5)
    for end in ends:
        with pytest.raises(NetworkError):
            await end.send(b"late")
