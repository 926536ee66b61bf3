"""The pure parts of the chaos harness: moments, events on a stream, judgement of sessions."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from scripts.faults.answers import Session, Task
from scripts.faults.moments import HALF_FILLED, MOMENTS, Moment, Trigger, cases
from scripts.faults.progress import Event, WatchedChains, WatchedStream
from scripts.faults.report import levels_off_after_s, percentile
from swarm.ports import Buffer
from swarm.protocol.codec import PREFIX_BYTES, encode
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.messages import Hello, Ping, Pong, Step
from swarm.protocol.tensors import DType, WireTensor

PEER = Identity.generate().peer_id
OTHER = Identity.generate().peer_id
TASK = Task(prompt=(1, 2), answer=(5, 6, 7))


class RecordedStream:
    """Takes what is sent, gives what it was told to."""

    def __init__(self, incoming: bytes = b"") -> None:
        self.sent: list[Buffer] = []
        self._incoming = incoming

    @property
    def remote_peer(self) -> PeerId:
        return PEER

    @property
    def gate(self) -> None:
        return None

    @property
    def relayed(self) -> bool:
        return False

    async def send(self, *buffers: Buffer) -> None:
        self.sent += buffers

    async def receive_exactly(self, size_bytes: int) -> bytes:
        data, self._incoming = self._incoming[:size_bytes], self._incoming[size_bytes:]
        return data

    async def close(self) -> None:
        return


def step_message() -> Step:
    tensor = WireTensor(DType.FLOAT32, (1, 2, 3), bytes(24))
    return Step(step=1, position=0, output_tokens=1, activations=tensor, deadline_ms=0)


async def test_a_stream_tells_each_message_before_it_is_sent() -> None:
    heard: list[Event] = []
    recorded = RecordedStream()
    stream = WatchedStream(recorded, heard.append)
    hello, _ = encode(Hello(minimum_version=1, maximum_version=1, software="test"))
    step, payload = encode(step_message())
    ping, _ = encode(Ping(nonce=1))
    await stream.send(hello, step, payload, ping)
    assert [(event.what, event.message) for event in heard] == [
        ("sent", "Hello"),
        ("sent", "Step"),
        ("sent", "Ping"),
    ]
    assert all(event.peer == PEER for event in heard)
    assert recorded.sent == [hello, step, payload, ping]


async def test_a_stream_tells_each_message_that_comes() -> None:
    heard: list[Event] = []
    pong, _ = encode(Pong(nonce=1))
    step, payload = encode(step_message())
    stream = WatchedStream(RecordedStream(pong + step + bytes(payload) + pong), heard.append)
    for frame_bytes in (len(pong), len(step) + len(payload), len(pong)):
        await stream.receive_exactly(PREFIX_BYTES)
        await stream.receive_exactly(frame_bytes - PREFIX_BYTES)
    assert [event.message for event in heard] == ["Pong", "Step", "Pong"]


def test_a_trigger_fires_once_at_the_count_of_its_stage() -> None:
    fired: list[Event] = []
    moment = Moment("opened", "open", "received", "SessionOpened", count=2, of_stage=True)
    trigger = Trigger(moment, lambda event: event.peer == PEER, fired.append)
    mine = Event("received", "SessionOpened", PEER)
    trigger.hear(mine)
    trigger.hear(Event("received", "SessionOpened", OTHER))
    trigger.hear(Event("sent", "SessionOpened", PEER))
    assert not fired
    trigger.hear(mine)
    trigger.hear(mine)
    assert fired == [mine]


def test_two_hops_at_once_and_a_replacement_that_dies_half_filled_are_cases_of_each_kind() -> None:
    found = cases(("kill", "freeze"), MOMENTS, (0, 1, 2), pairs=True)
    assert len([one for one in found if len(one.stages) == 1 and one.moment in MOMENTS]) == 120
    pairs = {(one.kind, one.moment.name, one.stages) for one in found if len(one.stages) == 2}
    assert pairs == {
        (kind, moment, stages)
        for kind in ("kill", "freeze")
        for moment in ("prompt sent", "token 8")
        for stages in ((0, 1), (1, 2))
    }
    assert len([one for one in found if one.moment is HALF_FILLED]) == 6


def test_memory_is_level_from_where_it_stays_near_its_end() -> None:
    """Ten weighings a minute, ten minutes of growth; a moment's peak changes nothing."""
    ages_s = [6.0 * number for number in range(300)]
    rising = [(age_s, 200 + int(min(age_s, 600) / 6)) for age_s in ages_s]
    rising[290] = (rising[290][0], 400)
    level_s = levels_off_after_s(rising)
    assert level_s is not None
    assert 9 * 60 <= level_s <= 10 * 60
    assert levels_off_after_s([(age_s, 200 + int(age_s)) for age_s in ages_s]) is None
    assert levels_off_after_s([]) is None


def test_there_are_twenty_moments_with_names_of_their_own() -> None:
    assert len({moment.name for moment in MOMENTS}) == len(MOMENTS) == 20
    assert {moment.phase for moment in MOMENTS} == {
        "open",
        "prefill",
        "decode",
        "rollback",
        "healing",
    }


@pytest.mark.parametrize(("percent", "value"), [(0, 1.0), (50, 3.0), (95, 4.0), (100, 4.0)])
def test_percentiles(percent: int, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == value


class NoClient:
    """For sessions that are not run."""

    async def open_chain(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError

    async def close(self) -> None:
        return


def session(tokens: list[int], times_s: list[float], *, ended: bool = True) -> Session:
    chains = WatchedChains(NoClient(), lambda event: None)
    return Session(TASK, chains, tokens=tokens, times_s=times_s, ended=ended)


@pytest.mark.parametrize(
    ("tokens", "ended", "right"),
    [
        ([5, 6, 7], True, True),
        ([5, 6], False, True),
        ([5, 6], True, False),  # one lost
        ([5, 6, 6, 7], True, False),  # one twice
        ([5, 7], False, False),
    ],
)
def test_an_answer_is_right_when_no_token_is_lost_or_comes_twice(
    tokens: list[int], ended: bool, right: bool
) -> None:
    assert session(tokens, [], ended=ended).is_right is right


def test_a_token_that_was_on_its_way_does_not_hide_how_long_the_next_one_took() -> None:
    answered = session([5, 6, 7], [1.0, 2.0, 5.0])
    assert answered.stall_s(0.5) == 1.0
    assert answered.stall_s(1.9) == 3.0
    assert answered.stall_s(5.5) is None
    assert answered.longest_step_s(1.9) == 3.0
    assert answered.median_step_s == 2.0


def test_a_shorter_answer_to_the_same_question() -> None:
    assert TASK.variant(2, speculative=True) == Task((1, 2), (5, 6), speculative=True)
