"""``swarm gateway`` as a process of its own, owned by us: for tests and benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from scripts.local_swarm import compute_environment
from scripts.process_keeper import KeptProcess

SWARM = Path(sys.executable).with_name("swarm")


class LocalGateway:
    """Entering the ``with`` block waits until it listens; leaving it ends it."""

    def __init__(
        self, model: Path, peers: Sequence[str], folder: Path, *options: str, threads: int = 1
    ) -> None:
        self._command = [
            *(str(SWARM), "gateway", "--model", str(model), "--dtype", "float32", "--port", "0"),
            *("--peers", *peers[:1], "--json", "--keys-file", str(folder / "keys.json"), *options),
        ]
        self._log = folder / "gateway.log"
        self._environment = compute_environment(threads)
        self.ready: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def __enter__(self) -> LocalGateway:
        with self._log.open("wb") as log:
            self.process = KeptProcess(
                self._command,
                environment=_own() | self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        stdout = self.process.stdout
        line = stdout.readline() if stdout is not None else b""
        event = json.loads(line) if line else {}
        if event.get("event") != "ready":
            self.process.stop()
            raise RuntimeError(f"the gateway did not start: {event}\n{self.log[-3000:]}")
        self.ready = event
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
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _own() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    return own | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
