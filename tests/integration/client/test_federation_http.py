"""An aggregator's door: who may not come in, and what a restart in the middle of a round costs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web

from swarm.client.finetune.federation.aggregator_client import AggregatorClient
from swarm.client.finetune.federation.files import FederationFiles, Tensors
from swarm.client.finetune.federation.member import Learned, Member, MemberObserver
from swarm.client.finetune.federation.messages import write_message
from swarm.client.finetune.federation.rounds import Phase, Round
from swarm.client.finetune.federation.service import AggregatorService
from swarm.client.finetune.federation.signing import request_headers
from swarm.client.finetune.federation.terms import FederationTerms
from swarm.client.finetune.secure_sum import Participant
from swarm.client.finetune.settings import FinetuneSettings
from swarm.protocol.errors import ErrorCode, ProtocolError, RemoteError
from swarm.protocol.identity import Identity, PeerId
from swarm.virtual_time import LoopClock

NAME = "model.layers.0.self_attn.q_proj.lora_A.weight"
LENGTH = 7
"""Six numbers of the adapter, and that of the examples."""


@asynccontextmanager
async def listening(application: web.Application, port: int = 0) -> AsyncIterator[int]:
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def found(folder: Path, members: list[Identity], **changes: Any) -> FederationFiles:
    files = FederationFiles(folder)
    terms = FederationTerms(
        federation_id=bytes(16),
        aggregator=files.identity().peer_id,
        model="tiny",
        model_revision=bytes(32),
        recipe=FinetuneSettings(target_modules=("q_proj",)),
        invited=tuple(member.peer_id for member in members),
        rounds=1,
        minimum=2,
        train_s=60.0,
        answer_s=20.0,
    )
    terms = replace(terms, **changes)
    files.create(terms, {NAME: torch.zeros(LENGTH - 1)})
    return files


class Learner:
    """Learns by adding a number to all; counts how often it had to."""

    def __init__(self, step: float, examples: int) -> None:
        self.step, self.examples, self.times = step, examples, 0

    async def __call__(self, number: int, before: Tensors, folder: Path) -> Learned:
        self.times += 1
        return Learned({NAME: before[NAME] + self.step}, self.examples)


async def take_part(
    port: int, identity: Identity, learner: Learner, output: Path, observer: MemberObserver
) -> dict[str, torch.Tensor]:
    url = f"http://127.0.0.1:{port}"
    async with AggregatorClient(url, identity, clock=LoopClock()) as client:
        terms = await client.terms()
        clock = LoopClock()
        member = Member(client, identity, terms, learner, output, clock=clock, observer=observer)
        return await member.run()


async def refusal(response: aiohttp.ClientResponse) -> ErrorCode:
    return ErrorCode((await response.json())["code"])


async def test_who_may_not_come_in(tmp_path: Path) -> None:
    members = [Identity.generate() for _ in range(3)]
    stranger = Identity.generate()
    files = found(tmp_path, members)
    service = AggregatorService(files, files.identity(), clock=LoopClock())
    async with listening(service.application()) as port, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{port}"
        async with AggregatorClient(url, members[0], clock=LoopClock()) as client:
            with pytest.raises(ProtocolError, match="BAD_SIGNATURE"):
                await client.terms(PeerId(stranger.peer_id))
            await client.terms()
            state = await client.state()
            path = f"/v1/rounds/{state.round_id.hex()}/advertise"
            now = int(LoopClock().unix_s())

            async def answer(
                who: Identity, signed: bytes, sent: bytes | None = None, at: str = path
            ) -> ErrorCode:
                headers = request_headers(who, bytes(16), "POST", at, signed, now)
                body = signed if sent is None else sent
                async with session.post(url + at, data=body, headers=headers) as response:
                    assert response.status >= 400
                    return await refusal(response)

            assert await answer(stranger, b"{}") is ErrorCode.NOT_NAMED_BY_SESSION
            assert await answer(members[1], b"{}") is ErrorCode.BAD_FIELD
            assert await answer(members[1], b"{}", b"[]") is ErrorCode.BAD_SIGNATURE
            assert await answer(members[1], bytes(5000)) is ErrorCode.TOO_LARGE
            masked = path.replace("advertise", "masked")
            assert await answer(members[1], bytes(56), at=masked) is ErrorCode.NOT_VALID_NOW
            unknown = path.replace("advertise", "everything")
            assert await answer(members[1], b"{}", at=unknown) is ErrorCode.FOREIGN_OBJECT
            for asked in ("/v1/state", f"/v1/adapters/{state.adapter.sha256}"):
                async with session.get(url + asked) as response:
                    assert await refusal(response) is ErrorCode.NOT_NAMED_BY_SESSION
        # Refused by its headers alone: of this body nothing is ever sent
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000000\r\n\r\n".encode()
        )
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 5.0)
        writer.close()
        async with AggregatorClient(url, stranger, clock=LoopClock()) as client:
            await client.terms()
            with pytest.raises(RemoteError):
                await client.state()


async def test_restarted_in_the_middle_of_a_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [Identity.generate() for _ in range(3)]
    files = found(tmp_path / "aggregator", members)
    learners = [Learner(1.0, 1), Learner(2.0, 2), Learner(4.0, 5)]
    reached = asyncio.Event()
    begun: list[int] = []

    class Begins(MemberObserver):
        def round_begins(self, number: int, rounds: int) -> None:
            begun.append(number)

    def changed(number: int, current: Round) -> None:
        if current.phase is Phase.MASKED and current.answered:
            reached.set()

    first = AggregatorService(files, files.identity(), clock=LoopClock(), changed=changed)
    async with asyncio.TaskGroup() as tasks:
        async with listening(first.application()) as port:
            taking_part = [
                tasks.create_task(
                    take_part(
                        port, members[place], learners[place], tmp_path / str(place), Begins()
                    )
                )
                for place in range(3)
            ]
            running = tasks.create_task(first.run())
            await reached.wait()
            running.cancel()
            first.stop()
        again = AggregatorService(files, files.identity(), clock=LoopClock())
        async with listening(again.application(), port):
            await again.run()
            await again.collected(20.0)
            results = [await one for one in taking_part]
    assert [(one.participants, one.examples) for one in again.done] == [(3, 8)]
    mean = (1.0 * 1 + 2.0 * 2 + 4.0 * 5) / 8
    assert all(torch.equal(one[NAME], torch.full((LENGTH - 1,), mean)) for one in results)
    assert [learner.times for learner in learners] == [1, 1, 1]  # nobody trains twice
    assert begun == [1, 1, 1]
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


async def test_a_participant_that_was_started_again_waits_for_the_next_attempt(
    tmp_path: Path,
) -> None:
    """Its secrets are gone: it is not counted, stops nobody, and has the result all the same."""
    members = [Identity.generate() for _ in range(3)]
    files = found(tmp_path / "aggregator", members, answer_s=3.0)
    service = AggregatorService(files, files.identity(), clock=LoopClock())
    async with listening(service.application()) as port, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(service.run())
        url = f"http://127.0.0.1:{port}"
        async with AggregatorClient(url, members[0], clock=LoopClock()) as client:
            terms = await client.terms()
            state = await client.state()
            earlier = Participant(members[0], state.round_id, terms.invited).advertise()
            await client.send(state.round_id, Phase.ADVERTISE, write_message(earlier))
        learners = [Learner(1.0, 1), Learner(2.0, 2), Learner(4.0, 6)]
        taking_part = [
            tasks.create_task(take_part(port, *pair, tmp_path / str(place), MemberObserver()))
            for place, pair in enumerate(zip(members, learners, strict=True))
        ]
        await running
        results = [await one for one in taking_part]
    assert [(one.participants, one.examples) for one in service.done] == [(2, 8)]
    mean = (2.0 * 2 + 4.0 * 6) / 8
    assert all(torch.equal(one[NAME], torch.full((LENGTH - 1,), mean)) for one in results)


async def test_no_sum_of_fewer_than_agreed_on(tmp_path: Path) -> None:
    """An aggregator that goes on with two where three were promised gets nothing to unmask."""
    members = [Identity.generate() for _ in range(3)]
    files = found(tmp_path / "aggregator", members, minimum=3, train_s=1.0)
    service = AggregatorService(files, files.identity(), clock=LoopClock())
    service._round._minimum = 2
    async with listening(service.application()) as port, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(service.run())
        refusals = await asyncio.gather(
            *(
                take_part(
                    port, member, Learner(1.0, 1), tmp_path / member.peer_id, MemberObserver()
                )
                for member in members[:2]
            ),
            return_exceptions=True,
        )
        running.cancel()
    assert service._round.phase is Phase.UNMASK
    assert service._round.answered == 0
    assert all("fewer than agreed on" in str(refusal) for refusal in refusals)
