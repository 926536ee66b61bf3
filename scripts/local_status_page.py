"""``swarm status-page`` as a process of its own, owned by us: for tests and benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from scripts.local_swarm import compute_environment
from scripts.process_keeper import KeptProcess

SWARM = Path(sys.executable).with_name("swarm")


class LocalStatusPage:
    """Entering the ``with`` block waits until it listens; leaving it ends it."""

    def __init__(self, peers: Sequence[str], folder: Path, *options: str) -> None:
        """Memory and log are in ``folder``: a second page there goes on where the first ended."""
        self._command = [
            *(str(SWARM), "status-page", "--peers", *peers[:1], "--port", "0", "--json"),
            *("--database", str(folder / "status.sqlite"), *options),
        ]
        self._log = folder / "status-page.log"
        self.url = ""

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Self:
        own = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
        own |= compute_environment(1) | {"HF_HUB_OFFLINE": "1"}
        with self._log.open("wb") as log:
            self.process = KeptProcess(
                self._command, environment=own, stdout=subprocess.PIPE, stderr=log
            )
        stdout = self.process.stdout
        line = stdout.readline() if stdout is not None else b""
        event: dict[str, Any] = json.loads(line) if line else {}
        if event.get("event") != "ready":
            self.process.stop()
            raise RuntimeError(f"the status page did not start: {event}\n{self.log[-3000:]}")
        self.url = str(event["url"])
        return self

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        code = self.process.stop()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
