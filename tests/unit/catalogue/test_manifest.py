"""Manifests: what peers accept, what a revision depends on, who signed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.protocol.errors import ProtocolError, UsageError
from swarm.protocol.identity import Identity
from swarm.protocol.manifest import (
    ITEM_BYTES,
    ManifestError,
    Part,
    Tensor,
    chunk_bytes_for,
    make_manifest,
    parse_manifest,
    revision_of,
    sign_manifest,
)

MIB = 1024 * 1024
CONFIG = bytes(range(32))


def part(block: int, size_bytes: int = 3 * MIB // 2, digest: int = 1) -> Part:
    chunks = tuple(bytes([digest, index]) * 16 for index in range(-(-size_bytes // MIB)))
    tensor = Tensor(f"model.layers.{block}.up.weight", "int8", (size_bytes,))
    return Part(f"block-{block:05d}.safetensors", size_bytes, chunks, (tensor,), block, block + 1)


FILE = Part("config.json", 12, (bytes(32),))
ENDS = Part("ends.safetensors", 8, (bytes(32),), (Tensor("embed", "float32", (2,)),))
FACTS: dict[str, Any] = {
    "kind": "model",
    "name": "tiny",
    "config_digest": CONFIG,
    "number_of_blocks": 2,
    "hidden_size": 8,
    "chunk_bytes": MIB,
}
MANIFEST = make_manifest(**FACTS, parts=[FILE, ENDS, part(0), part(1)], licence="MIT")


def test_what_it_tells() -> None:
    again = parse_manifest(MANIFEST.content, MANIFEST.digest)
    assert again == MANIFEST
    assert again.total_bytes == 12 + 8 + 3 * MIB
    assert again.number_of_chunks == 6
    assert [again.locate(chunk) for chunk in range(6)] == [
        (0, 0, 12),
        (1, 0, 8),
        (2, 0, MIB),
        (2, MIB, MIB // 2),
        (3, 0, MIB),
        (3, MIB, MIB // 2),
    ]
    with pytest.raises(IndexError):
        again.locate(6)
    assert again.files() == (FILE,)
    assert again.end_parts() == (ENDS,)
    assert again.parts_of_blocks(1, 2) == (part(1),)
    assert again.chunks_of(again.parts_of_blocks(0, 1)) == {2, 3}
    assert again.chunk_digest(5) == part(1).chunks[1]


def test_the_revision_is_of_the_weights() -> None:
    def revision(**changes: Any) -> bytes:
        return make_manifest(
            **{**FACTS, "parts": [FILE, ENDS, part(0), part(1)], **changes}
        ).revision

    assert revision() == MANIFEST.revision
    assert revision(name="other", licence="x", parts=[ENDS, part(1), part(0)]) == MANIFEST.revision
    assert revision(config_digest=bytes(32)) != MANIFEST.revision
    assert revision(parts=[ENDS, part(0), part(1, digest=2)]) != MANIFEST.revision
    assert revision(parts=[part(0), part(1)]) != MANIFEST.revision
    renamed = replace(part(0), name="elsewhere.safetensors")
    assert revision_of(CONFIG, MIB, [ENDS, renamed, part(1)]) == MANIFEST.revision


def test_signatures() -> None:
    identity = Identity.generate()
    signature = sign_manifest(identity, MANIFEST)
    signature.check(MANIFEST.digest)
    with pytest.raises(ProtocolError):
        signature.check(bytes(32))
    with pytest.raises(ProtocolError):
        replace(signature, publisher=Identity.generate().peer_id).check(MANIFEST.digest)


def test_chunk_sizes() -> None:
    assert chunk_bytes_for(0) == chunk_bytes_for(MIB << 16) == MIB
    assert chunk_bytes_for((MIB << 16) + 1) == 2 * MIB
    assert chunk_bytes_for(MIB << 30) == 4 * MIB


BAD_PARTS = [
    replace(FILE, name="../config.json"),
    replace(FILE, name="manifest.json"),
    replace(FILE, name=".hidden"),
    replace(FILE, size_bytes=MIB + 1),
    replace(FILE, chunks=()),
    replace(part(0), size_bytes=MIB),
    replace(part(0), end_block=3),
    replace(part(0), first_block=1, end_block=1),
    replace(part(0), chunks=part(0).chunks[:1]),
    replace(ENDS, tensors=(Tensor("embed", "complex64", (2,)),))
    if "complex64" in ITEM_BYTES
    else part(5),
    replace(ENDS, tensors=(Tensor("a\nb", "float32", (2,)),)),
    replace(ENDS, tensors=(Tensor("e", "float32", (1,)), Tensor("e", "float32", (1,)))),
]


@pytest.mark.parametrize("bad", BAD_PARTS)
def test_parts_that_nobody_accepts(bad: Part) -> None:
    with pytest.raises(UsageError):
        make_manifest(**FACTS, parts=[bad])


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"kind": "virus"},
        {"name": ""},
        {"name": 7},
        {"name": "a\x1b[31m"},
        {"chunk_bytes": MIB + 1},
        {"chunk_bytes": 8 * MIB},
        {"chunk_bytes": 1.0},
        {"number_of_blocks": -1},
        {"number_of_blocks": True},
        {"config": "zz"},
        {"base": "00"},
        {"parts": {}},
        {"parts": [7]},
        {"attributes": {"key": 1}},
        {"attributes": {str(n): "" for n in range(33)}},
        {"licence": "x" * 129},
    ],
)
def test_fields_that_nobody_accepts(changes: dict[str, Any]) -> None:
    content = json.dumps(json.loads(MANIFEST.content) | changes).encode()
    with pytest.raises(ManifestError):
        parse_manifest(content)


def test_another_manifest_than_asked_for() -> None:
    with pytest.raises(ManifestError, match="asked for"):
        parse_manifest(MANIFEST.content, bytes(32))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read(data: st.DataObject) -> None:
    content = bytearray(MANIFEST.content)
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(content) - 1))
        content[index] = data.draw(st.integers(0, 255))
    try:
        parse_manifest(bytes(content))
    except ManifestError:
        return
