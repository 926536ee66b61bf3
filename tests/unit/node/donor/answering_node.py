"""A node's control socket without the node: notes what it is asked."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

from swarm.node.control import control_path
from swarm.node.donor.limits import DonorLimits


class AnsweringNode:
    """Answers in a thread while in use."""

    def __init__(self, key: Path) -> None:
        self.key = key
        self.asked: list[dict[str, Any]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(control_path(key)))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        answer = {"limits": DonorLimits().to_json(), "reasons": [], "rests_until": ""}
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as lines:
                for line in lines:
                    self.asked.append(json.loads(line))
                    lines.write(json.dumps(answer).encode() + b"\n")
                    lines.flush()

    def __enter__(self) -> AnsweringNode:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
