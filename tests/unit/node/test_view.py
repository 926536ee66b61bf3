"""The terminal view, drawn from fixed snapshots."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from swarm.node.view import (
    JsonView,
    LiveView,
    NodeStatus,
    PlainView,
    RecentRate,
    coverage_bar,
    describe_absence,
    format_duration,
    render,
    span_bar,
)

ONLINE = NodeStatus(
    state="online",
    peer_id="12D3KooWExample",
    display_name="University of Nairobi",
    addresses=("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWExample",),
    metrics_url="http://127.0.0.1:9331/metrics",
    uptime_s=3725,
    model="SmolLM2-135M-Instruct",
    model_blocks=30,
    first_block=10,
    end_block=20,
    coverage=(2,) * 10 + (1,) * 15 + (0,) * 5,
    engine="cpu, float32, 2 threads",
    sessions=3,
    tokens=12345,
    tokens_per_s=33.34,
    queued_steps=2,
    cache_tokens_used=2000,
    cache_tokens_total=65536,
)


def drawn(status: NodeStatus, width: int = 110) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(render(status))
    return console.export_text()


def test_the_panel_shows_everything() -> None:
    text = drawn(ONLINE)
    for words in (
        "University of Nairobi",
        "online",
        "12D3KooWExample",
        "/ip4/127.0.0.1/tcp/1",
        "http://127.0.0.1:9331/metrics",
        "01:02:05",
        "░" * 10 + "█" * 10 + "░" * 10 + "  10:20 of 30",
        "2" * 10 + "1" * 15 + "·" * 5 + "  5 blocks without a node",
        "cpu, float32, 2 threads",
        "33.3/s",
        "12,345 in total",
        "2,000 of 65,536 tokens",
        "queue 2",
    ):
        assert words in text, words


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_panel_fits_the_terminal(width: int) -> None:
    assert max(len(line) for line in drawn(ONLINE, width).splitlines()) <= min(width, 100)


def test_loading_and_seed_have_no_empty_numbers() -> None:
    loading = drawn(replace(ONLINE, state="loading", loading_fraction=0.5, coverage=()))
    assert "weights" in loading
    assert "without a node" not in loading
    seed = drawn(NodeStatus(state="online", peer_id="12D3KooWSeed"))
    assert "seed" in seed
    assert "cache" not in seed


def test_names_are_shown_as_they_are() -> None:
    assert "[red]x[/red]" in drawn(replace(ONLINE, display_name="[red]x[/red]"))


@pytest.mark.parametrize("blocks", [1, 30, 64, 65, 126, 1024])
def test_bars_stay_within_their_width_and_hide_no_hole(blocks: int) -> None:
    coverage = (3,) * (blocks - 1) + (0,)
    assert len(coverage_bar(coverage).plain) == min(blocks, 64)
    assert coverage_bar(coverage).plain.endswith("·")
    last = NodeStatus(model_blocks=blocks, first_block=blocks - 1, end_block=blocks)
    assert span_bar(last).plain.count("█") == 1


DRAINING = replace(
    ONLINE, state="draining", drain_left_s=42.4, coverage=(1,) * 12 + (0,) * 3 + (2,) * 15
)


def test_a_leaving_node_says_whom_it_still_serves_and_for_how_long() -> None:
    waits, alone = describe_absence(DRAINING)
    assert waits == "3 sessions still here; waits 42 s at most until all are handed over"
    assert alone == "nobody else has blocks 12-14: what runs here then ends with this node"
    text = drawn(DRAINING)
    assert waits in text
    assert alone in text
    assert "Ctrl-C again leaves at once" in text
    (replaced,) = describe_absence(replace(DRAINING, coverage=(1,) * 30, sessions=1))
    assert replaced.startswith("1 session still here")
    assert describe_absence(replace(DRAINING, sessions=0)) == ["no sessions are left here"]
    assert describe_absence(ONLINE) == []


def test_a_resting_node_says_when_it_works_again() -> None:
    resting = NodeStatus(state="resting", model="m", rests_until="20:00")
    assert "works again at 20:00" in drawn(resting)
    hot = NodeStatus(state="resting", model="m", rests_because=("too hot",))
    assert "too hot; works again when that has passed" in drawn(hot)
    paused = NodeStatus(state="resting", model="m", rests_because=("paused",))
    assert "paused; works again after swarm-node resume" in drawn(paused)


async def test_programs_hear_at_once_of_each_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.node.view.LIVE_PERIOD_S", 0.0)
    stream = io.StringIO()
    states = iter(["online", "online", "draining", "draining"])

    def status() -> NodeStatus:
        state = next(states, None)
        if state is None:
            raise LookupError
        return replace(ONLINE, state=state)

    with pytest.raises(LookupError):
        await JsonView(stream).watch(status)
    (event,) = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (event["event"], event["state"]) == ("status", "draining")


def test_json_events_are_lines_for_programs() -> None:
    stream = io.StringIO()
    view = JsonView(stream)
    view.ready(ONLINE)
    view.error("no such model")
    view.stopped()
    ready, error, stopped = (json.loads(line) for line in stream.getvalue().splitlines())
    assert ready == {
        "event": "ready",
        "peer_id": "12D3KooWExample",
        "addresses": ["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWExample"],
        "model": "SmolLM2-135M-Instruct",
        "first_block": 10,
        "end_block": 20,
        "metrics_url": "http://127.0.0.1:9331/metrics",
    }
    assert error == {"event": "error", "message": "no such model"}
    assert stopped == {"event": "stopped"}


def test_plain_lines() -> None:
    stream = io.StringIO()
    PlainView(stream).ready(ONLINE)
    first, address, metrics = stream.getvalue().splitlines()
    assert first.startswith("online as 12D3KooWExample, blocks 10:20 of 30 of SmolLM2")
    assert address == "address /ip4/127.0.0.1/tcp/1/p2p/12D3KooWExample"
    assert metrics == "metrics http://127.0.0.1:9331/metrics"


def test_a_seed_has_no_blocks_to_speak_of() -> None:
    stream = io.StringIO()
    PlainView(stream).ready(NodeStatus(state="online", peer_id="12D3KooWSeed"))
    assert stream.getvalue() == "online as 12D3KooWSeed\n"


async def test_plain_lines_tell_each_change_of_state_once() -> None:
    stream = io.StringIO()
    states = iter(["starting", "starting", "loading"])

    def status() -> NodeStatus:
        state = next(states, None)
        if state is None:
            raise LookupError
        return replace(ONLINE, state=state, engine="")

    with pytest.raises(LookupError):
        await PlainView(stream, period_s=0.0).watch(status)
    assert stream.getvalue().splitlines() == [
        f"{state} blocks 10:20 of 30 of SmolLM2-135M-Instruct" for state in ("starting", "loading")
    ]


async def test_the_live_view_draws_until_it_is_cancelled() -> None:
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    drawn_twice = asyncio.Event()
    calls = 0

    def status() -> NodeStatus:
        nonlocal calls
        calls += 1
        if calls > 2:
            drawn_twice.set()
        return ONLINE

    watching = asyncio.create_task(LiveView(console, period_s=0.0).watch(status))
    await drawn_twice.wait()
    watching.cancel()
    await asyncio.wait((watching,))
    assert watching.cancelled()
    text = console.export_text()
    assert "10:20 of 30" in text
    assert "stopped" in text


def test_the_rate_forgets() -> None:
    rate = RecentRate(window_s=10)
    assert rate.update(0, 0) == 0
    assert rate.update(5, 100) == 20
    assert rate.update(10, 100) == 10
    assert rate.update(20, 100) == 0


def test_durations() -> None:
    assert format_duration(3725.9) == "01:02:05"
    assert format_duration(2 * 86400 + 1) == "2 d 00:00:01"
