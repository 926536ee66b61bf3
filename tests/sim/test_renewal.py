"""Answers that cost more than one allowance, with an operator's real books."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from swarm import virtual_time
from swarm.client.bans import FailureKind
from swarm.client.chain import Chain
from swarm.client.grants import GrantTerms, OperatorGrants
from swarm.client.vouchers import Grant, issue_for_ourselves
from swarm.ledger.node_books import LedgerReader
from swarm.operator.books import Books
from swarm.operator.journal import Journal
from swarm.protocol.envelope import Envelope
from swarm.protocol.errors import AllowanceRefused, ErrorCode, ProtocolError, RemoteError
from swarm.protocol.ledger_objects import Allowance, Voucher, verified
from swarm.protocol.operator_objects import ModelPrice
from swarm.protocol.tensors import WireTensor
from tests.sim.conftest import REVISION, ToyBlocks, ToySwarm, toy_tensor
from tests.unit.operator.parties import NETWORKS, World, identity, key, policy, public

SPANS = ((0, 4), (4, 8), (8, 12))
NAMES = ("one", "two", "three")
TOKEN = 4 * 7 * 10
"""Units of one token at one hop: blocks, MFLOP of one, weight of decoding."""
NODES_PER_ALLOWANCE = 4
UNITS = 20 * TOKEN * NODES_PER_ALLOWANCE
"""Of one allowance: 20 tokens at each node."""
TOKENS = 100


class Desk:
    """An operator's books in place of ``OperatorClient``: the same answers, without HTTP."""

    def __init__(self, swarm: ToySwarm, funds: int) -> None:
        terms = policy(minimum_node_age_s=0, nodes_per_allowance=NODES_PER_ALLOWANCE)
        books = Books(Journal.in_memory(), terms, key("operator"))
        self._swarm = swarm
        self.world = World(books, self.now)
        self.world.order(ModelPrice(REVISION.hex(), SPANS[-1][1], 7, self.now), "operator")
        self.world.fund("alice", funds)
        for name in NAMES:
            self.world.enrol(name)

    @property
    def now(self) -> int:
        return int(self._swarm.clock.unix_s())

    async def allowance(self, request: Envelope, operator_key: bytes) -> tuple[Allowance, Envelope]:
        try:
            sealed = self.world.books.issue(request, NETWORKS, self.now)
        except ProtocolError as error:
            raise RemoteError(error.code) from error
        return verified(Allowance, sealed, operator_key), sealed

    def grants(self, units: int = UNITS, *, must_pay: bool = False) -> OperatorGrants:
        terms = GrantTerms("", public("operator"), units, identity("alice"), must_pay=must_pay)
        return OperatorGrants(terms, self, self._swarm.clock)  # type: ignore[arg-type]

    def settle_all(self) -> int:
        """Units that the nodes are paid. Nothing of what they have is refused."""
        self.world.now = self.now
        paid = 0
        for name, node in zip(NAMES, self._swarm.nodes, strict=True):
            entries = list(LedgerReader(node.books).channels())
            vouchers = [entry.voucher.envelope(Voucher) for entry in entries]
            outcomes = self.world.settle(name, *vouchers)
            for outcome, entry in zip(outcomes, entries, strict=True):
                assert (outcome.paid_units, outcome.code) == (entry.units, None)
                paid += outcome.paid_units
        return paid


def with_fallback(grants: OperatorGrants, swarm: ToySwarm) -> Callable[[], Any]:
    """As ``client.app`` asks."""

    async def ask() -> Grant:
        granted = await grants.take()
        return granted or issue_for_ourselves(swarm.clock.unix_s())

    return ask


