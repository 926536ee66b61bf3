"""Energy of a node's work, from counters that may be missing, wrap or fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from swarm.node.announced_work import AnnouncedWork
from swarm.node.energy import EnergyMeter, NvmlCounter, RaplCounter, rapl_counters
from swarm.node.metrics import NodeMetrics
from tests.unit.status.conftest import Watched


class Scripted:
    """A counter that says what it is told."""

    def __init__(self, *readings: float, wraps_at_j: float = 0.0) -> None:
        self.wraps_at_j = wraps_at_j
        self._readings = iter(readings)

    def read_j(self) -> float:
        try:
            return next(self._readings)
        except StopIteration:
            raise OSError("gone") from None


def zone(powercap: Path, folder: str, name: str, energy_uj: int) -> Path:
    path = powercap / folder
    path.mkdir()
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text("262143328850\n")
    return path / "energy_uj"


def test_packages_and_memory_count_and_their_parts_do_not(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 3_000_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 1_000_000)
    limit_j = 262143.32885
    assert rapl_counters(tmp_path) == [RaplCounter(package, limit_j), RaplCounter(memory, limit_j)]
    assert [counter.read_j() for counter in rapl_counters(tmp_path)] == [5.0, 1.0]


def test_a_machine_without_counters_has_none(tmp_path: Path) -> None:
    assert rapl_counters(tmp_path) == []
    (tmp_path / "intel-rapl:0").mkdir()
    assert rapl_counters(tmp_path) == []


def test_the_share_of_the_time_in_which_the_node_computed_is_its_own() -> None:
    meter = EnergyMeter([Scripted(1000.0, 1100.0, 1300.0)], declared_watts=5.0)
    meter.update(10.0, 2.0)
    meter.update(20.0, 7.0)  # 5 of 10 s
    assert meter.total_j == pytest.approx(50.0)
    meter.update(30.0, 17.0)
    assert meter.total_j == pytest.approx(250.0)
    assert meter.measured


def test_a_counter_that_wraps_goes_on() -> None:
    meter = EnergyMeter([Scripted(95.0, 5.0, wraps_at_j=100.0)], None)
    meter.update(10.0, 0.0)
    meter.update(20.0, 10.0)
    assert meter.total_j == pytest.approx(10.0)


def test_declared_power_counts_while_the_node_computes() -> None:
    meter = EnergyMeter([], declared_watts=200.0)
    meter.update(10.0, 0.0)
    meter.update(20.0, 3.0)
    assert meter.total_j == pytest.approx(600.0)
    assert not meter.measured


def test_a_counter_that_fails_leaves_what_the_owner_declared() -> None:
    meter = EnergyMeter([Scripted(1.0)], declared_watts=100.0)
    meter.update(10.0, 0.0)
    meter.update(20.0, 1.0)
    assert meter.total_j == pytest.approx(100.0)
    assert not meter.measured


def test_nobody_knows_nothing() -> None:
    meter = EnergyMeter([], None)
    meter.update(10.0, 0.0)
    meter.update(20.0, 10.0)
    assert meter.total_j == 0.0


def test_a_graphics_card_counts_in_millijoules_or_not_at_all() -> None:
    class NVMLError(Exception):
        pass

    def refuse(*_: object) -> int:
        raise NVMLError("Not Supported")

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2500,
    )
    assert NvmlCounter(nvml, 1).read_j() == 2.5
    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    with pytest.raises(OSError, match="Not Supported"):
        NvmlCounter(nvml, 0)


def test_each_life_of_a_node_announces_its_own_work(tmp_path: Path) -> None:
    metrics = NodeMetrics()
    watched = Watched(tmp_path)
    record = watched.add(0, 10)
    watched.database.close()
    metrics.step_done(rows=1, tokens=1, blocks=10, queue_us=0, compute_us=0)
    work = AnnouncedWork(metrics, declared_watts=None)
    metrics.step_done(rows=2, tokens=1, blocks=10, queue_us=0, compute_us=0)
    metrics.step_done(rows=1, tokens=7, blocks=4, queue_us=0, compute_us=0)
    announced = work.added_to(record)
    assert (announced.decode_block_tokens, announced.prefill_block_tokens) == (20, 28)
    assert (announced.energy_j, announced.energy_measured) == (0, False)
