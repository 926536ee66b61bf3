"""Starts what ``docker-compose.yml`` describes as processes of this computer, without Docker.

    python -m scripts.local_compose              # until Ctrl-C

Commands, environments, the order of the start and health checks are those of the file. What a
container would have of its own is replaced: volumes by folders, names of services and 0.0.0.0 by
loopback, published ports by free ones. Users, read-only file systems and images are Docker's and
not tried here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from scripts.local_swarm import compute_environment, end_on_sigterm
from scripts.process_keeper import KeptProcess
from swarm.catalogue.resolve import models_directory

REPOSITORY = Path(__file__).parents[1]
COMPOSE_FILE = REPOSITORY / "docker-compose.yml"
VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::-([^}]*))?\})")
START_DEADLINE_S = 180.0
PORT_RANGE = (20_000, 32_000)
PORTS = {
    "SWARM_SEED_PORT": 31330,
    "SWARM_NODE_1_PORT": 31331,
    "SWARM_NODE_2_PORT": 31332,
    "SWARM_NODE_3_PORT": 31333,
    "SWARM_GATEWAY_PORT": 8000,
    "SWARM_STATUS_PORT": 8090,
    "SWARM_OPERATOR_PORT": 8440,
}
"""What the file calls its ports: here they share one computer."""


class ComposeError(Exception):
    """A service did not start; the text has its last words."""


def read_compose(variables: Mapping[str, str], path: Path = COMPOSE_FILE) -> dict[str, Any]:
    """The file with its variables filled in; ``$$`` stays for :func:`unescaped`."""

    def filled(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$$"
        return variables.get(match[1], match[2] or "")

    text = VARIABLE.sub(filled, path.read_text(encoding="utf-8"))
    document: dict[str, Any] = yaml.safe_load(text)
    return document


class LocalCompose:
    """Entering the ``with`` block waits until all services are healthy; leaving it ends them."""

    def __init__(self, folder: Path, *, models: Path | None = None) -> None:
        """``models``: where the demo model is already, as ``XDG_DATA_HOME``."""
        self.folder = folder
        self.ports = _free_ports()
        variables = {name: str(port) for name, port in self.ports.items()}
        document = read_compose(variables)
        self.services: dict[str, dict[str, Any]] = document["services"]
        self._volumes = {name: folder / name for name in document["volumes"]}
        if models is not None:
            self._volumes["models"] = models
        self._running: dict[str, KeptProcess] = {}
        self._finished: set[str] = set()

    def url(self, variable: str) -> str:
        """Of a published port, as ``SWARM_GATEWAY_PORT``."""
        return f"http://127.0.0.1:{self.ports[variable]}"

    def __enter__(self) -> Self:
        for volume in self._volumes.values():
            volume.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline_s = time.monotonic() + START_DEADLINE_S
        try:
            waiting = dict(self.services)
            while waiting:
                ready = [name for name in waiting if self._may_start(waiting[name])]
                for name in ready:
                    self._start(name, waiting.pop(name))
                self._check(deadline_s)
                time.sleep(0.05)
            while not all(self._is_healthy(name) for name in self._running):
                self._check(deadline_s)
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> dict[str, int]:
        """End all services, the last ones first; the exit code of each."""
        codes = {}
        for name, process in reversed(self._running.items()):
            codes[name] = process.stop()
        self._running.clear()
        return codes

    def kill(self, name: str) -> None:
        """SIGKILL to a service."""
        self._running.pop(name).kill()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    # --- one service -----------------------------------------------------------------------------
    def _may_start(self, service: Mapping[str, Any]) -> bool:
        for name, wanted in service.get("depends_on", {}).items():
            if wanted["condition"] == "service_completed_successfully":
                if name not in self._finished:
                    return False
            elif name not in self._running or not self._is_healthy(name):
                return False
        return True

    def _start(self, name: str, service: Mapping[str, Any]) -> None:
        command = [self._here(word, service) for word in service["command"]]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = KeptProcess(
                command,
                environment=self._environment(service),
                folder=REPOSITORY,
                stdout=log,
                stderr=log,
            )

    def _check(self, deadline_s: float) -> None:
        """Take note of what has ended. Raises ComposeError for what should not have."""
        for name, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            process.stop()
            del self._running[name]
            if code or self.services[name]["restart"] != "no":
                raise ComposeError(f"{name} ended with code {code}:\n{self.log(name)[-2000:]}")
            self._finished.add(name)
        if time.monotonic() > deadline_s:
            late = [name for name in self._running if not self._is_healthy(name)]
            words = "\n".join(f"{name}: {self.log(name)[-800:]}" for name in late)
            raise ComposeError(f"not healthy in time: {', '.join(late)}\n{words}")

    def _is_healthy(self, name: str) -> bool:
        service = self.services[name]
        check = service.get("healthcheck")
        if check is None:
            return True
        kind, *words = (self._here(word, service) for word in check["test"])
        command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        try:
            done = subprocess.run(
                command,
                env=self._environment(service),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=float(str(check["timeout"]).removesuffix("s")),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def _environment(self, service: Mapping[str, Any]) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
        own["PATH"] = f"{Path(sys.executable).parent}:{own.get('PATH', os.defpath)}"
        own |= compute_environment(0) | {"HOME": str(self._mounted(service).get("/data", "/tmp"))}  # noqa: S108
        declared = service.get("environment", {})
        return own | {name: self._here(str(value), service) for name, value in declared.items()}

    def _mounted(self, service: Mapping[str, Any]) -> dict[str, Path]:
        mounts = (volume.split(":") for volume in service.get("volumes", ()))
        return {target: self._volumes[name] for name, target, *_ in mounts}

    def _here(self, text: str, service: Mapping[str, Any]) -> str:
        """A text of the file as it is meant on this computer."""
        text = text.replace("$$", "$").replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        text = re.sub(r"/dns4/[\w-]+/", "/ip4/127.0.0.1/", text)
        text = re.sub(r"http://[\w-]+:(?=\d)", "http://127.0.0.1:", text)
        for target, folder in self._mounted(service).items():
            text = re.sub(rf"(?<![\w./-]){re.escape(target)}(?![\w.-])", str(folder), text)
        return text


def _free_ports() -> dict[str, int]:
    """One for each of ``PORTS``, below those that systems give to whoever asks for any."""
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        for name in PORTS:
            while name not in ports:
                listener = held.enter_context(socket.socket())
                port = random.randrange(*PORT_RANGE)
                with contextlib.suppress(OSError):
                    listener.bind(("127.0.0.1", port))
                    ports[name] = port
    return ports


def demo_model_home() -> Path | None:
    """``XDG_DATA_HOME`` with the demo model, if it was prepared on this computer."""
    from scripts.prepare_demo_model import demo_model_folder, is_prepared

    return models_directory().parents[1] if is_prepared(demo_model_folder()) else None


def main() -> None:
    """Run until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m scripts.local_compose")
    parser.add_argument("--folder", type=Path, help="for volumes and logs; else a temporary one")
    options = parser.parse_args()
    end_on_sigterm()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="sovereign-swarm-"))
    try:
        with LocalCompose(folder, models=demo_model_home()) as compose:
            for name, variable in (
                ("chat and API", "SWARM_GATEWAY_PORT"),
                ("status page", "SWARM_STATUS_PORT"),
                ("operator", "SWARM_OPERATOR_PORT"),
            ):
                print(f"  {name:14} {compose.url(variable)}")
            print("  Ctrl-C stops everything")
            signal.pause()
    except KeyboardInterrupt:
        print("  stopped")
    except ComposeError as error:
        sys.exit(f"error: {error}")
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
