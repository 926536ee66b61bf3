"""The service of a node: its unit, and what is asked of systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.node.config import NodeSettings
from swarm.node.systemd import Systemd, unit_text
from swarm.protocol.errors import UsageError

SWARM_NODE = Path(sys.executable).with_name("swarm-node")
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$SYSTEMCTL_LOG"
case "$*" in
  *is-enabled*|*is-active*) test -e "$SYSTEMCTL_LOG.enabled" ;;
  *enable*--now*) touch "$SYSTEMCTL_LOG.enabled" ;;
  *disable*) rm -f "$SYSTEMCTL_LOG.enabled" ;;
esac
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "a node $HOME 100%.toml"
    path.write_text(f'model = "tiny"\ndata_dir = "{tmp_path}/data"\ndrain_timeout_s = 40\n')
    return path


def run(
    tmp_path: Path, *arguments: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    own |= {
        "PATH": path if path is not None else f"{tmp_path}:{os.environ['PATH']}",
        "SYSTEMCTL_LOG": str(tmp_path / "calls"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "NO_COLOR": "1",
    }
    return subprocess.run(
        [str(SWARM_NODE), "service", *arguments],
        env=own,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("as_system", [True, False])
def test_systemd_accepts_the_unit(tmp_path: Path, config: Path, as_system: bool) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this computer (Debian: apt-get install systemd)")
    (tmp_path / "data").mkdir()
    settings = NodeSettings(model="tiny", data_dir=tmp_path / "data")
    unit = tmp_path / "swarm-node.service"
    unit.write_text(unit_text(SWARM_NODE, config, settings, as_system=as_system))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if unit.name in line]
    assert ours == []


def test_the_unit_waits_for_the_drain_and_quotes_its_words(config: Path) -> None:
    text = unit_text(
        Path("/opt/swarm node/swarm-node"),
        config,
        NodeSettings(model="tiny", drain_timeout_s=40),
        as_system=False,
    )
    assert "TimeoutStopSec=70" in text
    assert 'ExecStart="/opt/swarm node/swarm-node" "join" "--config" ' in text
    assert "a node $$HOME 100%%.toml" in text


def test_install_status_remove(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemctl(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SYSTEMCTL_LOG", str(tmp_path / "calls"))
    systemd = Systemd(as_system=False, unit_folder=tmp_path / "units")
    assert not systemd.state().installed
    text = unit_text(SWARM_NODE, config, NodeSettings(model="tiny"), as_system=False)
    systemd.install(text, start=True)
    assert systemd.unit_file.read_text() == text
    state = systemd.state()
    assert (state.installed, state.enabled, state.active) == (True, True, True)
    systemd.remove()
    assert not systemd.unit_file.exists()
    assert not systemd.state().active
    with pytest.raises(UsageError, match="no service is installed"):
        systemd.remove()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "--user enable --now swarm-node.service" in calls
    assert "--user disable --now swarm-node.service" in calls


def test_what_systemctl_complains_of_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemctl"
    program.write_text("#!/bin/sh\necho Access denied >&2\nexit 4\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UsageError, match="daemon-reload failed: Access denied"):
        Systemd(as_system=False, unit_folder=tmp_path).install("", start=True)


def systemctl(tmp_path: Path) -> None:
    program = tmp_path / "systemctl"
    program.write_text(SYSTEMCTL)
    program.chmod(0o755)


def test_print_changes_nothing_and_a_wrong_file_is_refused(tmp_path: Path, config: Path) -> None:
    systemctl(tmp_path)
    shown = run(tmp_path, "install", "--config", str(config), "--print")
    assert shown.returncode == 0
    assert shown.stdout.startswith("[Unit]\n")
    assert not (tmp_path / "calls").exists()
    config.write_text("nonsense = 1\n")
    assert run(tmp_path, "install", "--config", str(config)).returncode == 2


def test_without_systemd_it_says_what_to_do(tmp_path: Path, config: Path) -> None:
    done = run(tmp_path, "install", "--config", str(config), path=str(tmp_path))
    assert done.returncode == 2
    assert "this computer has no systemd" in done.stderr
