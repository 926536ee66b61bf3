"""Adapters across a swarm: brought to nodes that lack them, kept through healing and hand-over."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from swarm import virtual_time
from swarm.client.adapter_push import push_adapter
from swarm.connection import Connection
from swarm.protocol.errors import ErrorCode, NetworkError, NoRouteError, ProtocolError, RemoteError
from swarm.protocol.messages import (
    AdapterIndexPart,
    AdapterStatus,
    AdapterTensor,
    Message,
    OpenSession,
    PushAdapter,
    SessionOpened,
)
from swarm.protocol.tensors import DType, WireTensor
from swarm.protocol.version import STREAM_PROTOCOL

SPANS = ((0, 2), (2, 4), (4, 6), (0, 2), (2, 4), (4, 6))
"""A chain of three, and everything twice."""
CHAIN = (0, 1, 2)
REVISION = bytes(range(32))


class Talk:
    """Single tokens, each compared with the toy model that has the adapter from the start."""

    def __init__(self, chain: Any, reference: Any, make_tensor: Any, seed: int) -> None:
        self._chain, self._reference, self._make = chain, reference, make_tensor
        self._random = Random(seed)
        self._length = 0

    async def steps(self, count: int) -> None:
        for _ in range(count):
            sent = self._make(self._random, 1, 1)
            received = await self._chain.step(sent, self._length, output_tokens=1)
            assert bytes(received.data) == self._reference.step(bytes(sent.data), 1, self._length)
            self._length += 1


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    virtual_time.run(main())


def test_each_session_computes_with_its_own_adapter(
    toy_swarm: Any, toy_blocks: Any, toy_adapter: Any, make_tensor: Any
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS[:3])
        await swarm.start()
        one, two = toy_adapter(1), toy_adapter(2)
        async with (
            swarm.chain(adapter=one) as first,
            swarm.chain(adapter=two) as second,
            swarm.chain() as bare,
            swarm.chain(adapter=one) as again,
        ):
            await asyncio.gather(
                *(
                    Talk(chain, toy_blocks(0, 6, 1, adapter_id), make_tensor, seed).steps(12)
                    for seed, (chain, adapter_id) in enumerate(
                        [
                            (first, one.index.adapter_id),
                            (second, two.index.adapter_id),
                            (bare, b""),
                            (again, one.index.adapter_id),
                        ]
                    )
                )
            )
        for node in swarm.nodes:
            assert set(node.engine.adapters.adapter_ids) == {
                one.index.adapter_id,
                two.index.adapter_id,
            }
            # Only those that came first were asked to wait for it.
            assert 2 <= node.counted.codes.count(ErrorCode.ADAPTER_MISSING) <= 3
        await swarm.assert_nothing_left()

    run(main)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("hop", CHAIN)
@pytest.mark.parametrize("drains", [False, True])
def test_replacements_get_the_adapter(
    toy_swarm: Any,
    toy_blocks: Any,
    toy_adapter: Any,
    make_tensor: Any,
    seed: int,
    hop: int,
    drains: bool,
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, seed=seed)
        await swarm.start()
        adapter = toy_adapter(seed)
        async with swarm.chain(*CHAIN, adapter=adapter) as chain:
            talk = Talk(chain, toy_blocks(0, 6, 1, adapter.index.adapter_id), make_tensor, seed)
            await talk.steps(3 + seed)
            if drains:
                swarm.nodes[hop].service.stop_accepting(30.0)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(swarm.nodes[hop].service.emptied())
                    tasks.create_task(talk.steps(8))
            else:
                swarm.network.crash(swarm.nodes[hop].peer.peer_id)
                await talk.steps(8)
            await talk.steps(2)
            assert adapter.index.adapter_id in swarm.nodes[hop + 3].engine.adapters
            assert swarm.nodes[hop + 3].counted.opened == 1
        await swarm.assert_nothing_left()

    run(main)


def test_a_node_that_refuses_the_adapter_is_passed_over(
    toy_swarm: Any, toy_blocks: Any, toy_adapter: Any, make_tensor: Any
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS)
        await swarm.start()
        swarm.nodes[1].engine.adapters.refusal = ErrorCode.ADAPTER_NO_ROOM
        adapter = toy_adapter(1)
        async with swarm.chain(*CHAIN, adapter=adapter) as chain:
            assert [hop.display_name for hop in chain.plan.hops] == ["node 0", "node 4", "node 2"]
            talk = Talk(chain, toy_blocks(0, 6, 1, adapter.index.adapter_id), make_tensor, 1)
            await talk.steps(4)
        for node in swarm.nodes:
            node.engine.adapters.refusal = ErrorCode.ADAPTER_REFUSED
        other = toy_adapter(2)
        with pytest.raises(NoRouteError, match="damaged or does not fit"):
            async with swarm.chain(*CHAIN, adapter=other):
                pass
        await swarm.assert_nothing_left()

    run(main)


def test_a_node_that_does_not_know_adapters_is_no_bare_model(
    toy_swarm: Any, toy_adapter: Any
) -> None:
    """Older nodes leave the field out, in what they read and in what they answer."""

    async def main() -> None:
        swarm = toy_swarm(SPANS[:3])
        await swarm.start()

        async def older(stream: Any) -> None:
            connection = Connection(stream)
            await connection.answer_hello(5.0)
            await connection.receive_only(OpenSession)
            await connection.send(SessionOpened(bytes(16), 64, 4))
            await asyncio.sleep(60)

        await swarm.nodes[1].peer.serve(STREAM_PROTOCOL, older)
        with pytest.raises(NoRouteError, match="computes without the adapter"):
            async with swarm.chain(adapter=toy_adapter(1)):
                pass

    run(main)


async def push_by_hand(swarm: Any, offer: PushAdapter, *messages: Message) -> ErrorCode | None:
    """What node 0 answers to these messages; None when it loads the adapter."""
    stream = await swarm.client.open(swarm.nodes[0].peer.peer_id, STREAM_PROTOCOL, ())
    async with Connection(stream) as connection:
        await connection.say_hello(offer)
        try:
            status = await connection.receive_only(AdapterStatus)
            for message in messages:
                await connection.send(message)
            if not messages:
                return None
            status = await connection.receive_only(AdapterStatus)
        except RemoteError as error:
            return error.code
        assert status.loaded
        return None


def pieces(data: bytes) -> AdapterIndexPart:
    return AdapterIndexPart(tuple(data[at : at + 4096] for at in range(0, len(data), 4096)))


def tensor(module: int, part: int, data: bytes, *, rows: int, columns: int) -> AdapterTensor:
    return AdapterTensor(module, part, WireTensor(DType.FLOAT32, (1, rows, columns), data))


def test_hostile_pushes_are_refused_and_leave_nothing(toy_swarm: Any, toy_adapter: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(((0, 2),))
        await swarm.start()
        adapter = toy_adapter(1)
        index = adapter.index
        encoded = index.encoded
        offer = PushAdapter(index.adapter_id, REVISION, len(encoded))
        (a, b), _ = adapter.tensors[:2]
        good_a = tensor(0, 0, a, rows=2, columns=4)
        good_b = tensor(0, 1, b, rows=4, columns=2)
        flipped = bytes([a[0] ^ 1]) + a[1:]
        other = b"[" * 5000
        cases: list[tuple[ErrorCode, PushAdapter, tuple[Message, ...]]] = [
            (
                ErrorCode.UNKNOWN_MODEL,
                replace(offer, model_revision=bytes(32)),
                (pieces(encoded),),
            ),
            (
                ErrorCode.ADAPTER_REFUSED,
                replace(offer, adapter_id=bytes(32)),
                (pieces(encoded),),
            ),
            (
                ErrorCode.ADAPTER_REFUSED,
                PushAdapter(hashlib.sha256(other).digest(), REVISION, len(other)),
                (pieces(other),),
            ),
            (ErrorCode.ADAPTER_REFUSED, offer, (pieces(encoded + b" "),)),
            (ErrorCode.TOO_LARGE, offer, (good_a,)),
            (ErrorCode.BAD_FIELD, offer, (AdapterIndexPart(()),)),
            (ErrorCode.ADAPTER_REFUSED, offer, (pieces(encoded), good_b)),
            (
                ErrorCode.ADAPTER_REFUSED,
                offer,
                (pieces(encoded), tensor(0, 0, flipped, rows=2, columns=4), good_b),
            ),
            (
                ErrorCode.ADAPTER_REFUSED,
                offer,
                (pieces(encoded), tensor(0, 0, a + a, rows=4, columns=4)),
            ),
            (
                ErrorCode.ADAPTER_REFUSED,
                offer,
                (pieces(encoded), tensor(0, 0, a, rows=4, columns=2)),
            ),
        ]
        for code, start, messages in cases:
            assert await push_by_hand(swarm, start, *messages) is code, code
        stream = await swarm.client.open(swarm.nodes[0].peer.peer_id, STREAM_PROTOCOL, ())
        async with Connection(stream) as connection:  # leaves in the middle
            await connection.say_hello(offer)
            await connection.send(pieces(encoded), good_a)
        assert swarm.nodes[0].engine.adapters.adapter_ids == []
        pushed = await push_adapter(
            swarm.client, swarm.nodes[0].peer.peer_id, (), adapter, model_revision=REVISION
        )
        assert pushed.sent_bytes == 2 * (len(a) + len(b))
        again = await push_adapter(
            swarm.client, swarm.nodes[0].peer.peer_id, (), adapter, model_revision=REVISION
        )
        assert again.sent_bytes == 0
        assert swarm.nodes[0].engine.adapters.adapter_ids == [index.adapter_id]

    run(main)


def test_one_peer_brings_two_at_a_time(toy_swarm: Any, toy_adapter: Any) -> None:
    """Others of it wait their turn, and too many are refused."""

    async def main() -> None:
        swarm = toy_swarm(((0, 2),))
        await swarm.start()
        peer = swarm.nodes[0].peer.peer_id
        connections = []
        for seed in range(16):
            connection = Connection(await swarm.client.open(peer, STREAM_PROTOCOL, ()))
            index = toy_adapter(seed).index
            await connection.say_hello(PushAdapter(index.adapter_id, REVISION, len(index.encoded)))
            connections.append(connection)
        answered = [asyncio.create_task(each.receive_only(AdapterStatus)) for each in connections]
        await asyncio.sleep(3)
        assert [task.done() for task in answered] == [True] * 2 + [False] * 14
        refused = PushAdapter(toy_adapter(99).index.adapter_id, REVISION, 1000)
        assert await push_by_hand(swarm, refused) is ErrorCode.ADAPTER_NO_ROOM
        await connections[0].close()
        await answered[2]
        for connection in connections:
            await connection.close()
        await asyncio.gather(*answered, return_exceptions=True)
        pushed = await push_adapter(
            swarm.client, peer, (), toy_adapter(50), model_revision=REVISION
        )
        assert pushed.sent_bytes

    run(main)


def test_a_slow_bringer_is_given_up(toy_swarm: Any, toy_adapter: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(((0, 2),))
        await swarm.start()
        stream = await swarm.client.open(swarm.nodes[0].peer.peer_id, STREAM_PROTOCOL, ())
        async with Connection(stream) as connection:
            offer = PushAdapter(toy_adapter(1).index.adapter_id, REVISION, 100_000)
            await connection.say_hello(offer)
            await connection.receive_only(AdapterStatus)
            with pytest.raises((NetworkError, RemoteError, ProtocolError)):
                await connection.receive_only(AdapterStatus)

    run(main)


class ToyCatalogue:
    """Knows some adapters by name; ``spoilt`` ones come with wrong bytes."""

    def __init__(self, **adapters: Any) -> None:
        self.adapters = adapters
        self.spoilt: set[str] = set()
        self.asked: list[str] = []

    async def fetch(self, name: str, modules: Any) -> Any:
        self.asked.append(name)
        adapter = self.adapters.get(name)
        if adapter is None:
            return None

        async def read(module: Any) -> list[bytes]:
            tensors: list[bytes] = adapter.read(module)
            return [bytes(len(data)) for data in tensors] if name in self.spoilt else tensors

        return read


def test_a_node_fetches_from_peers_what_is_in_the_catalogue(
    toy_swarm: Any, toy_adapter: Any
) -> None:
    """And takes it from the client when peers have it not, or have something else."""

    async def main() -> None:
        swarm = toy_swarm(((0, 2),))
        known = toy_adapter(1, catalogue_name="known")
        spoilt = toy_adapter(2, catalogue_name="spoilt")
        unknown = toy_adapter(3, catalogue_name="unknown")
        catalogue = ToyCatalogue(known=known, spoilt=spoilt)
        catalogue.spoilt.add("spoilt")
        swarm.nodes[0].service._adapter_intake._catalogue = catalogue
        await swarm.start()
        peer = swarm.nodes[0].peer.peer_id
        for adapter, brought in ((known, False), (spoilt, True), (unknown, True)):
            pushed = await push_adapter(swarm.client, peer, (), adapter, model_revision=REVISION)
            assert (pushed.sent_bytes > 0) is brought
            assert adapter.index.adapter_id in swarm.nodes[0].engine.adapters
        assert catalogue.asked == ["known", "spoilt", "unknown"]

    run(main)
