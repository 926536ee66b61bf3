"""The README shows the tree as it is."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("protocol", "swarm", "node", "client", "scripts")


def test_every_module_has_its_line_in_the_tree() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"```\nprotocol/.*?```", readme, re.DOTALL)
    shown = set(re.findall(r"\b[\w.]+\.(?:py|sh)\b", tree))
    there = {
        path.name
        for folder in FOLDERS
        for pattern in ("*.py", "*.sh")
        for path in (REPOSITORY / folder).rglob(pattern)
        if path.name != "__init__.py"
    }
    assert there - shown == set(), "modules without a line in the README's tree"
    assert shown - there == set(), "lines in the README's tree without a module"
