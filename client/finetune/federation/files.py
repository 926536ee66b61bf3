"""What a federation keeps on disk: terms, key, and the adapter after the last whole round.

Everything is written whole or not at all, the adapter before the state that names it, so that an
aggregator that is started again goes on with the round in which it was. Adapters are read as a
stranger's files: participants get them from an aggregator.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from swarm.catalogue.adapter import is_finite
from swarm.catalogue.checked_safetensors import SafetensorsFile
from swarm.client.finetune.federated import adapter_names
from swarm.client.finetune.federation.messages import MAX_ADAPTER_BYTES, StoredAdapter
from swarm.client.finetune.federation.terms import FederationTerms
from swarm.protocol.adapter_index import MODULE_NAME
from swarm.protocol.errors import AdapterError, ConfigError, ProtocolError, UsageError
from swarm.protocol.identity import Identity
from swarm.protocol.tensors import DType

TERMS, STATE, KEY = "federation.json", "state.json", "aggregator.key"
STATE_TENSOR_NAME = re.compile(
    rf"model\.layers\.\d{{1,4}}\.(?:{MODULE_NAME.pattern})"
    r"\.(?:lora_A\.weight|lora_B\.weight|lora_magnitude_vector)"
)
"""Names of a snapshot; the optimizer's stay with each participant."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class DoneRound:
    number: int
    participants: int
    examples: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a federation is; ``done`` has a line for each whole round."""

    adapter: StoredAdapter
    done: tuple[DoneRound, ...] = ()


class FederationFiles:
    """A folder of one aggregator."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def exists(self) -> bool:
        return (self._folder / STATE).exists()

    def identity(self) -> Identity:
        """The aggregator's key, made when it is missing. Raises ConfigError."""
        return Identity.load_or_create(self._folder / KEY)

    def create(self, terms: FederationTerms, beginning: Tensors) -> None:
        """Raises UsageError when the disk is full."""
        stored = self.write_adapter(beginning)
        write_whole(self._folder / TERMS, terms.to_json())
        self.write_progress(Progress(stored))

    def terms(self) -> FederationTerms:
        """Raises ConfigError."""
        try:
            return FederationTerms.from_json((self._folder / TERMS).read_bytes())
        except OSError as error:
            raise ConfigError(f"no federation in {self._folder}: {error.strerror}") from error
        except ProtocolError as error:
            raise ConfigError(f"{self._folder / TERMS} is damaged: {error.detail}") from error

    def progress(self) -> Progress:
        """Raises ConfigError."""
        path = self._folder / STATE
        try:
            value = json.loads(path.read_bytes())
            stored = StoredAdapter(value["sha256"], value["size_bytes"])
            return Progress(stored, tuple(DoneRound(*line) for line in value["done"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error

    def write_progress(self, progress: Progress, previous: StoredAdapter | None = None) -> None:
        """Adapters before ``previous``, which somebody may be reading, are removed.

        Raises UsageError.
        """
        done = [(one.number, one.participants, one.examples, one.attempts) for one in progress.done]
        stored = progress.adapter
        content = {"sha256": stored.sha256, "size_bytes": stored.size_bytes, "done": done}
        write_whole(self._folder / STATE, json.dumps(content, indent=2).encode())
        kept = {self.adapter_path(one) for one in (stored, previous) if one is not None}
        for old in self._folder.glob("adapter-*.safetensors"):
            if old not in kept:
                old.unlink()

    def adapter_path(self, stored: StoredAdapter) -> Path:
        return self._folder / f"adapter-{stored.sha256[:32]}.safetensors"

    def write_adapter(self, tensors: Tensors) -> StoredAdapter:
        """Raises UsageError."""
        flat = {name: tensors[name].reshape(-1).contiguous() for name in adapter_names(tensors)}
        content = save(flat)
        if len(content) > MAX_ADAPTER_BYTES:
            raise UsageError(f"the adapter has more than {MAX_ADAPTER_BYTES} bytes")
        stored = StoredAdapter(hashlib.sha256(content).hexdigest(), len(content))
        write_whole(self.adapter_path(stored), content)
        return stored

    def read_adapter(self, stored: StoredAdapter) -> dict[str, torch.Tensor]:
        """Raises UsageError when it is damaged."""
        return read_common_adapter(self.adapter_path(stored), stored)

    @contextmanager
    def only_process(self) -> Iterator[None]:
        """Two aggregators of one federation would tell participants different things."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._folder, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"cannot use {self._folder}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"a running aggregator uses {self._folder}") from error
            yield
        finally:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def read_common_adapter(path: Path, stored: StoredAdapter) -> dict[str, torch.Tensor]:
    """Flat float32 tensors by their names in a snapshot; hash and header are checked first.

    Raises AdapterError.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != stored.sha256:
        raise AdapterError(f"{path.name} is damaged: its hash is another one")
    file = SafetensorsFile.open(path, STATE_TENSOR_NAME)
    tensors = {}
    for name, tensor in file.tensors.items():
        if tensor.dtype is not DType.FLOAT32 or len(tensor.shape) != 1:
            raise AdapterError(f"{name}: a common adapter is flat and of float32")
        data = bytearray(file.read(tensor))
        if not is_finite(DType.FLOAT32, data):
            raise AdapterError(f"{name} has numbers that are none")
        tensors[name] = torch.frombuffer(data, dtype=torch.float32)
    if not tensors:
        raise AdapterError(f"{path.name} has no tensors")
    return tensors


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once, and on the disk before it returns. Raises UsageError."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
