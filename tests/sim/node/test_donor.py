"""The owner's limits over time: rests, pauses and shifts, and streams that keep to a rate."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from swarm.memory_network import LinkSettings, MemoryNetwork, MemorySettings
from swarm.node.donor.bandwidth import CappedNetwork, Pace
from swarm.node.donor.diary import Diary, Totals
from swarm.node.donor.guard import READ_PERIOD_S, Guard
from swarm.node.donor.limits import DonorLimits, LimitsFile
from swarm.node.donor.readings import SUSTAINED_S, Readings, Reason
from swarm.node.hours import parse_week
from swarm.ports import Stream
from swarm.protocol.errors import ConfigError
from swarm.protocol.identity import Identity
from swarm.virtual_time import LoopClock, run

START = datetime.fromisoformat("2026-03-02T19:00")


class ScriptedSensors:
    """A computer that is as the test says."""

    def __init__(self) -> None:
        self.readings = Readings()
        self.fails = False

    async def read(self) -> Readings:
        if self.fails:
            raise OSError("driver")
        return self.readings


class House:
    """A guard, its sensors, and a local clock that goes with the virtual one."""

    def __init__(self, path: Path, **limits: Any) -> None:
        self.sensors = ScriptedSensors()
        self.began_s = asyncio.get_running_loop().time()
        self.guard = Guard(
            LimitsFile(path / "limits.json", DonorLimits(**limits)),
            self.sensors,
            Diary(None, self.now, Totals),
            clock=LoopClock(),
            local_now=self.now,
        )
        self.leaving = asyncio.Event()
        self.lives: list[tuple[float, float]] = []
        """Begin and end of each shift, in seconds since the start."""

    def now(self) -> datetime:
        return START + timedelta(seconds=self.elapsed_s)

    @property
    def elapsed_s(self) -> float:
        return asyncio.get_running_loop().time() - self.began_s

    async def live(self) -> None:
        """As ``node.app`` does it."""
        while await self.guard.rested(self.leaving, lambda: None):
            async with self.guard.shift(self.leaving) as over:
                begin_s = self.elapsed_s
                await over.wait()
                self.lives.append((begin_s, self.elapsed_s))

    async def __aenter__(self) -> House:
        self._tasks = [
            asyncio.create_task(self.guard.watch()),
            asyncio.create_task(self.live()),
        ]
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leaving.set()
        await self._tasks[1]
        self._tasks[0].cancel()
        await asyncio.wait(self._tasks)


def test_a_node_works_in_its_hours(tmp_path: Path) -> None:
    async def days() -> None:
        async with House(tmp_path, hours=parse_week("20:00-08:00")) as house:
            await asyncio.sleep(3600 - 60)
            assert list(house.guard.reasons) == [Reason.HOURS]
            assert house.guard.rests_until == "20:00"
            await asyncio.sleep(2 * 24 * 3600)
        begins_and_ends = [round(time / 3600, 1) for life in house.lives for time in life]
        assert begins_and_ends[:4] == [1, 13, 25, 37]

    run(days())


@pytest.mark.parametrize(
    ("limits", "bad", "reason", "within_s"),
    [
        ({}, {"on_battery": True}, Reason.BATTERY, 0),
        ({"only_when_idle": True}, {"idle_s": 1.0}, Reason.IN_USE, 0),
        ({"only_when_idle": True}, {"gpu_used_by_others": 0.9}, Reason.GPU_IN_USE, 0),
        ({"maximum_temperature_c": 85}, {"temperature_c": 90.0}, Reason.TEMPERATURE, SUSTAINED_S),
        ({"maximum_power_w": 200}, {"power_w": 250.0}, Reason.POWER, SUSTAINED_S),
        ({"keep_memory_free_bytes": 10}, {"memory_free_bytes": 5}, Reason.MEMORY, SUSTAINED_S),
        ({"keep_disk_free_bytes": 10}, {"disk_free_bytes": 5}, Reason.DISK, 0),
    ],
)
def test_each_sensor_ends_a_shift_and_lets_the_next_one_begin(
    tmp_path: Path, limits: dict[str, Any], bad: dict[str, Any], reason: Reason, within_s: float
) -> None:
    async def live() -> None:
        async with House(tmp_path, **limits) as house:
            await asyncio.sleep(100)
            house.sensors.readings = Readings(**bad)
            await asyncio.sleep(within_s + 2 * READ_PERIOD_S)
            assert list(house.guard.reasons) == [reason]
            ((_, end_s),) = house.lives
            assert end_s <= 100 + within_s + 2 * READ_PERIOD_S
            house.sensors.readings = Readings()
            await asyncio.sleep(2 * READ_PERIOD_S)
            assert not house.guard.reasons
            assert house.guard.diary.today.rested_for[reason] > 0
        assert len(house.lives) == 2

    run(live())


def test_pauses(tmp_path: Path) -> None:
    async def live() -> None:
        async with House(tmp_path) as house:
            await asyncio.sleep(10)
            house.guard.pause(7200)
            await asyncio.sleep(1)
            assert len(house.lives) == 1, "at once"
            assert house.guard.rests_until == "21:00"
            await asyncio.sleep(7200 + READ_PERIOD_S)
            assert not house.guard.reasons
            house.guard.pause(None)
            await asyncio.sleep(2 * 24 * 3600)
            assert list(house.guard.reasons) == [Reason.PAUSED]
            assert house.guard.rests_until == ""
            house.guard.resume()
            await asyncio.sleep(1)
            assert not house.guard.reasons
            for wrong in (0, -1, 1e12, float("nan")):
                with pytest.raises(ConfigError):
                    house.guard.pause(wrong)
        assert len(house.lives) == 3

    run(live())


def test_limits_change_at_once_and_broken_sensors_end_nothing(tmp_path: Path) -> None:
    async def live() -> None:
        async with House(tmp_path) as house:
            await asyncio.sleep(10)
            house.sensors.fails = True
            await asyncio.sleep(60)
            assert house.lives == []
            house.guard.change_limits({"hours": "01:00-02:00", "upload_bytes_per_s": 10**6})
            assert house.guard.up.bytes_per_s == 10**6
            await asyncio.sleep(1)
            assert list(house.guard.reasons) == [Reason.HOURS]
            house.guard.change_limits({"hours": None})
            await asyncio.sleep(1)
            assert not house.guard.reasons
        assert (
            LimitsFile(tmp_path / "limits.json", DonorLimits()).load().upload_bytes_per_s == 10**6
        )

    run(live())


@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("capped_side", ["sends", "receives"])
@pytest.mark.parametrize("rate", [125_000, 2_000_000])
def test_rates_hold_within_a_tenth_over_30_s(streams: int, capped_side: str, rate: int) -> None:
    """Messages like those of sessions, small ones and large ones, as many as go."""

    async def send_for_30_s() -> int:
        settings = MemorySettings(link=LinkSettings(latency_s=0.02, rate_bytes_per_s=50e6))
        network = MemoryNetwork(1, settings)
        here, there = (Identity.generate() for _ in range(2))
        capped = CappedNetwork(network.join(here), *(Pace(LoopClock(), rate) for _ in range(2)))
        other = network.join(there)
        sender, receiver = (capped, other) if capped_side == "sends" else (other, capped)
        arrived = 0
        ready = asyncio.Event()

        async def take(stream: Stream) -> None:
            nonlocal arrived
            while True:
                size = int.from_bytes(await stream.receive_exactly(4), "big")
                await stream.receive_exactly(size)
                arrived += 4 + size

        await receiver.serve("bytes", take)
        sizes = (300, 3_000, 40_000, 1_000, 150_000)

        async def fill(number: int) -> None:
            stream = await sender.open(receiver.peer_id, "bytes", await receiver.addresses())
            ready.set()
            count = number
            while True:
                size = sizes[count % len(sizes)]
                count += 1
                await stream.send(size.to_bytes(4, "big"), bytes(size))

        filling = [asyncio.create_task(fill(number)) for number in range(streams)]
        await ready.wait()
        await asyncio.sleep(5)
        before = arrived
        await asyncio.sleep(30)
        sent = arrived - before
        for task in filling:
            task.cancel()
        await asyncio.wait(filling)
        for peer in (network.peer(here.peer_id), network.peer(there.peer_id)):
            if peer is not None:
                await peer.close()
        return sent

    assert run(send_for_30_s()) / 30 == pytest.approx(rate, rel=0.1)


def test_without_a_cap_nothing_waits() -> None:
    async def count() -> None:
        pace = Pace(LoopClock())
        began_s = LoopClock().monotonic_s()
        for _ in range(1000):
            await pace.pay(10**6)
        assert LoopClock().monotonic_s() == began_s
        assert pace.total_bytes == 10**9

    run(count())
