"""``docs/protocol.md`` and the code say the same."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

import pytest

from swarm.protocol import ledger_objects, messages, records, version
from swarm.protocol.errors import ERROR_TEXTS, ErrorCode

TEXT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")


def wire_type(spec: messages.Spec) -> str:
    match spec:
        case messages.Uint(maximum):
            return f"uint, 0 to {maximum}"
        case messages.Real(least, most):
            return f"real, {least:g} to {most:g}"
        case messages.Bytes(minimum, maximum):
            return f"bytes, {minimum}" if minimum == maximum else f"bytes, {minimum} to {maximum}"
        case messages.Text(maximum_bytes):
            return f"text, up to {maximum_bytes} bytes"
        case messages.Array(item, maximum_length):
            return f"array, up to {maximum_length} of ({wire_type(item)})"
        case messages.TensorField():
            return "tensor"
        case messages.BlobField(maximum_bytes):
            return f"blob, 1 to {maximum_bytes} bytes"


def table(kind: type[Any]) -> Iterator[str]:
    """The rows that describe a message or record."""
    for declared in fields(kind):
        wire = declared.metadata["wire"]
        match declared.default:
            case default if default is MISSING:
                default_text = "required"
            case "" | b"" | ():
                default_text = "empty"
            case float(default):
                default_text = f"{default:g}"
            case default:
                default_text = str(int(default))
        yield f"| {wire.number} | {declared.name} | {wire_type(wire.spec)} | {default_text} |"


def numbered_rows(section: str) -> list[str]:
    return [line for line in section.splitlines() if re.match(r"\| \d+ \|", line)]


@pytest.mark.parametrize("kind", messages.MESSAGE_TYPES, ids=lambda kind: kind.__name__)
def test_messages(kind: type[messages.Message]) -> None:
    assert f"### {kind.TAG} {kind.__name__}\n" in TEXT
    section = TEXT.split(f"### {kind.TAG} {kind.__name__}\n")[1].split("\n#")[0]
    assert numbered_rows(section) == list(table(kind))


@pytest.mark.parametrize("kind", records.RECORD_TYPES, ids=lambda kind: kind.__name__)
def test_records(kind: type[Any]) -> None:
    section = TEXT.split(f"### {kind.__name__}, kind")[1].split("\n#")[0]
    assert numbered_rows(section) == list(table(kind))


def test_error_codes() -> None:
    for code in ErrorCode:
        assert f"| {int(code)} | {code.name} | {ERROR_TEXTS[code]} |" in TEXT


def test_names() -> None:
    assert f"`{version.STREAM_PROTOCOL}`" in TEXT
    assert f"`{records.model_index_key()}`" in TEXT


@pytest.mark.parametrize("kind", ledger_objects.OBJECT_TYPES, ids=lambda kind: kind.__name__)
def test_signed_objects(kind: type[ledger_objects.SignedObject]) -> None:
    section = TEXT.split(f"### {kind.NAME}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| (\w+) \| (?!type)", section, re.MULTILINE)
    assert rows == [declared.name for declared in fields(cast(Any, kind))]
