"""Vouchers and receipts between a client and nodes in memory: what is kept, and what is refused."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest

from swarm import virtual_time
from swarm.client.vouchers import Grant, issue_for_ourselves
from swarm.connection import Connection
from swarm.ledger import transcript
from swarm.ledger.channel import Equivocation, Signed
from swarm.ledger.exposure import WINDOW, uncovered
from swarm.ledger.node_books import LedgerReader
from swarm.node import accounts
from swarm.node.accounts import FUNDED_PRIORITY, Standing
from swarm.protocol import ledger_objects, strict_json
from swarm.protocol.envelope import parse_envelope
from swarm.protocol.errors import ErrorCode, ProtocolError, RemoteError
from swarm.protocol.identity import Identity
from swarm.protocol.ledger_objects import Receipt, Voucher, Work, sign, verified
from swarm.protocol.messages import (
    CloseSession,
    JournalChunk,
    OpenSession,
    ReadTranscript,
    RenewAllowance,
    RouteReady,
    SessionClosed,
    SessionOpened,
    SetRoute,
    SignedReceipt,
    SignedVoucher,
    Step,
    StepResult,
    TranscriptEnd,
    TranscriptPart,
)
from swarm.protocol.tensors import WireTensor
from swarm.protocol.version import STREAM_PROTOCOL
from tests.sim.conftest import REVISION, ToySwarm

MakeTensor = Callable[[Random, int, int], WireTensor]


def books_of(database: sqlite3.Connection) -> list[Voucher]:
    reader = LedgerReader(database)
    reader.verify()
    return [strict_json.parse(Voucher, entry.voucher.payload) for entry in reader.channels()]


def test_a_long_answer_is_vouched_for(toy_swarm: type[ToySwarm], make_tensor: MakeTensor) -> None:
    """Both sides have the same counts, and never was more than two windows on trust."""

    async def run() -> None:
        swarm = toy_swarm([(0, 4), (4, 8), (8, 12)])
        await swarm.start()
        random = Random(1)
        most_on_trust = 0
        async with swarm.chain(maximum_tokens=256) as chain:
            await chain.step(make_tensor(random, 1, 100), 0, output_tokens=1)
            for position in range(100, 200):
                await chain.step(make_tensor(random, 1, 1), position, output_tokens=1)
                for account in chain.accounts:
                    most_on_trust = max(most_on_trust, uncovered(account.issued, account.covered))
        assert 0 < most_on_trust <= WINDOW
        await swarm.assert_nothing_left()
        assert len(chain.accounts) == 3
        for node, account in zip(swarm.nodes, chain.accounts, strict=True):
            (voucher,) = books_of(node.books)
            assert account.receipt is not None
            # The prompt travels in pieces, each of which reads the weights once.
            assert voucher.prefill_tokens + voucher.decode_tokens == 200
            assert voucher.decode_tokens >= 101
            assert voucher.work == account.receipt.work == account.issued
            assert account.receipt.steps == node.counted.steps
            events = [event.kind for event in LedgerReader(node.books).events()]
            assert events == ["allowance", "channel"]

    virtual_time.run(run())


def test_what_a_hop_handled_can_be_checked(
    toy_swarm: type[ToySwarm], make_tensor: MakeTensor
) -> None:
    """Transcript, receipt and journal of each hop fit to each other and to its neighbours."""

    async def run() -> None:
        swarm = toy_swarm([(0, 4), (4, 8)])
        await swarm.start()
        random = Random(2)
        async with swarm.chain(maximum_tokens=64) as chain:
            for position in range(40):
                await chain.step(make_tensor(random, 1, 1), position, output_tokens=1)
            links: list[list[transcript.Link]] = []
            for account, node in zip(chain.accounts, swarm.nodes, strict=True):
                (hop,) = node.service.hops
                session = hop.session_id
                stream = await swarm.client.open(node.peer.peer_id, STREAM_PROTOCOL)
                async with Connection(stream) as connection:
                    connection.maximum_payload_bytes = 1 << 20
                    await connection.say_hello(ReadTranscript(session, end_position=40))
                    shown: list[transcript.Link] = []
                    positions = 0
                    while not isinstance(message := await connection.receive(), TranscriptEnd):
                        if isinstance(message, TranscriptPart):
                            shown += map(transcript.Link.from_bytes, message.links)
                        else:
                            assert isinstance(message, JournalChunk)
                            positions += message.activations.shape[1]
                links.append(shown)
                assert message.start == transcript.first_head(session)
                assert account.receipt is not None
                done = shown[: account.receipt.steps]
                assert transcript.head_of(message.start, done).hex() == account.receipt.transcript
                assert positions == (40 if node is swarm.nodes[0] else 0)  # the last keeps none
            assert [link.output_hash for link in links[0]] == [link.input_hash for link in links[1]]
            stranger = swarm.network.join(Identity.generate())
            stream = await stream_to(stranger, swarm)
            async with Connection(stream) as connection:
                (hop,) = swarm.nodes[0].service.hops
                with pytest.raises(RemoteError) as refused:
                    await connection.say_hello(ReadTranscript(hop.session_id))
                    await connection.receive_only(TranscriptEnd)
                assert refused.value.code is ErrorCode.NOT_NAMED_BY_SESSION

    virtual_time.run(run())


async def stream_to(peer: Any, swarm: ToySwarm) -> Any:
    return await peer.open(swarm.nodes[0].peer.peer_id, STREAM_PROTOCOL)


@dataclass
class Dishonest:
    """A client that does what it likes on one session with the first node."""

    swarm: ToySwarm
    grant: Grant
    connection: Connection
    opened: SessionOpened
    voucher: Voucher
    make_tensor: MakeTensor
    steps: int = 0

    async def step(self) -> None:
        """One token; raises RemoteError when it is refused."""
        self.steps += 1
        tensor = self.make_tensor(Random(self.steps), 1, 1)
        await self.connection.send(Step(self.steps, self.steps - 1, 1, tensor))
        await self.connection.receive_only(StepResult)

    async def send(self, signed: Signed) -> Receipt:
        """A voucher; raises RemoteError when it is refused."""
        await self.connection.send(SignedVoucher(signed.payload, signed.signature))
        answer = await self.connection.receive_only(SignedReceipt)
        return strict_json.parse(Receipt, answer.payload)

    def sign(self, **changes: Any) -> Signed:
        return Signed.of(sign(replace(self.voucher, **changes), self.grant.key))

    async def refused_renewal(self, signed: Signed) -> ErrorCode:
        await self.connection.send(renewal(signed))
        with pytest.raises(RemoteError) as refused:
            await self.connection.receive_only(SignedReceipt)
        return refused.value.code

    async def refused(self, signed: Signed) -> ErrorCode:
        with pytest.raises(RemoteError) as refused:
            await self.send(signed)
        return refused.value.code


@asynccontextmanager
async def dishonest(
    swarm: ToySwarm, make_tensor: MakeTensor, **limits: Any
) -> AsyncIterator[Dishonest]:
    await swarm.start()
    grant = issue_for_ourselves(swarm.clock.unix_s())
    if limits:
        allowance = replace(grant.allowance, **limits)
        grant = Grant(allowance, Signed.of(sign(allowance, grant.key)), grant.key)
    async with Connection(await stream_to(swarm.client, swarm)) as connection:
        await connection.say_hello(open_with(swarm, grant.signed))
        opened = await connection.receive_only(SessionOpened)
        connection.maximum_payload_bytes = 1 << 16
        await connection.send(SetRoute(1))
        await connection.receive_only(RouteReady)
        voucher = Voucher(
            serial=grant.allowance.serial,
            node=swarm.nodes[0].peer.peer_id,
            session=opened.session_id.hex(),
            sequence=5,
            model=REVISION.hex(),
            first_block=0,
            end_block=4,
            adapter="",
            prefill_tokens=0,
            decode_tokens=20,
            backward_tokens=0,
            moved_bytes=0,
            transcript="",
            unix_s=int(swarm.clock.unix_s()),
        )
        yield Dishonest(swarm, grant, connection, opened, voucher, make_tensor)
        await connection.send(CloseSession())
        while not isinstance(await connection.receive(), SessionClosed):
            pass
    await swarm.assert_nothing_left_but_refusals()


def open_with(swarm: ToySwarm, allowance: Signed) -> OpenSession:
    return OpenSession(
        model_revision=REVISION,
        first_block=0,
        end_block=4,
        rows=1,
        maximum_tokens=128,
        wire_dtype=1,
        wire_encoding=0,
        previous_peer=swarm.client.peer_id,
        allowance=allowance.payload,
        allowance_signature=allowance.signature,
        allowance_issuer=allowance.public_key,
    )


def test_without_vouchers_two_windows_and_no_more(
    toy_swarm: type[ToySwarm], make_tensor: MakeTensor
) -> None:
    async def run() -> None:
        async with dishonest(toy_swarm([(0, 4)]), make_tensor) as client:
            with pytest.raises(RemoteError) as refused:
                while True:
                    await client.step()
            assert refused.value.code is ErrorCode.VOUCHER_MISSING
            assert client.steps - 1 == 34  # two windows of 17 tokens
            client.steps -= 1
            await client.send(client.sign(decode_tokens=34))
            await client.step()  # the refused one, under its old number

    virtual_time.run(run())


STRANGER = Identity.generate()


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        (ErrorCode.FOREIGN_OBJECT, {"node": STRANGER.peer_id}),
        (ErrorCode.FOREIGN_OBJECT, {"session": "00" * 16}),
        (ErrorCode.FOREIGN_OBJECT, {"serial": "00" * 16}),
        (ErrorCode.FOREIGN_OBJECT, {"model": "00" * 32}),
        (ErrorCode.FOREIGN_OBJECT, {"end_block": 5}),
        (ErrorCode.FOREIGN_OBJECT, {"adapter": "00" * 32}),
        (ErrorCode.FOREIGN_OBJECT, {"policy": "00" * 32}),
        (ErrorCode.ROLLED_BACK, {"sequence": 4}),
        (ErrorCode.ROLLED_BACK, {"sequence": 6, "decode_tokens": 19}),
        (ErrorCode.EQUIVOCATION, {"decode_tokens": 21}),
        (ErrorCode.EQUIVOCATION, {"decode_tokens": 19}),
        (ErrorCode.OVER_LIMIT, {"sequence": 6, "decode_tokens": 1001}),
        (ErrorCode.OVER_LIMIT, {"sequence": 6, "decode_tokens": (1 << 53) - 1}),
        (ErrorCode.NOT_VALID_NOW, {"sequence": 6, "unix_s": 10**6}),
    ],
)
def test_bad_vouchers(
    toy_swarm: type[ToySwarm],
    make_tensor: MakeTensor,
    code: ErrorCode,
    changes: dict[str, Any],
) -> None:
    """Each kind has its code, changes nothing, and the session goes on."""

    async def run() -> None:
        limit = 4 * 7 * 10 * 1000  # blocks x mflop x weight x tokens
        swarm = toy_swarm([(0, 4)])
        async with dishonest(
            swarm, make_tensor, maximum_units=limit, per_node_units=limit
        ) as client:
            await client.step()
            first = await client.send(client.sign())
            assert await client.refused(client.sign(**changes)) is code
            assert await client.send(client.sign(sequence=7, decode_tokens=30)) != first
            await client.step()
        (best,) = books_of(swarm.nodes[0].books)
        assert (best.sequence, best.decode_tokens) == (7, 30)
        evidence = [
            (event.kind, event.body)
            for event in LedgerReader(swarm.nodes[0].books).events()
            if event.kind not in ("allowance", "channel")
        ]
        assert [kind for kind, _ in evidence] == ["equivocation"] * (code is ErrorCode.EQUIVOCATION)
        for first_envelope, second_envelope in swarm.nodes[0].books.execute(
            "SELECT first, second FROM evidence"
        ):
            # A third party needs nothing else: one key, one number, two contents.
            key = bytes.fromhex(client.grant.allowance.voucher_key)
            one, other = (
                verified(Voucher, parse_envelope(text), key)
                for text in (first_envelope, second_envelope)
            )
            assert (one.serial, one.session, one.sequence) == (
                other.serial,
                other.session,
                other.sequence,
            )
            assert one != other

    virtual_time.run(run())


def test_forged_and_repeated_vouchers(toy_swarm: type[ToySwarm], make_tensor: MakeTensor) -> None:
    async def run() -> None:
        async with dishonest(toy_swarm([(0, 4)]), make_tensor) as client:
            await client.step()
            signed = client.sign()
            forged = Signed.of(sign(client.voucher, STRANGER.private_key))
            assert await client.refused(forged) is ErrorCode.BAD_SIGNATURE
            assert await client.refused(Signed(b"{}", bytes(64), b"")) is ErrorCode.BAD_FIELD
            inflated = replace(signed, payload=signed.payload.replace(b":20,", b":99,"))
            assert await client.refused(inflated) is ErrorCode.BAD_SIGNATURE
            first = await client.send(signed)
            await client.step()
            # The same receipt again: another one, with a longer transcript, would contradict it.
            assert await client.send(signed) == first
            assert first.work == Work(decode_tokens=20)

    virtual_time.run(run())


@pytest.mark.parametrize(
    ("code", "changes", "signer"),
    [
        (ErrorCode.BAD_SIGNATURE, {}, "stranger"),
        (ErrorCode.FOREIGN_OBJECT, {"allowance_class": "funded"}, "own"),
        (ErrorCode.NOT_VALID_NOW, {"not_before_unix_s": 1, "expires_unix_s": 2}, "own"),
        (ErrorCode.NOT_VALID_NOW, {"expires_unix_s": (1 << 53) - 1}, "own"),
        (ErrorCode.OVER_LIMIT, {"maximum_units": 1}, "own"),
        (ErrorCode.BAD_FIELD, {"price_epoch": 99}, "own"),
    ],
)
def test_bad_allowances(
    toy_swarm: type[ToySwarm], code: ErrorCode, changes: dict[str, Any], signer: str
) -> None:
    async def run() -> None:
        swarm = toy_swarm([(0, 4)])
        await swarm.start()
        grant = issue_for_ourselves(swarm.clock.unix_s())
        allowance = replace(grant.allowance, **changes)
        signed = Signed.of(sign(allowance, grant.key))
        if signer == "stranger":
            signed = replace(signed, public_key=STRANGER.public_key_bytes)
        async with Connection(await stream_to(swarm.client, swarm)) as connection:
            with pytest.raises(RemoteError) as refused:
                await connection.say_hello(open_with(swarm, signed))
                await connection.receive_only(SessionOpened)
        assert refused.value.code is code
        await swarm.assert_nothing_left()

    virtual_time.run(run())


def renewal(signed: Signed) -> RenewAllowance:
    return RenewAllowance(signed.payload, signed.signature, signed.public_key)


def test_renewals(
    toy_swarm: type[ToySwarm], make_tensor: MakeTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad ones change nothing; after a good one vouchers count from zero, and both add up."""
    monkeypatch.setattr(accounts, "MOST_RENEWALS", 1)

    async def run() -> None:
        async with dishonest(toy_swarm([(0, 4)]), make_tensor) as client:
            now_s = client.swarm.clock.unix_s()
            fresh, third = issue_for_ourselves(now_s), issue_for_ourselves(now_s)
            stranger = replace(fresh.signed, public_key=STRANGER.public_key_bytes)
            funded = replace(fresh.allowance, allowance_class="funded")
            for _ in range(10):
                await client.step()
            await client.send(client.sign(decode_tokens=10))
            for signed, code in (
                (client.grant.signed, ErrorCode.FOREIGN_OBJECT),
                (stranger, ErrorCode.BAD_SIGNATURE),
                (Signed.of(sign(funded, fresh.key)), ErrorCode.FOREIGN_OBJECT),
            ):
                assert await client.refused_renewal(signed) is code
            await client.connection.send(renewal(fresh.signed))
            assert await client.refused(client.sign(sequence=9)) is ErrorCode.BAD_SIGNATURE
            assert await client.refused_renewal(third.signed) is ErrorCode.OVER_LIMIT
            voucher = replace(client.voucher, serial=fresh.allowance.serial, sequence=1)
            for step in range(11, 60):
                done = replace(voucher, sequence=step, decode_tokens=step - 10)
                await client.send(Signed.of(sign(done, fresh.key)))
                await client.step()
        books = books_of(client.swarm.nodes[0].books)
        assert sorted(each.decode_tokens for each in books) == [10, 49]
        assert len({each.serial for each in books}) == 2
        ledger = client.swarm.nodes[0].service._ledger
        assert ledger is not None
        paid = Standing("payer", FUNDED_PRIORITY)
        with pytest.raises(ProtocolError) as lower:
            ledger.renewed(renewal(third.signed), client.swarm.client.peer_id, paid)
        assert lower.value.code is ErrorCode.OVER_LIMIT

    virtual_time.run(run())


def test_a_node_that_gives_two_receipts_is_caught(
    toy_swarm: type[ToySwarm], make_tensor: MakeTensor
) -> None:
    async def run() -> None:
        swarm = toy_swarm([(0, 4)])
        await swarm.start()
        async with swarm.chain(maximum_tokens=64) as chain:
            for position in range(40):
                await chain.step(make_tensor(Random(position), 1, 1), position, output_tokens=1)
            (account,) = chain.accounts
            assert account.receipt is not None
            other = replace(account.receipt, transcript="00" * 32)
            node = swarm.nodes[0].identity
            signed = Signed.of(ledger_objects.sign(other, node.private_key))
            with pytest.raises(Equivocation) as caught:
                account.take(SignedReceipt(signed.payload, signed.signature))
            for evidence in (caught.value.first, caught.value.second):
                evidence.verify(Receipt)

    virtual_time.run(run())
