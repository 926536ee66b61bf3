"""Settings of the numeric libraries' threads that only count before torch is imported.

Free of torch, so that command lines can call it first and still answer ``--help`` at once.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

SPIN_COUNT = 4000
"""How often a node's OpenMP thread looks for more work before it sleeps: some 20 microseconds.

Enough to bridge the gaps inside one step (28 ms instead of 36 for a small model with two threads),
and short enough to leave the cores to others between steps."""


def configure_threads_environment(threads: int | None = None, *, is_node: bool = False) -> bool:
    """Let OpenMP threads sleep while they wait, and cap their number at ``threads``.

    Spinning threads of one process steal the cores of every other process: with a busy neighbour a
    token takes 38.8 ms instead of 15.0. What the user has set in the environment is kept. Returns
    False when torch is already imported, in which case nothing of this has any effect.
    """
    if "torch" in sys.modules:
        return False
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if is_node:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, str(threads))
    return True


async def run_in_own_thread(function: Callable[[], T]) -> T:
    """``asyncio.to_thread`` for work with tensors: in a thread that ends with it.

    A thread that has run a parallel product keeps its OpenMP team, and with more such threads in a
    process than cores, libgomp stops spinning in all of them: each product of the device thread
    then waits for its team to be woken. Ten blocks of a small model took 11.8 ms instead of 8.8,
    five of a larger one 26 instead of 20, because the weights had been loaded by another thread.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="swarm-passing")
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, function)
    finally:
        executor.shutdown(wait=False)
