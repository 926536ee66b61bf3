"""Network namespaces without names: each lives as long as a descriptor or a process holds it.

For ``netlab``. Needs Linux and root; nothing here touches the namespace of this process.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
import threading

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000


def command_prefix(namespace: int) -> tuple[str, ...]:
    """What to put before a command so that it runs in ``namespace``, while we live."""
    return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{namespace}", "--")


def run_inside(namespace: int, *command: str) -> None:
    """Run a short command there. Raises OSError with its last words."""
    whole = [*command_prefix(namespace), *command]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def _system_call(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _ThreadOfItsOwn(threading.Thread):
    """Changes its own namespace, which no other thread sees, and ends."""

    def __init__(self, namespace: int | None, device: str | None) -> None:
        super().__init__()
        self._namespace = namespace
        self._device = device
        self.descriptor = -1
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            if self._namespace is None or self._device is None:
                _system_call("unshare", CLONE_NEWNET)
                self.descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            else:
                _system_call("setns", self._namespace, CLONE_NEWNET)
                self.descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
                request = struct.pack("16sH22x", self._device.encode(), IFF_TUN | IFF_NO_PI)
                fcntl.ioctl(self.descriptor, TUNSETIFF, request)
        except OSError as error:
            self.error = error

    def result(self) -> int:
        """The descriptor that it opened. Raises OSError."""
        self.start()
        self.join()
        if self.error is not None:
            raise self.error
        return self.descriptor


def new_namespace() -> int:
    """A descriptor that keeps a new network namespace alive. Raises OSError."""
    return _ThreadOfItsOwn(None, None).result()


def open_tun(namespace: int, device: str) -> int:
    """A TUN device in ``namespace``; it vanishes when all copies of the descriptor are closed.

    Raises OSError.
    """
    return _ThreadOfItsOwn(namespace, device).result()
