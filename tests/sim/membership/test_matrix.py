"""Each credential at each operation, by nodes and by clients: only valid ones help."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from swarm import virtual_time
from swarm.catalogue.chunk_service import ChunkService
from swarm.connection import Connection
from swarm.memory_network import MemoryPeer
from swarm.node.service import NodeService
from swarm.protocol.errors import ErrorCode, ProtocolError, RemoteError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.membership_records import CharterRecord, charter_key
from swarm.protocol.messages import (
    AskChunks,
    Attach,
    Message,
    OpenSession,
    SessionOpened,
)
from swarm.protocol.passport import AdmissionMode, RevocationPage, seal
from swarm.protocol.records import ModelIndexRecord, model_index_key, sign_record
from swarm.protocol.version import STREAM_PROTOCOL, WEIGHTS_PROTOCOL
from swarm.revocations import RevocationWatch
from swarm.virtual_time import LoopClock

REFUSALS = {
    ErrorCode.WRONG_SWARM,
    ErrorCode.PASSPORT_MISSING,
    ErrorCode.PASSPORT_INVALID,
    ErrorCode.PASSPORT_EXPIRED,
    ErrorCode.PASSPORT_REVOKED,
}
EXPECTED = {
    "none": ErrorCode.PASSPORT_MISSING,
    "no charter": ErrorCode.PASSPORT_MISSING,
    "expired": ErrorCode.PASSPORT_EXPIRED,
    "not valid yet": ErrorCode.PASSPORT_EXPIRED,
    "revoked": ErrorCode.PASSPORT_REVOKED,
    "by a revoked issuer": ErrorCode.PASSPORT_REVOKED,
    "of another swarm": ErrorCode.WRONG_SWARM,
}
PEER = Identity.generate().peer_id


def open_session() -> OpenSession:
    return OpenSession(bytes(range(32)), 0, 2, 1, 16, 1, 0, PEER)


async def index_record(identity: Identity) -> bytes:
    return sign_record(
        identity,
        ModelIndexRecord(
            identity.peer_id, "m", bytes(32), 2, 1, 8, 1, int(LoopClock().unix_s()) + 60
        ),
    )


async def ask(peer: MemoryPeer, target: PeerId, protocol: str, message: Message) -> Message:
    async with Connection(await peer.open(target, protocol)) as connection:
        connection.maximum_payload_bytes = 1 << 20
        await connection.say_hello()
        await connection.send(message)
        return await connection.receive_only(SessionOpened)


OPERATIONS: dict[str, tuple[str, Message]] = {
    "open a session": (STREAM_PROTOCOL, open_session()),
    "forward": (STREAM_PROTOCOL, Attach(bytes(16), 1)),
    "fetch": (WEIGHTS_PROTOCOL, AskChunks(bytes(32))),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_intruders_are_refused(
    make_town: Callable[..., Any], serve: Any, bad_credential: str, operation: str
) -> None:
    async def scenario() -> None:
        town = make_town()
        _, intruder = town.intruder(bad_credential)
        _, node = town.member()
        counted = await serve(node)
        protocol, message = OPERATIONS[operation]
        with pytest.raises(RemoteError) as refused:
            await ask(intruder, node.peer_id, protocol, message)
        assert refused.value.code is EXPECTED.get(bad_credential, ErrorCode.PASSPORT_INVALID)
        assert counted.opened == 0

    virtual_time.run(scenario())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_members_are_let_in(
    make_town: Callable[..., Any], serve: Any, good_credential: str, operation: str
) -> None:
    async def scenario() -> None:
        town = make_town()
        _, member = town.intruder(good_credential)
        _, node = town.member()
        await serve(node)
        protocol, message = OPERATIONS[operation]
        if operation == "open a session":
            await ask(member, node.peer_id, protocol, message)
            return
        with pytest.raises(RemoteError) as answered:  # it is let in, and asks for what is not there
            await ask(member, node.peer_id, protocol, message)
        assert answered.value.code in (ErrorCode.UNKNOWN_SESSION, ErrorCode.UNKNOWN_MANIFEST)

    virtual_time.run(scenario())


def test_clients_and_nodes_send_intruders_nothing(
    make_town: Callable[..., Any], bad_credential: str
) -> None:
    """Who dials checks as well: behind Hello nothing is sent to a peer that may not take part."""

    async def scenario() -> None:
        town = make_town()
        _, intruder = town.intruder(bad_credential)
        heard: list[Message] = []

        async def listen(stream: Any) -> None:
            async with Connection(stream) as connection:
                await connection.answer_hello(5.0)
                heard.append(await connection.receive())

        await intruder.serve(STREAM_PROTOCOL, listen)
        _, member = town.member()
        stream = await member.open(intruder.peer_id, STREAM_PROTOCOL)
        async with Connection(stream) as connection:
            with pytest.raises(ProtocolError) as refused:
                await connection.say_hello(open_session())
        assert refused.value.code in REFUSALS
        await asyncio.sleep(60)
        assert not heard

    virtual_time.run(scenario())


def test_intruders_announce_nothing(make_town: Callable[..., Any], bad_credential: str) -> None:
    async def scenario() -> None:
        town = make_town()
        identity, intruder = town.intruder(bad_credential)
        _, member = town.member()
        expires = int(LoopClock().unix_s()) + 60
        await intruder.store(model_index_key(), await index_record(identity), expires)
        assert intruder.peer_id not in await member.get(model_index_key())
        # Not even where the intruder itself is the one that keeps the record.
        assert intruder.peer_id not in member.entries.get(model_index_key(), {})

    virtual_time.run(scenario())


def test_intruders_read_nothing_but_the_charter(
    make_town: Callable[..., Any], bad_credential: str
) -> None:
    async def scenario() -> None:
        town = make_town()
        _, intruder = town.intruder(bad_credential)
        identity, member = town.member()
        expires = int(LoopClock().unix_s()) + 60
        await member.store(model_index_key(), await index_record(identity), expires)
        charter = CharterRecord(identity.peer_id, 1, expires, town.land.sealed)
        await member.store(charter_key(), sign_record(identity, charter), expires)
        assert not await intruder.get(model_index_key())
        assert await intruder.get(charter_key())
        _, other = town.member()
        assert identity.peer_id in await other.get(model_index_key())

    virtual_time.run(scenario())


@pytest.mark.parametrize("admission", AdmissionMode)
def test_charters(make_town: Callable[..., Any], serve: Any, admission: AdmissionMode) -> None:
    """Strangers only in open swarms, the invited in all but those of members only."""
    welcome = {
        AdmissionMode.OPEN: {"none", "no charter", "by invitation", "valid"},
        AdmissionMode.INVITED: {"by invitation", "valid"},
        AdmissionMode.MEMBERS: {"valid"},
    }

    async def scenario() -> None:
        town = make_town(admission)
        _, node = town.member()
        await serve(node)
        for credential in ("none", "no charter", "by invitation", "valid", "forged", "revoked"):
            _, peer = town.intruder(credential)
            asking = ask(peer, node.peer_id, STREAM_PROTOCOL, open_session())
            (answer,) = await asyncio.gather(asking, return_exceptions=True)
            if credential in welcome[admission]:
                assert isinstance(answer, SessionOpened), credential
            else:
                assert isinstance(answer, RemoteError), credential
                assert answer.code in REFUSALS

    virtual_time.run(scenario())


def test_a_revocation_ends_what_runs(make_town: Callable[..., Any], serve: Any) -> None:
    async def scenario() -> None:
        town = make_town()
        _, node = town.member()
        await serve(node)
        serial = bytes([7]) * 8
        _, peer = town.member(serial=serial)
        connection = Connection(await peer.open(node.peer_id, STREAM_PROTOCOL))
        await connection.say_hello(open_session())
        await connection.receive_only(SessionOpened)
        assert node.gate is not None
        assert node.gate.adopt_revocations(town.land.pages(serial, number=99))
        await node.gate.close_unwanted()
        with pytest.raises(Exception, match=r"closed|ended|gone"):
            await connection.receive_only(SessionOpened)
        with pytest.raises(RemoteError) as refused:
            await ask(peer, node.peer_id, STREAM_PROTOCOL, open_session())
        assert refused.value.code is ErrorCode.PASSPORT_REVOKED

    virtual_time.run(scenario())


def test_revocations_spread_within_one_announce_period(make_town: Callable[..., Any]) -> None:
    async def scenario() -> None:
        town = make_town()
        clock = LoopClock()
        members = [town.member() for _ in range(6)]
        serial = bytes([9]) * 8
        town.member(serial=serial)
        kept: list[int] = []
        watches = [
            RevocationWatch(
                identity,
                peer,
                clock,
                peer.gate,
                announce_period_s=30.0,
                keep=lambda gate: kept.append(gate.revocations.number),
            )
            for identity, peer in members
        ]
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(watch.run()) for watch in watches]
            await clock.sleep(45)
            authority = town.network.join(
                town.land.authority, town.land.gate(town.land.authority.peer_id, b"")
            )
            assert authority.gate is not None
            authority.gate.adopt_revocations(town.land.pages(serial, number=50))
            await RevocationWatch(town.land.authority, authority, clock, authority.gate).bring()
            town.network.crash(authority.peer_id)  # it need not stay
            await clock.sleep(30)
            for _, peer in members:
                assert serial in peer.gate.revocations
            assert kept.count(50) == 6
            # And it outlives the record that the authority brought.
            await clock.sleep(600)
            _, late = town.member()
            watch = RevocationWatch(members[0][0], late, clock, late.gate)
            assert await watch.look()
            assert serial in late.gate.revocations
            for task in running:
                task.cancel()

    virtual_time.run(scenario())


def test_only_the_authority_revokes_and_amends(make_town: Callable[..., Any]) -> None:
    async def scenario() -> None:
        town = make_town()
        identity, peer = town.member()
        gate, land = peer.gate, town.land
        page = RevocationPage(99, 0, 1, 0, (bytes(8),))
        assert not gate.adopt_revocations([seal(identity, land.swarm_id, page)])
        assert not gate.adopt_revocations([seal(land.authority, bytes(32), page)])
        later = replace(land.charter, version=2, admission=AdmissionMode.OPEN)
        usurped = replace(later, authorities=(identity.peer_id,))
        assert not gate.adopt_charter(seal(identity, land.swarm_id, usurped))
        assert not gate.adopt_charter(
            seal(land.authority, land.swarm_id, replace(later, version=1))
        )
        assert gate.adopt_charter(seal(land.authority, land.swarm_id, later))
        assert gate.charter.admission is AdmissionMode.OPEN

    virtual_time.run(scenario())


@pytest.fixture
def serve(toy_engine: Any, counted_observer: Any) -> Callable[..., Any]:
    """Sessions and weights, served by a peer of the network."""

    async def run(peer: MemoryPeer) -> Any:
        counted = counted_observer()
        clock = LoopClock()

        async def resolve(peer: PeerId, *, afresh: bool = False) -> tuple[str, ...]:
            return ()

        service = NodeService(
            peer,
            toy_engine(0, 2),
            model_revision=bytes(range(32)),
            resolve=resolve,
            observer=counted,
            clock=clock,
        )
        await service.start()
        chunks = ChunkService(dict, clock=clock)
        await peer.serve(WEIGHTS_PROTOCOL, chunks.serve_stream)
        return counted

    return run
