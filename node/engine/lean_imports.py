"""Import decoder layers without the compilers and the distributed training that come with them.

A family's file in transformers imports, through what it shares with training and compiling, parts
of torch and of other packages that computing blocks never uses: half of what a node would need
beside its weights (117 of 172 MB above torch itself), and a second of its start.

While ``lean_imports`` lasts, these modules are placeholders for the thread that entered it. Used as
decorators they leave functions as they are; what is called later on says what is missing.
It is for the process of a node, whose only business with transformers are these layers. When a
release of transformers or torch turns out to need more, ``run_lean`` imports everything.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

_log = logging.getLogger(__name__)

Value = TypeVar("Value")

_LEFT_OUT = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
)
_OPTIONAL_PACKAGES = ("accelerate", "scipy", "sklearn")
"""transformers uses them where they are installed; to it they are not."""
_MISSING_PART = (ImportError, AttributeError, NameError, TypeError)
"""What comes of using a placeholder for more than a name."""


class _Placeholder(type):
    """The type of a name from a module left out: a class, since names are also inherited from."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(f"{cls.__module__}.{cls.__name__}", name)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            raise ImportError(f"{cls.__module__}.{cls.__name__} was left out of this process")
        return arguments[0] if arguments and callable(arguments[0]) else cls


def _placeholder(module: str, name: str) -> _Placeholder:
    return _Placeholder(name, (), {"__module__": module})


class _PlaceholderModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        placeholder = _placeholder(self.__name__, name)
        setattr(self, name, placeholder)
        return placeholder


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds placeholders, for one thread; all others get the real modules."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if threading.get_ident() != self._thread or not _is_left_out(name):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def _is_left_out(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in _LEFT_OUT)


@contextmanager
def lean_imports() -> Iterator[None]:
    """What this thread imports meanwhile gets placeholders; afterwards the real modules are back.

    Modules that are imported already stay as they are.
    """
    absent = [name for name in _OPTIONAL_PACKAGES if name not in sys.modules]
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    for name in absent:
        # Python's way to say that there is none.
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in absent:
            sys.modules.pop(name, None)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _PlaceholderModule):
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                vars(sys.modules.get(parent, module)).pop(child, None)


def run_lean(work: Callable[[], Value]) -> Value:
    """Do ``work``, which imports decoder layers, with lean imports, or else with all.

    ``work`` may run twice: the second time when the first failed for a part that is missing. In a
    process that has imported such parts already there is nothing to win: it is only done.
    """
    if any(name in sys.modules for name in _LEFT_OUT):
        return work()
    before = set(sys.modules)
    try:
        with lean_imports():
            return work()
    except _MISSING_PART:
        _log.warning("lean imports failed; importing all of transformers", exc_info=True)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "transformers":
            del sys.modules[name]
    return work()
