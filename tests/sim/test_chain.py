"""A client's chain and real node services over the memory network, with a toy model."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from swarm import virtual_time
from swarm.client.metrics import ClientMetrics
from swarm.connection import FRAME_GRACE_S, Connection
from swarm.memory_network import LinkSettings, MemorySettings
from swarm.node.service import ServiceLimits
from swarm.protocol.codec import PREFIX_BYTES, encode
from swarm.protocol.errors import (
    ErrorCode,
    NetworkError,
    NoRouteError,
    ProtocolError,
    RemoteError,
)
from swarm.protocol.identity import Identity
from swarm.protocol.messages import (
    Attach,
    Attached,
    CloseSession,
    Error,
    OpenSession,
    SessionClosed,
    SessionOpened,
    SetRoute,
    Step,
)
from swarm.protocol.tensors import DType, WireTensor
from swarm.protocol.version import STREAM_PROTOCOL

SPANS = ((0, 2), (2, 3), (3, 6))
LONG_LINKS = MemorySettings(link=LinkSettings(latency_s=0.025, jitter_s=0.004, loss=0.02))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("rows", [1, 3])
def test_any_session_equals_the_model_in_one_piece(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, rows: int
) -> None:
    """Prompts longer than a step, single tokens, rollbacks and row orders, over bad links."""

    async def main() -> None:
        random = Random(seed)
        swarm = toy_swarm(SPANS, seed=seed, settings=LONG_LINKS)
        await swarm.start()
        reference = toy_blocks(0, 6, rows)
        metrics = ClientMetrics()
        async with swarm.chain(rows=rows, observer=metrics) as chain:
            length = 0
            for _ in range(25):
                position = random.randint(max(0, length - 3), length)
                tokens = random.choice((1, 1, 1, 2, 5, 30))
                if position + tokens > 128:
                    break
                order = tuple(random.randrange(rows) for _ in range(rows)) if rows > 1 else ()
                output_tokens = random.randint(1, tokens)
                sent = make_tensor(random, rows, tokens)
                received = await chain.step(
                    sent, position, output_tokens=output_tokens, row_order=order
                )
                whole = reference.step(bytes(sent.data), tokens, position, order)
                size = len(whole) // rows
                kept = size * output_tokens // tokens
                expected = b"".join(
                    whole[(row + 1) * size - kept : (row + 1) * size] for row in range(rows)
                )
                assert bytes(received.data) == expected, f"seed {seed}"
                assert received.shape == (rows, output_tokens, sent.shape[2])
                length = position + tokens
            assert chain.hops_through_client == 0
        await swarm.assert_nothing_left()
        assert "swarm_client_hops_through_client_total 0.0" in metrics.text()

    virtual_time.run(main())


def test_pieces_of_a_long_prompt_are_in_different_hops_at_the_same_time(
    toy_swarm: Any, make_tensor: Any
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        for node in swarm.nodes:
            node.engine.step_s = 1.0
        await swarm.start()
        async with swarm.chain() as chain:
            started_s = swarm.clock.monotonic_s()
            await chain.step(make_tensor(Random(1), 1, 64), 0, output_tokens=1)
            elapsed_s = swarm.clock.monotonic_s() - started_s
        # 8 pieces through 3 hops of 1 s: 10 s pipelined, 24 s one after the other. The window of
        # 4 steps costs nothing as long as it covers the hops.
        assert 9.99 <= elapsed_s < 10.5
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_on_one_machine_pieces_of_a_long_prompt_go_one_after_the_other(
    toy_swarm: Any, make_tensor: Any
) -> None:
    """Two nodes that compute at once would take each other's cores."""

    async def main() -> None:
        swarm = toy_swarm(SPANS)
        swarm.addresses = ("/ip4/192.168.1.5/tcp/31330",)
        for node in swarm.nodes:
            node.engine.step_s = 1.0
        await swarm.start()
        async with swarm.chain() as chain:
            started_s = swarm.clock.monotonic_s()
            await chain.step(make_tensor(Random(1), 1, 64), 0, output_tokens=1)
            elapsed_s = swarm.clock.monotonic_s() - started_s
        assert 23.99 <= elapsed_s < 24.5, "8 pieces through 3 hops of 1 s"
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_a_step_takes_one_latency_per_link(toy_swarm: Any, make_tensor: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=MemorySettings(link=LinkSettings(latency_s=0.025)))
        await swarm.start()
        async with swarm.chain() as chain:
            await chain.step(make_tensor(Random(1), 1, 1), 0, output_tokens=1)
            started_s = swarm.clock.monotonic_s()
            await chain.step(make_tensor(Random(2), 1, 1), 1, output_tokens=1)
            elapsed_s = swarm.clock.monotonic_s() - started_s
        assert elapsed_s == pytest.approx(4 * 0.025 + 3 * 0.001, rel=0.02)

    virtual_time.run(main())


