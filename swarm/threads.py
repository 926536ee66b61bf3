"""Settings of the numeric libraries' threads that only count before torch is imported.

Free of torch, so that command lines can call it first and still answer ``--help`` at once.
"""

from __future__ import annotations

import os
import sys

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
