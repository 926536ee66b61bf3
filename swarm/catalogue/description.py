"""From a directory on disk to a manifest: what is published; how plain directories send chunks.

Models are checkpoint directories; adapters are PEFT's (``adapter_config.json``,
``adapter_model.safetensors``). Their tensors are grouped by block in the same way.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from swarm.catalogue.checkpoint import Checkpoint, TensorInfo
from swarm.catalogue.hashed_parts import HashedParts, hashed_parts, read_range
from swarm.catalogue.holdings import PlainDirectory
from swarm.catalogue.safetensors_file import read_header, read_json
from swarm.ledger.calibrated import FILE_NAME as AUDIT_LIMITS
from swarm.protocol.errors import CheckpointError
from swarm.protocol.manifest import Manifest, ManifestSignature, Part, make_manifest

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    AUDIT_LIMITS,
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, "README.md", "LICENSE*")
LARGEST_FILE_BYTES = 256 * 1024 * 1024
PRICE_CONTEXT_TOKENS = 2048
"""At which attention enters the price of a block."""
_ADAPTER_BLOCK = re.compile(r"\.layers\.(\d{1,4})\.")


def describe_model(
    checkpoint: Checkpoint,
    *,
    name: str = "",
    licence: str = "",
    attributes: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest of a checkpoint directory; reads and hashes all of it.

    A directory that was fetched keeps the manifest that it came with. Raises CheckpointError for
    unreadable files, UsageError for what no peer accepts.
    """
    if checkpoint.manifest is not None:
        return checkpoint.manifest
    hashed = checkpoint.parts
    stated = {"mflop_per_block_token": str(_mflop_per_block_token(checkpoint))}
    return make_manifest(
        kind="model",
        name=name or checkpoint.name,
        licence=licence,
        config_digest=hashed.config_digest,
        number_of_blocks=checkpoint.number_of_blocks,
        hidden_size=checkpoint.hidden_size,
        chunk_bytes=hashed.chunk_bytes,
        parts=[*_file_parts(checkpoint.path, FILES, hashed.chunk_bytes), *hashed.parts],
        attributes=stated | dict(attributes or {}),
    )


def describe_adapter(
    directory: Path,
    *,
    name: str,
    base_revision: bytes,
    licence: str = "",
    attributes: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest of a PEFT adapter for a model's revision. Raises as ``describe_model``."""
    hashed = _adapter_parts(directory)
    return make_manifest(
        kind="adapter",
        name=name,
        licence=licence,
        base_revision=base_revision,
        config_digest=hashed.config_digest,
        number_of_blocks=max((part.end_block for part in hashed.parts), default=0),
        hidden_size=0,
        chunk_bytes=hashed.chunk_bytes,
        parts=[*_file_parts(directory, ADAPTER_FILES, hashed.chunk_bytes), *hashed.parts],
        attributes=attributes,
    )


def model_holding(
    checkpoint: Checkpoint, manifest: Manifest, signatures: Sequence[ManifestSignature] = ()
) -> PlainDirectory:
    """A plain checkpoint directory, ready to send the chunks of its manifest."""
    return PlainDirectory(
        checkpoint.path, manifest, tuple(signatures), checkpoint.tensors.__getitem__
    )


def adapter_holding(
    directory: Path, manifest: Manifest, signatures: Sequence[ManifestSignature] = ()
) -> PlainDirectory:
    """A plain adapter directory, ready to send the chunks of its manifest."""
    tensors = read_header(directory / ADAPTER_WEIGHTS)
    return PlainDirectory(directory, manifest, tuple(signatures), tensors.__getitem__)


def is_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_CONFIG).exists()


def _adapter_parts(directory: Path) -> HashedParts:
    config: Any = read_json(directory / ADAPTER_CONFIG, 1024 * 1024)
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} is no JSON object")
    tensors: Mapping[str, TensorInfo] = read_header(directory / ADAPTER_WEIGHTS)
    return hashed_parts(directory, config, tensors, adapter_block)


def adapter_block(name: str) -> int | None:
    """The block that an adapter's tensor belongs to; None for those of no block."""
    match = _ADAPTER_BLOCK.search(name)
    return int(match[1]) if match else None


def _file_parts(directory: Path, patterns: Sequence[str], chunk_bytes: int) -> list[Part]:
    parts = []
    for file in sorted(directory.iterdir()):
        if not file.is_file() or not any(fnmatch.fnmatch(file.name, item) for item in patterns):
            continue
        size_bytes = file.stat().st_size
        if size_bytes > LARGEST_FILE_BYTES:
            raise CheckpointError(f"{file} is larger than {LARGEST_FILE_BYTES} bytes")
        chunks = [
            hashlib.sha256(read_range(file, start, min(chunk_bytes, size_bytes - start))).digest()
            for start in range(0, size_bytes, chunk_bytes)
        ]
        if chunks:
            parts.append(Part(file.name, size_bytes, tuple(chunks)))
    return parts


def _mflop_per_block_token(checkpoint: Checkpoint) -> int:
    """What one token costs in one block: 2 per weight that is used, and attention."""
    config = checkpoint.text_config
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    used = config.get("num_experts_per_tok") or 0
    weights = 0.0
    for name, info in checkpoint.block_tensors(0).items():
        share = used / experts if experts and used and ".experts." in name else 1.0
        weights += prod(info.shape) * share
    attention = 4 * PRICE_CONTEXT_TOKENS * checkpoint.hidden_size
    return max(1, round((2 * weights + attention) / 1e6))
