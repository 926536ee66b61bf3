"""Packs what a computer without any network but its own needs to join a swarm.

::

    join.sh  ask.sh     what to run there
    README.txt          in words
    wheels/             this software and what it needs, and the pip that installs it
    mirror/             models and adapters (``swarm.catalogue.mirror``)
    charter.swarm       and, where there is one, passport.swarm or invitation.swarm
    node.toml           settings: the mirror, no hub, the peers to join by

Nothing in it is believed because it lies on a stick: weights are checked by their manifests, these
by the publishers of the charter, and the charter by whoever compares its swarm's id.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.catalogue.holdings import Holding
from swarm.catalogue.mirror import write_mirror
from swarm.protocol.errors import CheckpointError, UsageError
from swarm.protocol.version import DISTRIBUTION, software_version

AUTO = "auto"
NONE = "none"
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "swarm", "client", "node", "protocol")
"""What a checkout's wheel is made of."""

JOIN_SH = """#!/bin/sh
# Host blocks of {model} until Ctrl-C. Arguments go to swarm-node join.
set -e
kit=$(cd "$(dirname "$0")" && pwd)
. "$kit/environment.sh"
exec "$swarm_node" join {model} --config "$kit/node.toml" --mirror "$kit/mirror" "$@"
"""

ASK_SH = """#!/bin/sh
# Ask {model} in the swarm: sh ask.sh "a question"
set -e
kit=$(cd "$(dirname "$0")" && pwd)
. "$kit/environment.sh"
SWARM_PEERS=${{SWARM_PEERS:-{peers}}} SWARM_MIRRORS="$kit/mirror" SWARM_HUB=false \\
    exec "$swarm_user" generate {model} "$@"
"""

ENVIRONMENT_SH = """# Installs the software from wheels/, once; keeps charter and passport.
export HF_HUB_OFFLINE=1
venv=${SWARM_VENV:-$HOME/.local/share/sovereign-swarm/venv}
if [ -d "$kit/wheels" ] && [ ! -x "$venv/bin/swarm-node" ]; then
    python=
    for found in "$PYTHON" pythonWANTED python3; do
        if [ -n "$found" ] && "$found" -c 'import sys; sys.exit(not CHECK)' 2>/dev/null; then
            python=$found
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "this kit needs Python WANTED; install it, or say PYTHON=/path/to/pythonWANTED" >&2
        exit 1
    fi
    echo "installing into $venv; this takes some minutes" >&2
    # Not every Python comes with a pip: the kit brings its own.
    "$python" -m venv --without-pip "$venv"
    for pip in "$kit"/wheels/pip-*.whl; do
        "$venv/bin/python" "$pip/pip" --isolated --disable-pip-version-check install --quiet \\
            --no-index --no-cache-dir --find-links "$kit/wheels" DISTRIBUTION
    done
fi
if [ -x "$venv/bin/swarm-node" ]; then
    swarm_node=$venv/bin/swarm-node swarm_user=$venv/bin/swarm
else
    swarm_node=swarm-node swarm_user=swarm
fi
for file in charter passport invitation; do
    if [ -f "$kit/$file.swarm" ] && [ "$file" != invitation -o ! -f "$kit/.accepted" ]; then
        "$swarm_node" accept "$kit/$file.swarm" >/dev/null
        [ "$file" = invitation ] && touch "$kit/.accepted"
    fi
done
"""

README = """{name}: a kit to join the swarm without a network

sh join.sh            hosts blocks of {model} on this computer until Ctrl-C
sh ask.sh "Hello"     asks the swarm

What must be there: {needs}.

join.sh installs the software from this folder; no other computer than those of the
swarm is contacted. Weights come from peers of the swarm, and from the folder mirror/ where no peer
has them; each chunk is checked.
"""


@dataclass(frozen=True, slots=True)
class KitContents:
    """What goes into a kit."""

    holdings: Sequence[Holding]
    peers: Sequence[str] = ()
    charter: Path | None = None
    passport: Path | None = None
    invitation: Path | None = None
    wheels: str = AUTO
    """``auto`` asks pip for them, ``none`` leaves them out, else a folder that has them."""


