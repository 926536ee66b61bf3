"""``swarm-node`` that writes down what its memory is made of: for ``scripts.bench.memory``.

A line of JSON every other second, in ``WEIGHED_NODE_FOLDER``, named after the process: resident
bytes, what malloc has given out and what it holds free, and how many blocks Python has allocated.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from pathlib import Path

from swarm.node.cli import main

PERIOD_S = 2.0
FIELDS = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class MallInfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in FIELDS)


def weigh() -> dict[str, float]:
    """Of this process, now."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    malloc = mallinfo2()
    return {
        "at_s": time.monotonic(),
        "resident_bytes": resident_pages * os.sysconf("SC_PAGE_SIZE"),
        "malloc_used_bytes": malloc.uordblks + malloc.hblkhd,
        "malloc_free_bytes": malloc.fordblks,
        "python_blocks": sys.getallocatedblocks(),
    }


def write(folder: Path) -> None:
    """Until the process ends."""
    with (folder / f"{os.getpid()}.jsonl").open("w") as file:
        while True:
            print(json.dumps(weigh()), file=file, flush=True)
            time.sleep(PERIOD_S)


if __name__ == "__main__":
    threading.Thread(
        target=write, args=(Path(os.environ["WEIGHED_NODE_FOLDER"]),), daemon=True
    ).start()
    main()
