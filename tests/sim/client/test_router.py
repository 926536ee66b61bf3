"""The router among nodes that tell their load, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from swarm.client.bans import FailureKind
from swarm.client.known_nodes import INTEREST_S, MEASUREMENT_AGE_S, REFRESH_S
from swarm.client.router import LONGEST_WAIT_S, SHORTEST_WAIT_S
from swarm.ledger.rules import is_eligible, route_seed
from swarm.membership import SHARDS_PER_READ
from swarm.protocol.errors import NetworkError, NoRouteError
from swarm.protocol.policy import Policy
from swarm.protocol.records import NodeState
from swarm.protocol.tensors import DType
from swarm.routing import SAMPLE, ChainPlan

QuietSwarm = Any
Simulate = Callable[[Coroutine[Any, Any, None]], None]


def spans(plan: ChainPlan) -> list[tuple[str, int, int]]:
    return [(hop.peer_id, hop.first_block, hop.end_block) for hop in plan.hops]


async def many_sessions(
    swarm: QuietSwarm, clients: int, sessions: int, *, lasting_s: float, within_s: float
) -> None:
    """Each client opens ``sessions``, at random moments."""
    dice = random.Random(7)

    async def after(pause_s: float, client: Any) -> None:
        await asyncio.sleep(pause_s)
        await client.session(lasting_s)

    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            client = swarm.client(number)
            for _ in range(sessions):
                tasks.create_task(after(within_s * dice.random(), client))


def shares(swarm: QuietSwarm) -> list[float]:
    total = sum(node.served for node in swarm.nodes)
    return [node.served / total for node in swarm.nodes]


# --- load ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("clients", "sessions"), [(200, 1), (20, 10)])
def test_concurrent_sessions_spread_over_equal_nodes(
    quiet_swarm: type[QuietSwarm], simulate: Simulate, clients: int, sessions: int
) -> None:
    """200 sessions, all at the same time, on 10 nodes."""

    async def story() -> None:
        swarm = quiet_swarm()
        for _ in range(10):
            await swarm.add()
        await many_sessions(swarm, clients, sessions, lasting_s=1000, within_s=10)
        assert sum(shares(swarm)) == pytest.approx(1.0)
        assert max(shares(swarm)) <= 1.3 / 10

    simulate(story())


def test_a_burst_of_one_client_spreads(quiet_swarm: type[QuietSwarm], simulate: Simulate) -> None:
    """Planned at the same moment, when every node is still idle."""

    async def story() -> None:
        swarm = quiet_swarm()
        for _ in range(4):
            await swarm.add()
        await many_sessions(swarm, 1, 8, lasting_s=10, within_s=0)
        assert [node.served for node in swarm.nodes] == [2] * 4

    simulate(story())


def test_eight_clients_share_two_equal_nodes(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        for _ in range(2):
            await swarm.add()
        await many_sessions(swarm, 8, 10, lasting_s=10, within_s=100)
        assert max(shares(swarm)) <= 0.65

    simulate(story())


@pytest.mark.parametrize(
    "slow",
    [
        {"decode_tokens_per_s": 100, "batched_tokens_per_s": 1000, "block_s": 0.01},
        {"latency_s": 0.15},
        {"answers_after_s": 2.0},
    ],
)
def test_a_slow_replica_is_avoided(
    quiet_swarm: type[QuietSwarm], simulate: Simulate, slow: dict[str, Any]
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        await swarm.add()
        await swarm.add(**slow)
        await many_sessions(swarm, 8, 25, lasting_s=10, within_s=250)
        assert shares(swarm)[1] < 0.05

    simulate(story())


@pytest.mark.parametrize("claims", [1.0, 0.0])
def test_a_liar_gets_sessions_only_until_it_was_measured(
    quiet_swarm: type[QuietSwarm], simulate: Simulate, claims: float
) -> None:
    """Whether it lies in its record only, or also when it says how long a step took."""

    async def story() -> None:
        swarm = quiet_swarm()
        await swarm.add()
        liar = await swarm.add(decode_tokens_per_s=1_000_000, block_s=0.05, claims=claims)
        client = swarm.client()
        plans = [await client.session(10) for _ in range(20)]
        assert [plan.hops[0].peer_id == liar.peer.peer_id for plan in plans] == [True] + [
            False
        ] * 19
        await asyncio.sleep(MEASUREMENT_AGE_S)  # it may be another machine by now
        assert (await client.session(10)).hops[0].peer_id == liar.peer.peer_id

    simulate(story())


@pytest.mark.parametrize("wanted", [5, 0])
def test_an_allowance_of_public_money_goes_to_nodes_that_it_can_pay(
    quiet_swarm: type[QuietSwarm], simulate: Simulate, wanted: int
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        for _ in range(10):
            await swarm.add()
        seed = route_seed(b"beacon", "07" * 16, nodes_per_block=10, wanted=wanted)
        drawn = {node.peer.peer_id for node in swarm.nodes if is_eligible(seed, node.peer.peer_id)}
        assert bool(drawn) == bool(wanted)
        client = swarm.client(route_seed=seed)
        plans = [await client.session(10) for _ in range(20)]
        served = {hop.peer_id for plan in plans for hop in plan.hops}
        if drawn:
            assert len(drawn) < 10
            assert served == drawn
        else:  # where nobody was drawn, answers come all the same
            assert served
        assert all(plan.expected_step_s < 1.0 for plan in plans)

    simulate(story())


# --- who is asked --------------------------------------------------------------------------------
def test_a_vast_swarm_is_neither_read_nor_asked_as_a_whole(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm(shards=64)
        for number in range(3000):
            await swarm.add(first_block=number % 3 * 10, end_block=number % 3 * 10 + 10)
        client = swarm.client()
        for _ in range(10):
            assert len((await client.router.plan(0, 30)).hops) == 3
        assert swarm.shards_read == SHARDS_PER_READ
        assert sum(node.questions for node in swarm.nodes) <= 10 * SAMPLE

    simulate(story())


def test_equal_seeds_make_equal_choices(quiet_swarm: type[QuietSwarm], simulate: Simulate) -> None:
    made: list[list[list[tuple[str, int, int]]]] = []

    async def story(client_number: int) -> None:
        swarm = quiet_swarm(shards=8)
        for number in range(300):
            await swarm.add(first_block=number % 2 * 15, end_block=number % 2 * 15 + 15)
        client = swarm.client(client_number)
        made.append([spans(await client.router.plan(0, 30)) for _ in range(5)])

    for client_number in (1, 1, 2):
        simulate(story(client_number))
    assert made[0] == made[1] != made[2]


def test_only_hosts_of_the_gap_are_asked(quiet_swarm: type[QuietSwarm], simulate: Simulate) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        first, lost, spare, last = [
            await swarm.add(first_block=first, end_block=first + 10) for first in (0, 10, 10, 20)
        ]
        plan = await swarm.client().router.plan(
            10,
            20,
            excluded={lost.peer.peer_id},
            previous=first.peer.peer_id,
            following=last.peer.peer_id,
        )
        assert spans(plan) == [(spare.peer.peer_id, 10, 20)]
        assert [node.questions for node in swarm.nodes] == [0, 0, 1, 0]

    simulate(story())


# --- nodes that fail -----------------------------------------------------------------------------
def test_a_silent_node_holds_nobody_up_for_long(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        good, frozen = await swarm.add(), await swarm.add(answers_after_s=1000)
        client, loop = swarm.client(), asyncio.get_running_loop()
        await client.known.refresh(older_than_s=0)
        started_s = loop.time()
        assert spans(await client.router.plan(0, 30)) == [(good.peer.peer_id, 0, 30)]
        assert loop.time() - started_s == pytest.approx(SHORTEST_WAIT_S)
        started_s = loop.time()
        await client.router.plan(0, 30)
        assert loop.time() - started_s < 0.1  # it is not even asked
        assert frozen.questions == 1
        await asyncio.sleep(5)
        await client.router.plan(0, 30)
        assert frozen.questions == 2

    simulate(story())


def test_late_answers_are_waited_for_when_they_are_needed(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        await swarm.add(end_block=10)
        late = await swarm.add(first_block=10, answers_after_s=LONGEST_WAIT_S - 1)
        plan = await swarm.client().router.plan(0, 30)
        assert plan.hops[1].peer_id == late.peer.peer_id

    simulate(story())


def test_far_nodes_are_found_in_a_far_swarm(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    """Each answer takes two round trips of 300 ms."""

    async def story() -> None:
        swarm = quiet_swarm()
        for first_block in (0, 10, 20):
            await swarm.add(first_block=first_block, end_block=first_block + 10, latency_s=0.15)
        assert len((await swarm.client().router.plan(0, 30)).hops) == 3

    simulate(story())


def test_a_ban_never_leaves_a_user_without_a_chain(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        only, one, other = [
            await swarm.add(first_block=first, end_block=first + 15) for first in (0, 15, 15)
        ]
        client = swarm.client()
        for banned in (only, one):
            client.router.failed(banned.peer.peer_id, FailureKind.BROKEN)
        for _ in range(5):
            plan = await client.router.plan(0, 30)
            assert [hop.peer_id for hop in plan.hops] == [only.peer.peer_id, other.peer.peer_id]
            assert plan.expected_step_s < 1

    simulate(story())


# --- no route ------------------------------------------------------------------------------------
def test_errors_say_what_is_missing_and_why(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        await swarm.add(end_block=10)
        gone, wrong, silent, lost, busy = [
            await swarm.add(first_block=10, **changes)
            for changes in (
                {"state": NodeState.DRAINING, "accepting": False},
                {"dtype": DType.BFLOAT16},
                {"answers_after_s": 1000.0},
                {},
                {"accepting": False},
            )
        ]
        client = swarm.client(dtype=DType.FLOAT32)
        with pytest.raises(NoRouteError) as caught:
            await client.router.plan(0, 30, excluded={lost.peer.peer_id})
        assert caught.value.missing_blocks == tuple(range(10, 30))
        assert str(caught.value) == (
            "blocks 10-29 are served by nobody else (1 draining, 1 of another dtype, "
            "1 stopped answering, 1 taking no sessions, 1 tried before or in use)"
        )
        assert (wrong.questions, lost.questions) == (0, 0)
        assert gone.questions > 0  # its state may be out of date
        assert (busy.questions, silent.questions) == (1, 1)  # in spite of three attempts

    simulate(story())


def test_a_node_that_is_back_is_used_although_its_record_says_otherwise(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        back = await swarm.add(state=NodeState.DRAINING)
        plan = await swarm.client().router.plan(0, 30)
        assert [hop.peer_id for hop in plan.hops] == [back.peer.peer_id]
        ready = await swarm.add()
        client = swarm.client()
        for _ in range(5):
            plan = await client.router.plan(0, 30)
            assert [hop.peer_id for hop in plan.hops] == [ready.peer.peer_id]

    simulate(story())


def test_no_room_is_no_missing_block(quiet_swarm: type[QuietSwarm], simulate: Simulate) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        await swarm.add(cache_tokens_free=99)
        await swarm.add(cache_tokens_free=50, cache_tokens_total=50)
        with pytest.raises(NoRouteError, match="no room for this session now; try again in 2 s"):
            await swarm.client(tokens=100).router.plan(0, 30)
        assert (await swarm.client(tokens=99).router.plan(0, 30)).hops

    simulate(story())


# --- the view of the directory -------------------------------------------------------------------
def test_a_node_that_joined_is_found_when_it_is_needed(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        old = await swarm.add()
        client = swarm.client()
        await client.router.plan(0, 30)
        new = await swarm.add()
        await client.router.plan(0, 30)
        assert swarm.shards_read == 1
        await asyncio.sleep(1)
        plan = await client.router.plan(0, 30, excluded={old.peer.peer_id})
        assert plan.hops[0].peer_id == new.peer.peer_id

    simulate(story())


def test_other_shards_are_read_when_the_known_ones_have_no_chain(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm(shards=8)
        nodes = [
            await swarm.add(first_block=15 * (at == 0), end_block=30 if at == 0 else 15)
            for at in range(40)
        ]
        for seed in range(10):
            client = swarm.client(seed)
            for _ in range(8):  # each may read three times; then a user is told and tries again
                try:
                    plan = await client.router.plan(0, 30)
                except NoRouteError:
                    await asyncio.sleep(1)
                else:
                    break
            assert plan.hops[-1].peer_id == nodes[0].peer.peer_id

    simulate(story())


def test_the_view_stays_young_while_the_client_is_interested(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        node = await swarm.add()
        client = swarm.client()
        await client.router.plan(0, 30)
        watch = asyncio.create_task(client.known.run())
        swarm.unreachable = True  # one failure is no matter
        await asyncio.sleep(1.5 * REFRESH_S)
        swarm.unreachable = False
        second = await swarm.add()
        await asyncio.sleep(REFRESH_S)
        known = {record.peer_id for record in client.known.records}
        assert known == {node.peer.peer_id, second.peer.peer_id}
        swarm.nodes.remove(node)  # its record ends
        await asyncio.sleep(swarm.lifetime_s + REFRESH_S)
        assert [record.peer_id for record in client.known.records] == [second.peer.peer_id]
        await asyncio.sleep(INTEREST_S)
        assert watch.done()

    simulate(story())


def test_without_a_directory_the_client_is_told(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        await swarm.add()
        swarm.unreachable = True
        with pytest.raises(NetworkError, match="nobody answers"):
            await swarm.client().router.plan(0, 30)

    simulate(story())


def test_what_is_known_serves_while_the_directory_is_out_of_reach(
    quiet_swarm: type[QuietSwarm], simulate: Simulate
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        (near, spare) = [await swarm.add(addresses=("/ip4/10.0.0.1/tcp/1",)) for _ in range(2)]
        client = swarm.client()
        await client.router.plan(0, 30)
        swarm.unreachable = True
        await asyncio.sleep(80.0)
        assert await client.router.plan(0, 30)
        for node in (near, spare):
            swarm.network.crash(node.peer.peer_id)
        # Blocks are named, and not the directory blamed.
        with pytest.raises(NoRouteError, match="served by nobody else"):
            await client.router.plan(0, 30)

    simulate(story())


@pytest.mark.parametrize(
    ("address", "needs", "expected"),
    [
        ("/ip4/10.0.0.1/tcp/1", {}, False),
        # Our own network cannot be the reason for these:
        ("/ip4/127.0.0.1/tcp/1", {}, True),
        ("/ip4/10.0.0.1/tcp/1", {"policy": Policy(countries=("KE",))}, True),
    ],
)
def test_silence_of_others_says_when_the_own_network_is_gone(
    quiet_swarm: type[QuietSwarm],
    simulate: Simulate,
    address: str,
    needs: dict[str, Any],
    expected: bool,
) -> None:
    async def story() -> None:
        swarm = quiet_swarm()
        node = await swarm.add(addresses=(address,))
        client = swarm.client(**needs)
        await client.known.refresh(older_than_s=0.0)
        assert await client.router.is_online()
        swarm.network.crash(node.peer.peer_id)
        assert await client.router.is_online() is expected

    simulate(story())