def make_kit(folder: Path, contents: KitContents) -> None:
    """Write a kit into a folder. Raises UsageError and CheckpointError."""
    models = [item.manifest for item in contents.holdings if item.manifest.kind == "model"]
    if not models:
        raise UsageError("a kit needs a model: name one")
    model = models[0].name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if contents.wheels != NONE:
            _gather_wheels(folder / "wheels", contents.wheels)
        write_mirror(folder / "mirror", contents.holdings)
        for name in ("charter", "passport", "invitation"):
            source: Path | None = getattr(contents, name)
            if source is not None:
                shutil.copyfile(source.expanduser(), folder / f"{name}.swarm")
        peers = ",".join(contents.peers)
        (folder / "node.toml").write_text(_node_toml(contents.peers), "utf-8")
        (folder / "environment.sh").write_text(_environment_sh(contents.wheels), "utf-8")
        (folder / "join.sh").write_text(JOIN_SH.format(model=model), "utf-8")
        (folder / "ask.sh").write_text(ASK_SH.format(model=model, peers=peers), "utf-8")
        (folder / "README.txt").write_text(
            README.format(name=folder.name, model=model, needs=_needs(contents.wheels)), "utf-8"
        )
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error


def pack(folder: Path, archive: Path) -> None:
    """The folder as one tar file; weights do not compress. Raises CheckpointError."""
    try:
        with tarfile.open(archive, "w") as tar:
            tar.add(folder, arcname=folder.name)
    except OSError as error:
        raise CheckpointError(f"cannot write {archive}: {error.strerror}") from error


def _node_toml(peers: Sequence[str]) -> str:
    listed = ", ".join(f'"{peer}"' for peer in peers)
    return f"# Settings of a node that this kit starts.\npeers = [{listed}]\nhub = false\n"


def _needs(wheels: str) -> str:
    """What must be on the other computer, in words."""
    if wheels != AUTO:
        return "Python 3.11 or newer"
    system = f"{platform.system()} on {platform.machine()}"
    return f"{system} with Python {sys.version_info.major}.{sys.version_info.minor}"


def _environment_sh(wheels: str) -> str:
    """Compiled wheels are for one version of Python, if they are those of this computer."""
    major, minor = sys.version_info[:2]
    wanted, check = "3.11", "sys.version_info >= (3, 11)"
    if wheels == AUTO:
        wanted, check = f"{major}.{minor}", f"sys.version_info[:2] == ({major}, {minor})"
    filled = {"DISTRIBUTION": DISTRIBUTION, "WANTED": wanted, "CHECK": check}
    script = ENVIRONMENT_SH
    for name, value in filled.items():
        script = script.replace(name, value)
    return script


def _gather_wheels(target: Path, source: str) -> None:
    """Wheels of this version and all that it needs, and pip's own, for computers like this one."""
    target.mkdir(parents=True, exist_ok=True)
    if source != AUTO:
        wheels = sorted(Path(source).expanduser().glob("*.whl"))
        if not any(wheel.name.startswith("pip-") for wheel in wheels):
            raise UsageError(f"{source} needs a wheel of pip beside the others: pip download pip")
        for wheel in wheels:
            shutil.copyfile(wheel, target / wheel.name)
        return
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(target), "pip"]
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").exists():
        _run_pip([*command, f"{DISTRIBUTION}=={software_version()}"])
        return
    if (root / "constraints.txt").exists():
        command += ["--constraint", str(root / "constraints.txt")]
    with tempfile.TemporaryDirectory() as temporary:
        _run_pip([*command, str(copy_sources(root, Path(temporary) / "sources"))])


def copy_sources(checkout: Path, target: Path) -> Path:
    """What a wheel is built from, in a new folder: setuptools leaves things where it builds, and
    finds what it left there before."""
    target.mkdir()
    for name in BUILT_FROM:
        if (checkout / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(checkout / name, target / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(checkout / name, target)
    return target


def _run_pip(command: Sequence[str]) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise UsageError(
            "pip could not gather the wheels; do it where there is a network, or name a folder "
            "that has them by --wheels"
        )
