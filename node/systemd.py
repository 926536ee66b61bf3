"""A node as a service of the system: the unit that systemd runs, and the calls that set it up.

As root it becomes a service of the computer, otherwise one of the user. Stopping it drains the
node, so systemd waits longer than the node's own limit before it kills.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from swarm.node.config import NodeSettings
from swarm.protocol.errors import ConfigError, UsageError

UNIT_NAME = "swarm-node.service"
SYSTEM_FOLDER = Path("/etc/systemd/system")
STOP_MARGIN_S = 30
"""On top of the node's time to drain: for saying goodbye and giving memory back."""
CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What systemd says of the service."""

    unit: str
    installed: bool
    enabled: bool
    active: bool


def unit_text(program: Path, config: Path, settings: NodeSettings, *, as_system: bool) -> str:
    """The unit file. All paths absolute."""
    data_dir = settings.data_dir.expanduser().absolute()
    stop_s = int(settings.drain_timeout_s) + STOP_MARGIN_S
    command = " ".join(map(_quoted, (str(program), "join", "--config", str(config), "--plain")))
    # A manager of a user has no right to most of this, and units that ask for it do not start.
    walls = (
        [
            f"User={_owner(data_dir)}",
            "PrivateTmp=yes",
            "ProtectSystem=strict",
            "ProtectKernelTunables=yes",
            "ProtectControlGroups=yes",
            f"ReadWritePaths={_quoted(str(data_dir))}",
        ]
        if as_system
        else []
    )
    return "\n".join(
        [
            "[Unit]",
            "Description=A node that gives compute to a swarm",
            "After=network-online.target",
            "Wants=network-online.target",
            "StartLimitIntervalSec=600",
            "StartLimitBurst=10",
            "",
            "[Service]",
            "Type=exec",
            f"ExecStart={command}",
            "# SIGTERM lets the node hand its sessions over and leave.",
            "KillSignal=SIGTERM",
            "KillMode=mixed",
            f"TimeoutStopSec={stop_s}",
            "Restart=on-failure",
            "RestartSec=15",
            "Nice=10",
            *walls,
            "NoNewPrivileges=yes",
            "RestrictSUIDSGID=yes",
            "LockPersonality=yes",
            "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
            "UMask=0077",
            "",
            "[Install]",
            f"WantedBy={'multi-user.target' if as_system else 'default.target'}",
            "",
        ]
    )


class Systemd:
    """systemd's manager of the computer, or of the user."""

    def __init__(self, *, as_system: bool, unit_folder: Path | None = None) -> None:
        """Raises UsageError where there is no systemd."""
        if shutil.which("systemctl") is None:
            raise UsageError(
                "this computer has no systemd; let its own service manager run"
                " swarm-node join --config FILE, or see the unit by swarm-node service install"
                " --print"
            )
        self.as_system = as_system
        self.unit_file = (unit_folder or default_folder(as_system=as_system)) / UNIT_NAME

    def install(self, text: str, *, start: bool) -> None:
        """Write the unit, and enable it. Raises ConfigError and UsageError."""
        try:
            self.unit_file.parent.mkdir(parents=True, exist_ok=True)
            self.unit_file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {self.unit_file}: {error.strerror}") from None
        self._call("daemon-reload")
        self._call("enable", *(["--now"] if start else []), UNIT_NAME)

    def remove(self) -> None:
        """Stop the node, which drains first, and forget the unit. Raises UsageError."""
        if not self.unit_file.exists():
            raise UsageError(f"no service is installed: {self.unit_file} is not there")
        self._call("disable", "--now", UNIT_NAME, timeout_s=None)
        self.unit_file.unlink(missing_ok=True)
        self._call("daemon-reload")

    def state(self) -> ServiceState:
        return ServiceState(
            str(self.unit_file),
            self.unit_file.exists(),
            self._run("is-enabled", "--quiet", UNIT_NAME).returncode == 0,
            self._run("is-active", "--quiet", UNIT_NAME).returncode == 0,
        )

    def _call(self, *arguments: str, timeout_s: float | None = CALL_TIMEOUT_S) -> None:
        done = self._run(*arguments, timeout_s=timeout_s)
        if done.returncode:
            reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise UsageError(f"systemctl {' '.join(arguments)} failed: {reason}")

    def _run(
        self, *arguments: str, timeout_s: float | None = CALL_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        command = ["systemctl", *([] if self.as_system else ["--user"]), *arguments]
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UsageError(f"systemctl does not answer: {error}") from None


def default_folder(*, as_system: bool) -> Path:
    """Where units are kept."""
    if as_system:
        return SYSTEM_FOLDER
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "systemd" / "user"


def _owner(data_dir: Path) -> str:
    """Who runs the node: whoever owns its folder, as root would otherwise."""
    folder = data_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.owner()


def _quoted(text: str) -> str:
    """One word of a command in a unit (systemd.service(5), quoting)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'