class Talk:
    """Single tokens, each compared with the model."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._random = Random(1)
        self._reference = ToyBlocks(0, SPANS[-1][1], 1)
        self.length = 0

    async def go_on(self, tokens: int) -> None:
        for _ in range(tokens):
            sent: WireTensor = toy_tensor(self._random, 1, 1)
            received = await self._chain.step(sent, self.length, output_tokens=1)
            expected = self._reference.step(bytes(sent.data), 1, self.length)
            assert bytes(received.data) == expected, f"token {self.length}"
            self.length += 1


async def start(funds: int) -> tuple[ToySwarm, Desk]:
    swarm = ToySwarm(
        SPANS,
        identities=[identity(name) for name in NAMES],
        operators=[public("operator")],
    )
    await swarm.start()
    return swarm, Desk(swarm, funds)


def test_a_long_answer_draws_on_one_allowance_after_the_other() -> None:
    """In the same sessions: nothing is computed again, nobody is refused, all are paid."""

    async def run() -> None:
        swarm, desk = await start(funds=100 * UNITS)
        planner = swarm.planner()
        ask = with_fallback(desk.grants(), swarm)
        async with swarm.chain(planner=planner, ask_grant=ask) as chain:
            await Talk(chain).go_on(TOKENS)
        await swarm.assert_nothing_left()
        assert not planner.failures
        for node in swarm.nodes:
            assert (node.counted.opened, node.counted.replayed_tokens) == (1, 0)
            assert not node.counted.codes
        serials = {account.grant.allowance.serial for account in chain.accounts}
        assert len(serials) == -(-TOKENS // 20)
        assert {account.grant.allowance.allowance_class for account in chain.accounts} == {"funded"}
        assert desk.settle_all() == TOKENS * len(SPANS) * TOKEN
        ended = [
            event
            for node in swarm.nodes
            for event in LedgerReader(node.books).events()
            if event.kind == "channel"
        ]
        assert len(ended) == len(SPANS) * len(serials)

    virtual_time.run(run())


def test_when_nothing_is_left_the_answer_goes_on_for_nothing() -> None:
    """On an allowance of the client's own, which hops take in a session of that class."""

    async def run() -> None:
        swarm, desk = await start(funds=2 * UNITS)
        planner = swarm.planner()
        ask = with_fallback(desk.grants(), swarm)
        async with swarm.chain(planner=planner, ask_grant=ask) as chain:
            await Talk(chain).go_on(TOKENS)
            classes = [account.grant.allowance.allowance_class for account in chain.accounts]
            assert classes == ["funded"] * 6 + ["local"] * 3
        await swarm.assert_nothing_left()
        assert not planner.failures
        assert [node.counted.opened for node in swarm.nodes] == [2, 2, 2]

    virtual_time.run(run())


def test_an_account_that_must_pay_and_has_nothing_left_is_told_so() -> None:
    async def run() -> None:
        swarm, desk = await start(funds=2 * UNITS)
        planner = swarm.planner()
        async with swarm.chain(planner=planner, ask_grant=desk.grants(must_pay=True).take) as chain:
            talk = Talk(chain)
            with pytest.raises(AllowanceRefused) as refused:
                await talk.go_on(TOKENS)
            assert refused.value.is_used_up
            assert talk.length == 40
            # Filled up, it goes on where it was.
            desk.world.fund("alice", 10 * UNITS)
            await swarm.clock.sleep(10.0)
            await talk.go_on(TOKENS - talk.length)
        await swarm.assert_nothing_left()
        assert not planner.failures
        assert desk.settle_all() == TOKENS * len(SPANS) * TOKEN

    virtual_time.run(run())


def test_an_allowance_that_ends_is_renewed_also_when_nobody_spoke_then() -> None:
    """One renewal is in time, one after a pause over the end; nothing is opened anew or unpaid."""
    steps = 16

    async def run() -> None:
        swarm, desk = await start(funds=100 * UNITS)
        planner = swarm.planner()
        ask = with_fallback(desk.grants(), swarm)
        async with swarm.chain(planner=planner, ask_grant=ask) as chain:
            talk = Talk(chain)
            for _ in range(steps):
                await talk.go_on(1)
                await swarm.clock.sleep(500.0)  # an allowance lasts for an hour and some minutes
        await swarm.assert_nothing_left()
        assert not planner.failures
        assert not any(node.counted.codes for node in swarm.nodes)
        assert [node.counted.opened for node in swarm.nodes] == [1, 1, 1]
        assert len({account.grant.allowance.serial for account in chain.accounts}) == 3
        assert desk.settle_all() == steps * len(SPANS) * TOKEN

    virtual_time.run(run())


def test_a_node_that_asks_more_than_others_is_believed_once() -> None:
    """It refuses what the client thinks is covered: first the client looks for its own mistake."""

    async def run() -> None:
        swarm = ToySwarm(
            (*SPANS, SPANS[1]),
            identities=[identity(name) for name in (*NAMES, "four")],
            operators=[public("operator")],
        )
        await swarm.start()
        dear = swarm.nodes[1].service._ledger
        assert dear is not None
        dear.terms = type(dear.terms)(REVISION, 70, "float32", operators=[public("operator")])
        desk = Desk(swarm, funds=1000 * UNITS)
        planner = swarm.planner(0, 1, 2, 3)
        ask = with_fallback(desk.grants(), swarm)
        async with swarm.chain(planner=planner, ask_grant=ask) as chain:
            await Talk(chain).go_on(TOKENS)
        await swarm.assert_nothing_left()
        assert swarm.nodes[1].counted.codes == [ErrorCode.OVER_LIMIT] * 2
        assert planner.failures == [(swarm.nodes[1].peer.peer_id, FailureKind.REFUSED)]

    virtual_time.run(run())
