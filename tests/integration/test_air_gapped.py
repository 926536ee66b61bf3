"""A kit on a computer whose network leads nowhere: software and weights come from the kit."""

from __future__ import annotations

import ensurepip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.authority import Authority
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.kit import KitContents, copy_sources, make_kit
from swarm.client.publishing import describe_directory
from swarm.membership_files import CHARTER, PASSPORT, write_file
from swarm.protocol.identity import Identity
from swarm.protocol.manifest import sign_manifest
from swarm.protocol.passport import AdmissionMode, Charter

LAN = "10.77.0.1"
PORT = 34771
SCRIPT = f"""
set -e
ip link set lo up
ip addr add {LAN}/24 dev lo
test -z "$(ip route show default)"
exec "$@"
"""

HOLD = "print('there', flush=True); input()"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def network() -> Iterator[list[str]]:
    """Puts a command into a network namespace of its own, which has a LAN and no route out."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", SCRIPT, "sh", sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"there\n"
    yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
    holder.communicate()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This software's own wheel, and a pip that installs it."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = copy_sources(Path(__file__).parents[2], folder / "sources")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(sources)]
    subprocess.run(command, check=True)
    (pip,) = Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")
    shutil.copy(pip, folder)
    return folder


def packages_without_ours(folder: Path) -> Path:
    """What our package needs, as links: a kit's wheels of all that are 500 MB."""
    folder.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if "sovereign_swarm" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(home),
        "PYTHON": sys.executable,
        "SWARM_VENV": str(home / "venv"),
        "SWARM_NODE_DATA_DIR": str(home / "data"),
        "OMP_NUM_THREADS": "1",
    }


def ready_line(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, object] = json.loads(line)
        if event["event"] in ("ready", "error"):
            return event
    raise AssertionError(f"it ended with {process.wait()} and said nothing")


def test_a_node_joins_from_the_kit(
    tmp_path: Path, checkpoint: Path, wheels: Path, network: list[str]
) -> None:
    authority = Authority.found(
        tmp_path / "authority",
        Charter(bytes(32), 1, "Island", AdmissionMode.MEMBERS, (), hub=False),
    )
    homes = {name: tmp_path / name for name in ("seed", "node")}
    for home in homes.values():
        identity = Identity.load_or_create(home / "data" / "identity.key")
        write_file(CHARTER, home / "data" / "charter.swarm", authority.sealed_charter)
        passport = authority.issue(identity.peer_id, organisation="School", country="KE")
        write_file(PASSPORT, home / "data" / "passport.swarm", passport)
    seed_peer = Identity.load(homes["seed"] / "data" / "identity.key").peer_id
    described = describe_directory(checkpoint, name="Island-1M", licence="MIT")
    signed = sign_manifest(authority.identity, described.manifest)
    kit = tmp_path / "kit"
    make_kit(
        kit,
        KitContents(
            [described.holding((signed,))],
            peers=(f"/ip4/{LAN}/tcp/{PORT}/p2p/{seed_peer}",),
            charter=homes["node"] / "data" / "charter.swarm",
            passport=homes["node"] / "data" / "passport.swarm",
            wheels=str(wheels),
        ),
    )
    for name in ("charter.swarm", "passport.swarm"):
        (homes["node"] / "data" / name).unlink()  # they come with the kit
    shutil.rmtree(checkpoint)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = homes["node"] / "venv" / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    needed = packages_without_ours(tmp_path / "packages")
    (packages / "needed.pth").write_text(f"{needed}\n")
    common = ["--json", "--no-metrics"]
    started: list[subprocess.Popen[str]] = []
    try:
        for command, home in (
            (
                [
                    *(sys.executable, "-m", "swarm.node.cli", "seed", *common),
                    *("--listen", f"/ip4/{LAN}/tcp/{PORT}"),
                ],
                homes["seed"],
            ),
            (["sh", str(kit / "join.sh"), *common, "--listen", f"/ip4/{LAN}/tcp/0"], homes["node"]),
        ):
            started.append(
                subprocess.Popen(
                    [*network, *command],
                    env=environment(home),
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
            event = ready_line(started[-1])
            assert event["event"] == "ready", event
        assert (packages / "swarm" / "node" / "cli.py").is_file()
        assert event["model"] == "Island-1M"
        assert (event["first_block"], event["end_block"]) == (0, 4)
        (stored,) = (homes["node"] / "data" / "store").iterdir()
        assert Checkpoint.open(stored).revision == described.manifest.revision
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