def test_a_crashed_hop_without_a_replica_is_named(toy_swarm: Any, make_tensor: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        random = Random(1)
        async with swarm.chain() as chain:
            await chain.step(make_tensor(random, 1, 3), 0, output_tokens=1)
            swarm.network.crash(swarm.nodes[1].peer.peer_id)
            with pytest.raises(NoRouteError, match=r"node 1 \(blocks 2-2\)"):
                await chain.step(make_tensor(random, 1, 1), 3, output_tokens=1)
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_a_silent_hop_is_noticed_and_its_neighbours_free_the_session(
    toy_swarm: Any, make_tensor: Any
) -> None:
    """A black hole: no stream breaks, bytes just stop. Pings decide, not the transport."""

    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=MemorySettings(give_up_after_s=3600))
        await swarm.start()
        random = Random(1)
        planner = swarm.planner()
        async with swarm.chain(planner=planner) as chain:
            await chain.step(make_tensor(random, 1, 3), 0, output_tokens=1)
            silent = swarm.nodes[2].peer.peer_id
            swarm.network.partition([silent])
            started_s = swarm.clock.monotonic_s()
            stepping = asyncio.create_task(
                chain.step(make_tensor(random, 1, 1), 3, output_tokens=1)
            )
            assert await planner.first_failure == silent
            assert swarm.clock.monotonic_s() - started_s < 2.5
            with pytest.raises(NoRouteError):
                await stepping
        await swarm.assert_nothing_left()
        assert swarm.clock.monotonic_s() - started_s < 60

    virtual_time.run(main())


def test_a_vanished_client_frees_everything(toy_swarm: Any, make_tensor: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=MemorySettings(give_up_after_s=3600))
        await swarm.start()
        async with swarm.chain() as chain:
            await chain.step(make_tensor(Random(1), 1, 3), 0, output_tokens=1)
            swarm.network.partition([swarm.client.peer_id])
            started_s = swarm.clock.monotonic_s()
            await swarm.assert_nothing_left()
            assert swarm.clock.monotonic_s() - started_s < 40

    virtual_time.run(main())


