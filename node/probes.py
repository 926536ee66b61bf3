"""Measurements of this computer for ``doctor``. Judged there, only taken here."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import psutil

from swarm.node.config import NodeSettings
from swarm.node.doctor import ComputeFacts, ModelFacts, NetworkFacts
from swarm.protocol.identity import Identity

CLOCK_NOT_SYNCHRONISED = 5
"""``TIME_ERROR`` of adjtimex(2)."""


class SystemProbes:
    """The real measurements; see :class:`swarm.node.doctor.Probes`."""

    def python_version(self) -> tuple[int, int]:
        return sys.version_info.major, sys.version_info.minor

    def memory_bytes(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)

    def disk_free_bytes(self, path: Path) -> int:
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def cpu(self) -> tuple[int, frozenset[str] | None]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cores or 1, _cpu_flags()

    def clock_error_s(self) -> float | None:
        return _kernel_clock_error_s()

    def compute(self, device: str, dtype: str) -> ComputeFacts:
        from swarm.compute.devices import available_devices, choose_device, choose_dtype, dtype_name

        chosen = choose_device(device)
        return ComputeFacts(
            torch_version=metadata.version("torch"),
            devices=available_devices(),
            chosen_device=str(chosen),
            chosen_dtype=dtype_name(choose_dtype(dtype, chosen)),
        )

    def identity(self, path: Path) -> str:
        return Identity.load(path).peer_id if path.exists() else ""

    async def network(self, settings: NodeSettings) -> NetworkFacts:
        """Start the network with a key of its own: the node itself may be running."""
        from swarm.hivemind_network import HivemindNetwork, NetworkSettings

        with tempfile.TemporaryDirectory(prefix="swarm-doctor-") as directory:
            key = Path(directory) / "identity.key"
            Identity.generate().save(key)
            network = await HivemindNetwork.create(
                key,
                NetworkSettings(
                    listen_addresses=settings.listen_addresses,
                    initial_peers=settings.peers,
                    announce_addresses=settings.announce_addresses,
                    use_relays=settings.use_relay,
                    relays=settings.relays,
                    serve_directory=False,
                ),
            )
            try:
                return NetworkFacts(
                    addresses=tuple(await network.addresses()),
                    clock_offset_s=network.clock_offset_s,
                    behind_router=network.behind_router,
                    relays=len(network.relays),
                    reached=(await network.dial_back()).reached,
                )
            finally:
                await network.close()

    def model(self, name: str) -> ModelFacts:
        from swarm.catalogue.checkpoint import Checkpoint
        from swarm.catalogue.resolve import resolve_checkpoint

        checkpoint = Checkpoint.open(resolve_checkpoint(name, allow_download=False))
        blocks = checkpoint.number_of_blocks
        largest = max(checkpoint.block_bytes(block) for block in range(blocks))
        return ModelFacts(number_of_blocks=blocks, block_bytes=largest)


def _cpu_flags() -> frozenset[str] | None:
    """Feature flags by Linux' /proc/cpuinfo (x86: flags, ARM: Features)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


class _Timex(ctypes.Structure):
    """The head of ``struct timex``; the kernel writes beyond it, into ``rest``."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("frequency", ctypes.c_long),
        ("maximum_error_us", ctypes.c_long),
        ("estimated_error_us", ctypes.c_long),
        ("rest", ctypes.c_long * 64),
    )


def _kernel_clock_error_s() -> float | None:
    """Ask the kernel (adjtimex, changing nothing) how far its clock may be off."""
    library = ctypes.util.find_library("c")
    if not sys.platform.startswith("linux") or library is None:
        raise OSError("the clock can be asked on Linux only")
    timex = _Timex()
    state = ctypes.CDLL(library, use_errno=True).adjtimex(ctypes.byref(timex))
    if state < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
    return None if state == CLOCK_NOT_SYNCHRONISED else timex.maximum_error_us / 1e6
