"""A node presents its vouchers: when the operator is back, in batches, and never twice for pay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from swarm.client.grants import GrantTerms, OperatorGrants
from swarm.client.vouchers import issue_for_ourselves
from swarm.ledger.channel import Signed
from swarm.ledger.node_books import LedgerReader, LedgerStore
from swarm.ledger.operator_client import OperatorClient
from swarm.node.settling import Result, Settling, SettlingTerms
from swarm.operator.api import OperatorApi
from swarm.operator.app import serve
from swarm.operator.books import Books
from swarm.operator.doors import OneThread
from swarm.operator.journal import Journal
from swarm.operator.settings import create_folder, load_settings
from swarm.protocol.errors import NetworkError
from swarm.protocol.ledger_objects import Allowance, Receipt, Voucher, parse, sign
from swarm.protocol.operator_objects import NodeCertificate
from tests.unit.operator.parties import (
    MODEL,
    START,
    TOKEN,
    Client,
    World,
    identity,
    key,
    peer,
    policy,
    public,
)


class StandingClock:
    """Whatever time it is told."""

    def __init__(self) -> None:
        self.now = float(START)
        self.slept: list[float] = []

    def monotonic_s(self) -> float:
        return self.now

    def unix_s(self) -> float:
        return self.now

    async def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)
        self.now += duration_s
        if len(self.slept) > 3:
            raise asyncio.CancelledError


class Desk:
    """An operator in this process that can be away."""

    def __init__(self, folder: Path, clock: StandingClock) -> None:
        keys = [public(f"mint-{number}").hex() for number in range(3)]
        create_folder(folder, "operator.example/ledger", keys, "127.0.0.1:0")
        self.settings = load_settings(folder)
        self.thread = OneThread("books")
        self.clock = clock
        journal = Journal.open(folder / "books.sqlite")
        terms = policy(minimum_node_age_s=0)
        self.settings = replace(self.settings, policy=terms)
        self.world = World(Books(journal, terms, key("operator")))
        self.world.fund("alice", 10**9)
        self.world.mint("public", 10**12)

    def application(self) -> object:
        api = OperatorApi(
            self.settings, self.world.books, self.thread, b"salt", lambda: self.clock.now
        )
        return api.application()


@pytest.fixture
def clock() -> StandingClock:
    return StandingClock()


@pytest.fixture
async def desk(tmp_path: Path, clock: StandingClock) -> AsyncIterator[Desk]:
    created = Desk(tmp_path / "books", clock)
    yield created
    created.thread.close()
    created.world.books.journal.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LedgerStore]:
    opened = LedgerStore.open(tmp_path / "node.ledger")
    yield opened
    await opened.close()


def settling(url: str, tmp_path: Path, store: LedgerStore, clock: StandingClock) -> Settling:
    terms = SettlingTerms(url, [public("operator")], payout=peer("donor"))
    return Settling(terms, identity("node"), tmp_path / "node.ledger", store, clock)


async def keep(
    store: LedgerStore, client: Client, tokens: int, session: int, **change: object
) -> None:
    """What the node has on disk after a session."""
    issued = Signed.of(client.issued)
    await store.begin(issued, client.allowance.serial, "payer")
    sealed = client.voucher("node", tokens, 1, session, **change)
    voucher = parse(Voucher, sealed)
    shared = {field.name for field in fields(Voucher)} & {field.name for field in fields(Receipt)}
    values = {name: getattr(voucher, name) for name in shared}
    receipt = Receipt(**values | {"transcript": "11" * 32}, steps=1, dtype_class="float32")
    signed = Signed.of(sign(receipt, key("node")))
    await store.keep(Signed.of(sealed), signed, tokens * TOKEN)


def books_of(path: Path) -> list[tuple[int, int]]:
    reader = LedgerReader.open(path / "node.ledger")
    try:
        return [(entry.units, entry.settled_units) for entry in reader.channels()]
    finally:
        reader.close()


async def test_it_waits_for_the_operator_and_then_is_paid_once(
    tmp_path: Path, desk: Desk, store: LedgerStore, clock: StandingClock
) -> None:
    client = desk.world.request("alice", units=10**8)
    for session in range(300):  # more than one settlement takes
        await keep(store, client, 2, session)
    own = issue_for_ourselves(clock.now)
    ours = Client(own.key, own.allowance, client.request, own.signed.envelope(Allowance))
    await keep(store, ours, 5, 999)  # self-issued: nobody's money
    away = settling("http://127.0.0.1:9", tmp_path, store, clock)
    with pytest.raises(NetworkError):
        await away.settle()
    with pytest.raises(asyncio.CancelledError):
        await away.run()
    assert clock.slept == [60.0, 300.0, 900.0, 900.0]
    clock.now = START
    async with serve(desk.application(), "127.0.0.1", 0) as url:  # type: ignore[arg-type]
        here = settling(url, tmp_path, store, clock)
        assert await here.settle() == Result(300, 600 * TOKEN, 0)
        assert await here.settle() == Result(0, 0, 0)
        # a node that lost what it noted presents all again, and is paid nothing
        again = LedgerStore.open(tmp_path / "copy.ledger")
        await keep(again, client, 2, 7)
        copy = Settling(
            SettlingTerms(url, [public("operator")]),
            identity("node"),
            tmp_path / "copy.ledger",
            again,
            clock,
        )
        clock.now += 1
        assert await copy.settle() == Result(1, 0, 0)
        await again.close()
    units = books_of(tmp_path)
    assert sum(settled for _, settled in units) == 600 * TOKEN
    assert len(units) == 301
    assert desk.world.books.node(peer("node"))["payout"] == peer("node")  # the copy's wish
    reader = LedgerReader.open(tmp_path / "node.ledger")
    reader.verify()
    reader.close()


async def test_a_certified_node_has_half_at_once(
    tmp_path: Path, desk: Desk, store: LedgerStore, clock: StandingClock
) -> None:
    desk.world.organisation("uni")
    client = desk.world.request("alice", units=10**8)
    await keep(store, client, 100, 0)
    certificate = tmp_path / "certificate.json"
    stated = NodeCertificate(peer("node"), "uni", START, START + 86400)
    certificate.write_text(sign(stated, key("uni")).to_json() + "\n")
    async with serve(desk.application(), "127.0.0.1", 0) as url:  # type: ignore[arg-type]
        terms = SettlingTerms(url, [public("operator")], peer("donor"), certificate)
        here = Settling(terms, identity("node"), tmp_path / "node.ledger", store, clock)
        assert await here.settle() == Result(1, 100 * TOKEN, 0)
    earned = 100 * TOKEN * 97 // 100
    assert desk.world.books.journal.balance(f"user:{peer('donor')}") == earned // 2


async def test_what_is_refused_for_good_is_not_presented_again(
    tmp_path: Path, desk: Desk, store: LedgerStore, clock: StandingClock
) -> None:
    client = desk.world.request("alice", units=100 * TOKEN)
    await keep(store, client, 3, 0)
    await keep(store, client, 3, 1, model="77" * 32)  # no price yet
    await keep(store, client, 3, 2, end_block=31)  # no such block
    await keep(store, client, 40, 3)  # more than the node's part
    async with serve(desk.application(), "127.0.0.1", 0) as url:  # type: ignore[arg-type]
        here = settling(url, tmp_path, store, clock)
        assert await here.settle() == Result(4, 25 * TOKEN, 1)
        assert await here.settle() == Result(2, 0, 0)
    assert MODEL != "77" * 32


async def test_a_grant_that_was_drawn_ahead_is_used_once_and_while_it_lasts(
    desk: Desk, clock: StandingClock
) -> None:
    terms = GrantTerms("", public("operator"), 10**6, identity("alice"))
    async with (
        serve(desk.application(), "127.0.0.1", 0) as url,  # type: ignore[arg-type]
        OperatorClient(url) as operator,
    ):
        grants = OperatorGrants(terms, operator, clock)
        reserved = desk.world.books.journal.balance("holds")
        await grants.draw_ahead()
        await grants.draw_ahead()  # one is enough
        assert desk.world.books.journal.balance("holds") == reserved + 10**6
        first, second = await grants.take(), await grants.take()
        assert first is not None
        assert second is not None
        assert first.allowance.serial != second.allowance.serial
        assert desk.world.books.journal.balance("holds") == reserved + 2 * 10**6
        await grants.draw_ahead()
        clock.now += 3600  # too old for a session
        fresh = await grants.take()
        assert fresh is not None
        assert fresh.allowance.expires_unix_s > clock.now + 3000
        await grants.draw_ahead()
    async with OperatorClient(url) as away:
        grants._operator = away
        assert await grants.take() is not None  # nobody had to be asked
        assert await grants.take() is None


async def test_a_client_asks_for_an_allowance_and_goes_on_without(
    desk: Desk, clock: StandingClock
) -> None:
    terms = GrantTerms("", public("operator"), 10**6)
    async with (
        serve(desk.application(), "127.0.0.1", 0) as url,  # type: ignore[arg-type]
        OperatorClient(url) as operator,
    ):
        grant = await OperatorGrants(terms, operator, clock).take()
        assert grant is not None
        assert grant.allowance.allowance_class == "anonymous"
        grant.signed.verify(Allowance)
        funded = replace(terms, account=identity("alice"))
        grant = await OperatorGrants(funded, operator, clock).take()
        assert grant is not None
        assert grant.allowance.allowance_class == "funded"
        poor = OperatorGrants(replace(terms, account=identity("bob")), operator, clock)
        assert await poor.take() is None
        impostor = OperatorGrants(replace(terms, operator_key=public("x")), operator, clock)
        assert await impostor.take() is None
    async with OperatorClient(url) as operator:
        away = OperatorGrants(terms, operator, clock)
        assert await away.take() is None
        assert await away.take() is None  # not asked again for a minute
