"""Hops die in every way and at every moment; the answer goes on as if nothing had happened.

In the toy model every output depends on every cached entry before it, so that one token lost,
doubled, reordered or at a wrong position shows in all that follow.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from swarm import virtual_time
from swarm.client.chain import Chain, ChainTimeouts
from swarm.client.healing import OPEN_OFFLINE_S
from swarm.journal import JournalBudget
from swarm.memory_network import LinkSettings, MemorySettings
from swarm.protocol.errors import ErrorCode, NoRouteError, ProtocolError

SPANS = ((0, 2), (2, 4), (4, 6), (0, 2), (2, 4), (4, 6), (0, 3), (3, 6))
"""A chain of three and everything twice; the last two have other borders."""
CHAIN = (0, 1, 2)
LINKS = MemorySettings(
    link=LinkSettings(latency_s=0.01, jitter_s=0.004, loss=0.01), give_up_after_s=3600
)
MAXIMUM_TOKENS = 160


class Conversation:
    """Random prompts, single tokens, rollbacks and row orders, each compared with the model."""

    def __init__(
        self, chain: Chain, seed: int, rows: int, toy_blocks: Any, make_tensor: Any
    ) -> None:
        self._chain = chain
        self._random = Random(seed)
        self._rows = rows
        self._make_tensor = make_tensor
        self._reference = toy_blocks(0, 6, rows)
        self._length = 0
        self.steps = 0

    async def step(self, tokens: int | None = None) -> None:
        """One step; the same one again if it is refused."""
        random, rows = self._random, self._rows
        position = random.choice(
            (self._length, random.randint(max(0, self._length - 3), self._length))
        )
        tokens = min(tokens or random.choice((1, 1, 1, 2, 5, 30)), MAXIMUM_TOKENS - position)
        if tokens < 1:
            return
        order = tuple(random.randrange(rows) for _ in range(rows)) if rows > 1 else ()
        output_tokens = random.randint(1, tokens)
        sent = self._make_tensor(random, rows, tokens)
        whole = None
        while whole is None:
            try:
                received = await self._chain.step(
                    sent, position, output_tokens=output_tokens, row_order=order
                )
            except NoRouteError:
                self.on_refusal()
                continue
            whole = self._reference.step(bytes(sent.data), tokens, position, order)
        size = len(whole) // rows
        kept = size * output_tokens // tokens
        expected = b"".join(
            whole[(row + 1) * size - kept : (row + 1) * size] for row in range(rows)
        )
        assert bytes(received.data) == expected, f"step {self.steps} of {tokens} at {position}"
        self._length = position + tokens
        self.steps += 1

    def on_refusal(self) -> None:
        raise AssertionError("there was a replica")

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            await self.step()


@asynccontextmanager
async def talking(
    swarm: Any, toy_blocks: Any, make_tensor: Any, planner: Any, rows: int = 1
) -> AsyncIterator[tuple[Chain, Conversation]]:
    """A chain of a swarm that is started; afterwards nothing is left on its nodes."""
    await swarm.start()
    async with swarm.chain(planner=planner, maximum_tokens=MAXIMUM_TOKENS, rows=rows) as chain:
        yield chain, Conversation(chain, 1, rows, toy_blocks, make_tensor)
    await swarm.assert_nothing_left()


Fault = Callable[[Any], Awaitable[None]]


def converse(
    toy_swarm: Any,
    toy_blocks: Any,
    make_tensor: Any,
    fault: Callable[[Any, Chain], Coroutine[Any, Any, None]],
    *,
    seed: int,
    rows: int = 1,
    steps: int = 25,
    spans: tuple[tuple[int, int], ...] = SPANS,
    timeouts: ChainTimeouts | None = None,
    journal_budget: JournalBudget | None = None,
    on_event: Callable[[float, str], None] | None = None,
) -> None:
    """A conversation during which ``fault`` runs; afterwards nothing is left on living nodes."""

    async def main() -> None:
        swarm = toy_swarm(spans, seed=seed, settings=LINKS, on_event=on_event)
        await swarm.start()
        async with swarm.chain(
            *CHAIN,
            rows=rows,
            maximum_tokens=MAXIMUM_TOKENS,
            timeouts=timeouts,
            journal_budget=journal_budget,
        ) as chain:
            talk = Conversation(chain, seed, rows, toy_blocks, make_tensor)
            faulting = asyncio.create_task(fault(swarm, chain))
            await talk.run(steps)
            await faulting
            await talk.step(1)
            assert chain.hops_through_client == 0
        swarm.network.heal()
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def crash_at(moment_s: float, *nodes: int) -> Callable[[Any, Chain], Coroutine[Any, Any, None]]:
    async def fault(swarm: Any, chain: Chain) -> None:
        await asyncio.sleep(moment_s)
        for node in nodes:
            swarm.network.crash(swarm.nodes[node].peer.peer_id)

    return fault


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("hop", CHAIN)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_hop_dies_at_any_moment(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, hop: int, rows: int
) -> None:
    moment_s = Random(seed).uniform(0, 1.2)
    converse(toy_swarm, toy_blocks, make_tensor, crash_at(moment_s, hop), seed=seed, rows=rows)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("hops", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_several_hops_die_at_once(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, hops: tuple[int, ...]
) -> None:
    moment_s = Random(seed).uniform(0, 1.2)
    converse(toy_swarm, toy_blocks, make_tensor, crash_at(moment_s, *hops), seed=seed, rows=2)


@pytest.mark.parametrize("seed", range(20))
def test_the_replacement_dies_while_it_is_filled(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int
) -> None:
    async def fault(swarm: Any, chain: Chain) -> None:
        random = Random(seed)
        await asyncio.sleep(random.uniform(0.3, 1.2))
        swarm.network.crash(swarm.nodes[1].peer.peer_id)
        # Filling takes some 0.1 s here; node 4 is the one with the same span.
        await asyncio.sleep(random.uniform(0.02, 0.2))
        swarm.network.crash(swarm.nodes[4].peer.peer_id)

    converse(toy_swarm, toy_blocks, make_tensor, fault, seed=seed, rows=2)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("hop", CHAIN)
def test_a_hop_falls_silent(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, hop: int
) -> None:
    """A black hole: no stream breaks, bytes just stop, and later all of them come at once."""

    async def fault(swarm: Any, chain: Chain) -> None:
        await asyncio.sleep(Random(seed).uniform(0, 1.2))
        swarm.network.partition([swarm.nodes[hop].peer.peer_id])
        await asyncio.sleep(8)
        swarm.network.heal()

    converse(toy_swarm, toy_blocks, make_tensor, fault, seed=seed, steps=40)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("pair", [(0, 1), (1, 2)])
def test_two_hops_cannot_reach_each_other_any_more(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, pair: tuple[int, int]
) -> None:
    async def fault(swarm: Any, chain: Chain) -> None:
        await asyncio.sleep(Random(seed).uniform(0, 1.2))
        one, other = (swarm.nodes[node].peer.peer_id for node in pair)
        swarm.network.cut(one, other)

    converse(toy_swarm, toy_blocks, make_tensor, fault, seed=seed)


@pytest.mark.parametrize("seed", range(10))
def test_the_clients_own_network_is_gone_for_a_while(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int
) -> None:
    async def fault(swarm: Any, chain: Chain) -> None:
        await asyncio.sleep(Random(seed).uniform(0, 1.2))
        swarm.network.partition([swarm.client.peer_id])
        await asyncio.sleep(20)
        swarm.network.heal()

    converse(toy_swarm, toy_blocks, make_tensor, fault, seed=seed)


@pytest.mark.parametrize("gone_after_s", [0.0, 0.01, 0.03, 0.05])
def test_a_session_is_opened_once_the_clients_own_network_is_back(
    toy_swarm: Any, make_tensor: Any, gone_after_s: float
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=LINKS)
        await swarm.start()

        async def lose_network() -> None:
            await asyncio.sleep(gone_after_s)
            swarm.network.partition([swarm.client.peer_id])
            await asyncio.sleep(20.0)
            swarm.network.heal()

        losing = asyncio.create_task(lose_network())
        async with swarm.chain(*CHAIN, maximum_tokens=8) as chain:
            assert losing.done()
            opened_s = swarm.clock.monotonic_s()
            await chain.step(make_tensor(Random(1), 1, 4), 0, output_tokens=1)
            assert swarm.clock.monotonic_s() - opened_s < 1.0
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_a_new_session_that_nobody_answers_for_long_is_given_up(toy_swarm: Any) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=LINKS)
        await swarm.start()
        swarm.network.partition([swarm.client.peer_id])
        with pytest.raises(NoRouteError, match="no chain could be opened"):
            async with swarm.chain(*CHAIN, maximum_tokens=8):
                pass
        assert OPEN_OFFLINE_S <= swarm.clock.monotonic_s() < 2 * OPEN_OFFLINE_S

    virtual_time.run(main())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kept_tokens", [0, 20, 60])
def test_lost_journals_are_made_up_for_upstream(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, kept_tokens: int
) -> None:
    """Nodes have room for few tokens in their journals; at worst all comes from the client."""

    async def fault(swarm: Any, chain: Chain) -> None:
        random = Random(seed)
        for node in random.sample(range(3), 2):
            swarm.nodes[node].service.journals.maximum_bytes = kept_tokens * 16
        await asyncio.sleep(random.uniform(0.3, 1.2))
        swarm.network.crash(swarm.nodes[random.choice((1, 2))].peer.peer_id)

    converse(toy_swarm, toy_blocks, make_tensor, fault, seed=seed)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "failure", [ProtocolError(ErrorCode.NOT_FINITE), RuntimeError("secret detail")]
)
def test_a_hop_whose_engine_fails_is_replaced(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, failure: Exception
) -> None:
    async def fault(swarm: Any, chain: Chain) -> None:
        random = Random(seed)
        await asyncio.sleep(random.uniform(0, 1.2))
        swarm.nodes[random.randrange(3)].engine.fail_next = failure

    converse(toy_swarm, toy_blocks, make_tensor, fault, seed=seed)


@pytest.mark.parametrize("seed", range(10))
def test_nodes_come_and_go_all_the_time(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int
) -> None:
    """One node after the other is cut off for a while, twice in a row everybody."""

    async def fault(swarm: Any, chain: Chain) -> None:
        random = Random(seed)
        order = [*range(6), *range(6)]
        random.shuffle(order)
        for node in order:
            await asyncio.sleep(random.uniform(0.1, 0.8))
            swarm.network.partition([swarm.nodes[node].peer.peer_id])
            await asyncio.sleep(random.uniform(1, 8))
            swarm.network.heal()

    converse(toy_swarm, toy_blocks, make_tensor, fault, seed=seed, steps=60, rows=2)


def test_who_says_that_no_number_came_and_who_sent_it_are_both_replaced(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any
) -> None:
    """One of them lies, and which one cannot be told."""

    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=LINKS)
        await swarm.start()
        planner = swarm.planner(*CHAIN)
        async with swarm.chain(planner=planner, maximum_tokens=MAXIMUM_TOKENS) as chain:
            talk = Conversation(chain, 1, 1, toy_blocks, make_tensor)
            await talk.run(5)
            both = {swarm.nodes[hop].peer.peer_id for hop in (1, 2)}
            swarm.nodes[2].engine.fail_next = ProtocolError(ErrorCode.INPUT_NOT_FINITE)
            await talk.run(3)
            assert planner.quarrels == [frozenset(both)]
            assert not planner.failures
            assert not both & {hop.peer_id for hop in chain.plan.hops}
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_two_that_contradict_each_other_are_not_joined_again(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any
) -> None:
    """Where there is nobody else the answer ends instead, and says why."""

    async def main() -> None:
        swarm = toy_swarm(SPANS[:3], settings=LINKS)
        await swarm.start()
        async with swarm.chain(*CHAIN, maximum_tokens=MAXIMUM_TOKENS) as chain:
            talk = Conversation(chain, 1, 1, toy_blocks, make_tensor)
            await talk.run(5)
            swarm.nodes[2].engine.fail_next = ProtocolError(ErrorCode.INPUT_NOT_FINITE)
            with pytest.raises(NoRouteError, match="contradict each other"):
                await chain.step(make_tensor(Random(2), 1, 1), chain.length, output_tokens=1)
        await swarm.assert_nothing_left()

    virtual_time.run(main())


async def is_replaced(
    swarm: Any, chain: Chain, talk: Conversation, hop: int, *, within_steps: int
) -> bool:
    """Whether this node of the chain is given up in so many steps of one token."""
    peer = swarm.nodes[hop].peer.peer_id
    for _ in range(within_steps):
        await talk.step(1)
        if peer not in {planned.peer_id for planned in chain.plan.hops}:
            return True
    return False


@pytest.mark.parametrize("slow", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("others_are_slow", [False, True])
@pytest.mark.parametrize("steps_before", [5, 40])
def test_hops_that_become_slow_are_replaced_if_there_is_something_better(
    toy_swarm: Any,
    toy_blocks: Any,
    make_tensor: Any,
    slow: tuple[int, ...],
    others_are_slow: bool,
    steps_before: int,
) -> None:
    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=LINKS)
        planner = swarm.planner(*CHAIN)
        async with talking(swarm, toy_blocks, make_tensor, planner) as (chain, talk):
            for _ in range(steps_before):
                await talk.step(1)
            for index, node in enumerate(swarm.nodes):
                if index in slow or others_are_slow:
                    node.engine.step_s = 0.5
            for hop in slow:
                replaced = await is_replaced(swarm, chain, talk, hop, within_steps=20)
                assert replaced == (not others_are_slow)

    virtual_time.run(main())


@pytest.mark.parametrize(("rows", "all_are_slow"), [(1, False), (1, True), (2, False)])
def test_a_hop_that_is_slow_from_the_start_is_measured_by_its_promise(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, rows: int, all_are_slow: bool
) -> None:
    """If none of the chain does what was expected, expecting better elsewhere is in vain.

    And nobody promises anything of several rows.
    """

    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=LINKS)
        for index, node in enumerate(swarm.nodes):
            node.engine.step_s = 0.5 if index == 1 or all_are_slow else 0.004
        planner = swarm.planner(*CHAIN)
        planner.promised_block_s = 0.002
        async with talking(swarm, toy_blocks, make_tensor, planner, rows) as (chain, talk):
            replaced = await is_replaced(swarm, chain, talk, 1, within_steps=40)
            assert replaced == (rows == 1 and not all_are_slow)

    virtual_time.run(main())


def test_the_only_hop_of_a_chain_is_replaced_when_it_becomes_slow(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any
) -> None:
    async def main() -> None:
        swarm = toy_swarm(((0, 6), (0, 6)), settings=LINKS)
        planner = swarm.planner(0)
        async with talking(swarm, toy_blocks, make_tensor, planner) as (chain, talk):
            for _ in range(5):
                await talk.step(1)
            swarm.nodes[0].engine.step_s = 0.5
            assert await is_replaced(swarm, chain, talk, 0, within_steps=20)

    virtual_time.run(main())


def test_a_hop_behind_a_link_that_became_slow_is_replaced(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any
) -> None:
    """It computes as fast as ever, but whatever reaches or leaves it takes its time."""

    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=LINKS)
        planner = swarm.planner(*CHAIN)
        async with talking(swarm, toy_blocks, make_tensor, planner) as (chain, talk):
            for _ in range(20):
                await talk.step(1)
            behind = swarm.nodes[1].peer.peer_id
            others = [node.peer.peer_id for node in swarm.nodes if node.peer.peer_id != behind]
            for other in (swarm.client.peer_id, *others):
                swarm.network.set_link(behind, other, LinkSettings(latency_s=0.3))
            assert await is_replaced(swarm, chain, talk, 1, within_steps=20)

    virtual_time.run(main())


def test_replacing_stragglers_that_never_helps_is_done_less_and_less(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any
) -> None:
    """All nodes of some blocks promise a thousandth of what they take."""
    spans = ((0, 2), (2, 4), (4, 6), (2, 4), (2, 4))

    async def main() -> None:
        swarm = toy_swarm(spans, settings=LINKS)
        for index in (1, 3, 4):
            swarm.nodes[index].engine.step_s = 8.0
        planner = swarm.planner(*CHAIN)
        planner.promised_block_s = 0.004
        async with talking(swarm, toy_blocks, make_tensor, planner) as (_, talk):
            started_s = swarm.clock.monotonic_s()
            while swarm.clock.monotonic_s() < started_s + 1000:
                await talk.step(1)
            assert 3 <= len(planner.failures) <= 5

    virtual_time.run(main())


def test_a_hop_that_is_stuck_is_replaced(toy_swarm: Any, toy_blocks: Any, make_tensor: Any) -> None:
    """It answers pings, but the step that it has never ends."""

    async def main() -> None:
        swarm = toy_swarm(SPANS, settings=LINKS)
        await swarm.start()
        async with swarm.chain(*CHAIN, maximum_tokens=MAXIMUM_TOKENS) as chain:
            talk = Conversation(chain, 1, 1, toy_blocks, make_tensor)
            for _ in range(5):
                await talk.step(1)
            swarm.nodes[1].engine.step_s = 10_000.0
            started_s = swarm.clock.monotonic_s()
            await talk.step(1)
            assert swarm.clock.monotonic_s() - started_s < 10
            swarm.nodes[1].engine.step_s = 0.001
        await swarm.assert_nothing_left()

    virtual_time.run(main())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("hop", [0, 1])
def test_a_neighbour_that_hosts_the_lost_blocks_too_takes_them_over(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any, seed: int, hop: int
) -> None:
    """Then two hops of the chain are on the same node."""
    spans = ((0, 3), (0, 6)) if hop == 0 else ((0, 6), (3, 6))

    async def main() -> None:
        swarm = toy_swarm(spans, seed=seed, settings=LINKS)
        await swarm.start()
        planner = swarm.planner(0, 1)
        planner.longest_blocks = 3
        async with swarm.chain(planner=planner, maximum_tokens=MAXIMUM_TOKENS, rows=2) as chain:
            talk = Conversation(chain, seed, 2, toy_blocks, make_tensor)
            await talk.run(8)
            assert len(chain.plan.hops) == 2
            swarm.network.crash(swarm.nodes[hop].peer.peer_id)
            await talk.run(8)
            assert len({planned.peer_id for planned in chain.plan.hops}) == 1
            assert chain.hops_through_client == 0
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_without_a_replica_it_says_so_soon_and_resumes_when_one_joins(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any
) -> None:
    async def main() -> None:
        swarm = toy_swarm((*SPANS[:3], SPANS[1]), settings=LINKS)
        await swarm.start()
        planner = swarm.planner(*CHAIN)
        planner.fails_to_see.add(3)
        async with swarm.chain(planner=planner, maximum_tokens=MAXIMUM_TOKENS) as chain:
            talk = Conversation(chain, 1, 1, toy_blocks, make_tensor)
            await talk.run(8)
            swarm.network.crash(swarm.nodes[1].peer.peer_id)
            started_s = swarm.clock.monotonic_s()
            with pytest.raises(NoRouteError, match="blocks 2-3") as caught:
                await chain.step(make_tensor(Random(2), 1, 1), chain.length, output_tokens=1)
            assert swarm.clock.monotonic_s() - started_s <= 10
            assert set(caught.value.missing_blocks) <= {2, 3}
            planner.fails_to_see.clear()
            await talk.run(8)
        await swarm.assert_nothing_left()

    virtual_time.run(main())


def test_the_same_seed_gives_the_same_run(
    toy_swarm: Any, toy_blocks: Any, make_tensor: Any
) -> None:
    def trace() -> list[tuple[float, str]]:
        events: list[tuple[float, str]] = []
        converse(
            toy_swarm,
            toy_blocks,
            make_tensor,
            crash_at(0.5, 1),
            seed=7,
            on_event=lambda now_s, event: events.append((now_s, event)),
        )
        return events

    first = trace()
    assert first
    assert first == trace()
