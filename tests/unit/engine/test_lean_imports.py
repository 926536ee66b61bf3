"""Placeholders for modules that a node has no use for."""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarm.node.engine import lean_imports
from swarm.node.engine.lean_imports import run_lean

USER = """
import left_out
import left_out.deep.inside
from left_out.deep import Base, helper

@left_out.deep.inside.disable
def plain(number):
    return number + 1

@left_out.options(recursive=False)
def with_options(number):
    return number + 2

class Derived(Base):
    shape = left_out.Shape(1, dim=2)

def late():
    return helper(3)

try:
    import optional_package
except ImportError:
    optional_package = None
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that imports what is left out, and a package that is optional to it."""
    (tmp_path / "lean_user.py").write_text(USER)
    (tmp_path / "optional_package.py").write_text("")
    (tmp_path / "left_out.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lean_imports, "_LEFT_OUT", ("left_out",))
    monkeypatch.setattr(lean_imports, "_OPTIONAL_PACKAGES", ("optional_package",))
    monkeypatch.delitem(sys.modules, "lean_user", raising=False)
    return "lean_user"


def test_a_module_is_imported_without_what_is_left_out(user: str) -> None:
    module = run_lean(lambda: importlib.import_module(user))
    assert (module.plain(1), module.with_options(1)) == (2, 3)
    assert module.optional_package is None
    assert not isinstance(3, module.Base)
    with pytest.raises(ImportError, match=r"left_out\.deep\.helper was left out"):
        module.late()
    # Afterwards everything is what it was.
    assert importlib.import_module("left_out").real
    assert importlib.import_module("optional_package").__file__
    del sys.modules["left_out"], sys.modules["optional_package"]


def test_other_threads_get_the_real_modules(user: str) -> None:
    with ThreadPoolExecutor(1) as other, lean_imports.lean_imports():
        real = other.submit(importlib.import_module, "left_out").result()
    assert real.real
    assert importlib.import_module("left_out") is real
    del sys.modules["left_out"]


def test_what_needs_more_runs_again_with_everything(user: str) -> None:
    tries: list[bool] = []

    def work() -> bool:
        left_out = importlib.import_module("left_out")
        tries.append(hasattr(left_out, "__file__"))
        if not tries[-1]:
            return len(left_out.numbers) > 0  # a placeholder has no length
        return bool(left_out.real)

    assert run_lean(work)
    assert tries == [False, True]
    del sys.modules["left_out"]


def test_other_errors_are_not_tried_again() -> None:
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        raise MemoryError

    with pytest.raises(MemoryError):
        run_lean(work)
    assert tries == [1]


def test_a_process_that_has_imported_everything_is_left_alone(user: str) -> None:
    importlib.import_module("left_out")
    assert run_lean(lambda: importlib.import_module("optional_package")).__file__
    del sys.modules["left_out"], sys.modules["optional_package"]