def test_a_cancelled_step_leaves_nothing(toy_swarm: Any, make_tensor: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        swarm.nodes[1].engine.step_s = 100.0
        await swarm.start()
        async with swarm.chain() as chain:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await chain.step(make_tensor(Random(1), 1, 3), 0, output_tokens=1)
        await swarm.assert_nothing_left()
        assert swarm.clock.monotonic_s() < 20

    virtual_time.run(main())


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ProtocolError(ErrorCode.NOT_FINITE), ErrorCode.NOT_FINITE),
        (RuntimeError("secret detail"), ErrorCode.INTERNAL),
    ],
)
def test_a_failing_engine_ends_its_session_only(
    toy_swarm: Any, make_tensor: Any, failure: Exception, code: ErrorCode
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        async with swarm.chain() as good:
            await good.step(make_tensor(Random(1), 1, 3), 0, output_tokens=1)
            metrics = ClientMetrics()
            async with swarm.chain(observer=metrics) as bad:
                swarm.nodes[1].engine.fail_next = failure
                # When there is no other node, the same one is tried again.
                await bad.step(make_tensor(Random(2), 1, 3), 0, output_tokens=1)
            assert f'retries_total{{reason="{code.name.lower()}"}} 1.0' in metrics.text()
            await good.step(make_tensor(Random(3), 1, 1), 3, output_tokens=1)
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_a_full_node_refuses_and_says_when_to_retry(toy_swarm: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        swarm.nodes[2].engine.free_tokens = 100
        swarm.nodes[2].engine.total_tokens = 100
        await swarm.start()
        with pytest.raises(NoRouteError, match="no room") as caught:
            async with swarm.chain(maximum_tokens=101):
                pass
        assert caught.value.retry_after_ms > 0
        await swarm.assert_nothing_left()

    virtual_time.run(main())


# --- what a hostile peer may try
OPEN = OpenSession(
    model_revision=bytes(range(32)),
    first_block=0,
    end_block=2,
    rows=1,
    maximum_tokens=64,
    wire_dtype=int(DType.FLOAT32),
    wire_encoding=0,
    previous_peer="",
)


async def dial(swarm: Any, node: int, peer: Any = None) -> Connection:
    peer = peer or swarm.client
    return Connection(await peer.open(swarm.nodes[node].peer.peer_id, STREAM_PROTOCOL))


async def refused_code(connection: Connection, *messages: Any) -> ErrorCode:
    with pytest.raises(RemoteError) as caught:
        await connection.say_hello(*messages)
        await connection.receive_only(SessionClosed)
    return caught.value.code


def toy_step(**changes: Any) -> Step:
    message = Step(
        step=1,
        position=0,
        output_tokens=1,
        activations=WireTensor(DType.FLOAT32, (1, 1, 4), bytes(16)),
    )
    return replace(message, **changes)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model_revision": bytes(32)}, ErrorCode.UNKNOWN_MODEL),
        ({"end_block": 3}, ErrorCode.BLOCKS_NOT_HOSTED),
        ({"end_block": 0}, ErrorCode.BAD_FIELD),
        ({"rows": 0}, ErrorCode.BAD_FIELD),
        ({"maximum_tokens": 1 << 20}, ErrorCode.NO_CAPACITY),
        ({"wire_dtype": 77}, ErrorCode.UNSUPPORTED_DTYPE),
        ({"left_padding": (1, 2)}, ErrorCode.BAD_FIELD),
    ],
)
def test_bad_openings_are_refused_with_a_code(
    toy_swarm: Any, changes: dict[str, Any], code: ErrorCode
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        async with await dial(swarm, 0) as connection:
            assert await refused_code(connection, replace(OPEN, **changes)) is code
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_only_the_peer_that_the_session_named_may_send_steps(toy_swarm: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        stranger = swarm.network.join(Identity.generate())
        named = swarm.nodes[1].peer
        async with await dial(swarm, 0) as control:
            await control.say_hello(replace(OPEN, previous_peer=named.peer_id))
            opened = await control.receive_only(SessionOpened)
            attach = Attach(session_id=opened.session_id, route_version=1)
            # Not even the client itself, which owns the session, may inject activations.
            await control.send(toy_step())
            with pytest.raises(RemoteError) as caught:
                await control.receive_only(SessionClosed)
            assert caught.value.code is ErrorCode.NOT_NAMED_BY_SESSION
            async with await dial(swarm, 0, stranger) as other:
                assert await refused_code(other, attach) is ErrorCode.NOT_NAMED_BY_SESSION
            async with await dial(swarm, 0, stranger) as other:
                unknown = replace(attach, session_id=bytes(16))
                assert await refused_code(other, unknown) is ErrorCode.UNKNOWN_SESSION
            async with await dial(swarm, 0, named) as upstream:
                await upstream.say_hello(attach)
                await upstream.receive_only(Attached)
                await upstream.send(toy_step())
                control.maximum_payload_bytes = 64
                assert (await control.receive()).step == 1  # type: ignore[attr-defined]
            assert swarm.nodes[0].counted.steps == 1
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_a_node_dials_only_hosts_of_its_model(toy_swarm: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        victim = swarm.network.join(Identity.generate())
        async with await dial(swarm, 0) as control:
            await control.say_hello(replace(OPEN, previous_peer=swarm.client.peer_id))
            await control.receive_only(SessionOpened)
            await control.send(
                SetRoute(route_version=1, next_peer=victim.peer_id, next_session_id=bytes(16))
            )
            with pytest.raises(RemoteError) as caught:
                await control.receive_only(SessionClosed)
            assert caught.value.code is ErrorCode.NEXT_HOP_UNKNOWN
            # A mistake: the session lives on.
            control.maximum_payload_bytes = 64
            await control.send(toy_step())
            assert (await control.receive()).step == 1  # type: ignore[attr-defined]
            await control.send(CloseSession())
            await control.receive_only(SessionClosed)
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_too_many_mistakes_end_the_session(toy_swarm: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, limits=ServiceLimits(errors_per_stream=3))
        await swarm.start()
        async with await dial(swarm, 0) as control:
            await control.say_hello(replace(OPEN, previous_peer=swarm.client.peer_id))
            await control.receive_only(SessionOpened)
            codes = []
            with pytest.raises(NetworkError):
                while True:
                    await control.send(toy_step(step=7))
                    message = await control.receive()
                    assert isinstance(message, Error)
                    codes.append(message.code)
            assert codes == [int(ErrorCode.GAP)] * 4
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_sessions_and_streams_of_one_peer_are_bounded(toy_swarm: Any) -> None:
    async def main() -> None:
        limits = ServiceLimits(sessions_per_peer=3, streams_per_peer=5)
        swarm = toy_swarm(SPANS, limits=limits)
        await swarm.start()
        connections = []
        for _ in range(3):
            connection = await dial(swarm, 0)
            connections.append(connection)
            await connection.say_hello(OPEN)
            await connection.receive_only(SessionOpened)
        connection = await dial(swarm, 0)
        assert await refused_code(connection, OPEN) is ErrorCode.TOO_MANY_SESSIONS
        await connection.close()
        # Other peers are not affected.
        other = swarm.network.join(Identity.generate())
        async with await dial(swarm, 0, other) as connection:
            await connection.say_hello(OPEN)
            await connection.receive_only(SessionOpened)
        for connection in connections:
            await connection.close()
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_slow_and_silent_peers_are_dropped(toy_swarm: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        stream = await swarm.client.open(swarm.nodes[0].peer.peer_id, STREAM_PROTOCOL)
        async with Connection(stream) as connection:
            # No Hello at all.
            error = await connection.receive()
            assert isinstance(error, Error)
            assert error.code == ErrorCode.TOO_SLOW
        stream = await swarm.client.open(swarm.nodes[0].peer.peer_id, STREAM_PROTOCOL)
        async with Connection(stream) as connection:
            # A frame that begins and never ends.
            await stream.send(b"\x00\x00\x00\x20\x01\x00\x00\x20")
            error = await connection.receive()
            assert isinstance(error, Error)
            assert error.code == ErrorCode.TOO_SLOW
        assert swarm.nodes[0].service.streams == 0
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_a_slow_sender_delays_nobody_else(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any
) -> None:
    """Its step arrives byte by byte; whatever it reserved is free again when it is dropped."""

    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        node, free = swarm.nodes[0], swarm.nodes[0].engine.free_tokens
        header, payload = encode(toy_step())
        stream = await swarm.client.open(node.peer.peer_id, STREAM_PROTOCOL)
        async with Connection(stream) as slow, swarm.chain() as chain:
            await slow.say_hello(replace(OPEN, previous_peer=swarm.client.peer_id))
            await slow.receive_only(SessionOpened)
            began_s = swarm.clock.monotonic_s()

            async def trickle() -> None:
                with suppress(NetworkError):
                    for byte in bytes(header) + bytes(payload):
                        await stream.send(bytes([byte]))
                        await swarm.clock.sleep(1.0)

            async def refused() -> float:
                with pytest.raises(RemoteError) as caught:
                    await slow.receive_only(SessionClosed)
                assert caught.value.code is ErrorCode.TOO_SLOW
                after_s: float = swarm.clock.monotonic_s() - began_s
                return after_s

            reference, random = toy_blocks(0, 6, 1), Random(3)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(trickle())
                dropped = tasks.create_task(refused())
                for position in range(20):
                    sent_s = swarm.clock.monotonic_s()
                    sent = make_tensor(random, 1, 1)
                    received = await chain.step(sent, position, output_tokens=1)
                    expected = reference.step(bytes(sent.data), 1, position)
                    assert bytes(received.data) == expected
                    assert swarm.clock.monotonic_s() - sent_s < 0.1
                    await swarm.clock.sleep(1.0)
            # The prefix of the frame may take its time, what it announces may not.
            assert dropped.result() < PREFIX_BYTES + FRAME_GRACE_S + 2.0
        await swarm.assert_nothing_left()
        assert node.engine.free_tokens == free

    virtual_time.run(main())


def test_idle_sessions_expire_and_are_opened_again_when_needed(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, limits=ServiceLimits(session_idle_s=300))
        await swarm.start()
        reference = toy_blocks(0, 6, 1)
        async with swarm.chain() as chain:
            for position in range(2):
                sent = make_tensor(Random(position), 1, 1)
                received = await chain.step(sent, position, output_tokens=1)
                assert bytes(received.data) == reference.step(bytes(sent.data), 1, position)
                await asyncio.sleep(1000)
        await swarm.assert_nothing_left()
        assert all(node.counted.opened >= 2 for node in swarm.nodes)

    virtual_time.run(main())


def test_a_closing_service_ends_all_sessions_and_streams(toy_swarm: Any, make_tensor: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        async with swarm.chain() as chain:
            await chain.step(make_tensor(Random(1), 1, 3), 0, output_tokens=1)
            await swarm.nodes[1].service.close()
            assert swarm.nodes[1].service.sessions == 0
            assert swarm.nodes[1].service.streams == 0
            with pytest.raises(NoRouteError, match="leaving"):
                await chain.step(make_tensor(Random(1), 1, 1), 3, output_tokens=1)
        await swarm.assert_nothing_left()

    virtual_time.run(main())
