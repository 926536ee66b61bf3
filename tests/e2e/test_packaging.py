"""What users install: wheel, sdist and editable install hold everything, and the wheel serves."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.local_swarm import LocalSwarm, Span, SwarmPlan

REPOSITORY = Path(__file__).parents[2]
LINKED = ("client", "node", "protocol")


@dataclass(frozen=True, slots=True)
class Built:
    """A copy of the sources and what was built from it."""

    sources: Path
    wheel: Path
    sdist: Path


def expected_modules() -> Iterator[str]:
    """All modules as they must be importable: ``swarm/node/cli.py`` and so on."""
    for folder in ("swarm", *LINKED):
        for module in sorted((REPOSITORY / folder).rglob("*.py")):
            path = module.relative_to(REPOSITORY)
            inside_link = path.parts[0] == "swarm" and path.parts[1] in LINKED
            if not inside_link:
                yield str(path) if path.parts[0] == "swarm" else f"swarm/{path}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Sdist, and the wheel out of the sdist; from a copy, so that the repository stays clean."""
    folder = tmp_path_factory.mktemp("packaging")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, sources)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("swarm", *LINKED):
        shutil.copytree(REPOSITORY / name, sources / name, symlinks=True, ignore=ignored)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run([*build, str(sources)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return Built(sources, wheel, sdist)


def new_environment(folder: Path, *install: str) -> Path:
    """An environment with our package as ``pip install`` makes it; its python.

    The dependencies are those of the environment that runs the tests: their folder is on the path,
    but what an editable install has put there is not, since only ``.pth`` files of an environment's
    own folder count.
    """
    venv.create(folder)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    pip += ["--no-deps", "--no-index", "--no-build-isolation", *install]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


def output(command: list[str], folder: Path) -> str:
    """Standard output of a command that must succeed, run in ``folder``."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = "import swarm.node.cli, swarm.client, swarm.protocol.messages as m; print(m.__file__)"


def test_the_wheel_holds_all_modules_once_as_plain_files(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = wheel.namelist()
        links = [info for info in wheel.infolist() if (info.external_attr >> 28) == 0xA]
    assert sorted(name for name in names if name.endswith(".py")) == sorted(expected_modules())
    assert "swarm/py.typed" in names
    assert not links
    assert {name.split("/")[0] for name in names} == {"swarm", "sovereign_swarm-0.1.0.dist-info"}


def test_the_sdist_holds_all_modules_as_plain_files(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        files = {member.name.partition("/")[2] for member in sdist if member.isfile()}
        links = [member.name for member in sdist if member.issym() or member.islnk()]
    assert set(expected_modules()) <= files
    assert not links


def test_an_editable_install_imports_the_sources(built: Built, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "venv", "--editable", str(built.sources))
    imported = Path(output([str(python), "-c", IMPORT], tmp_path).strip())
    assert imported.resolve() == built.sources / "protocol" / "messages" / "__init__.py"


def test_the_wheel_serves_a_block_from_another_folder(
    built: Built, tmp_path: Path, smollm2_path: Path
) -> None:
    python = new_environment(tmp_path / "venv", str(built.wheel))
    imported = Path(output([str(python), "-c", IMPORT], tmp_path).strip())
    assert imported.is_relative_to(tmp_path / "venv")
    for name, said in (("swarm-node", "join"), ("swarm", "generate")):
        assert said in output([str(python.with_name(name)), "--help"], tmp_path)
    plan = SwarmPlan(smollm2_path, (Span(3, 4),), program=python.with_name("swarm-node"))
    with LocalSwarm(plan) as swarm:
        assert swarm.nodes[0].span == Span(3, 4)
        models = [str(python.with_name("swarm")), "models", "--json", "--peers", swarm.peers[0]]
        assert smollm2_path.name in output(models, tmp_path)
        assert set(swarm.stop().values()) == {0}
