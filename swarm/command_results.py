"""How every command prints what it found: words for people, one JSON object for programs.

``--json`` means the same everywhere: nothing but one object on stdout (one a line where a command
goes on, as ``run`` does), an object that says so in its place after an error, and the same exit
code as without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def print_result(fields: Mapping[str, Any], *lines: str, as_json: bool) -> None:
    """``fields`` as one JSON object, or else ``lines``, each as one line for people."""
    if as_json:
        print(json.dumps(fields), flush=True)
        return
    for line in lines:
        print(line, flush=True)
