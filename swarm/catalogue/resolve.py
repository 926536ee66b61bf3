"""Find a model's checkpoint directory from a path or a name."""

from __future__ import annotations

import os
from pathlib import Path

from swarm.protocol.errors import CheckpointError

_WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"]


def models_directory() -> Path:
    """Where the project keeps its own models: ``$XDG_DATA_HOME/sovereign-swarm/models``."""
    data_home = os.environ.get("XDG_DATA_HOME")
    base = Path(data_home) if data_home else Path.home() / ".local" / "share"
    return base / "sovereign-swarm" / "models"


def resolve_checkpoint(name_or_path: str | Path, *, allow_download: bool = True) -> Path:
    """The directory of a checkpoint.

    Looks, in this order, at: an existing directory; ``models_directory()/NAME``; a snapshot in the
    Hugging Face cache; the hub (not with ``allow_download=False`` or ``HF_HUB_OFFLINE=1``; only
    safetensors, JSON and tokenizer files). Raises CheckpointError, which says where it looked.
    """
    name = str(name_or_path)
    looked: list[str] = []
    if name:
        for candidate in (Path(name).expanduser(), models_directory() / name):
            if candidate.is_dir():
                return candidate
            looked.append(f"{candidate} (no such directory)")
        if not _is_path(name):
            snapshot = _hub_snapshot(name, allow_download, looked)
            if snapshot is not None:
                return snapshot
    raise CheckpointError(
        f"no model {name!r} found. Looked at: "
        + "; ".join(looked)
        + ". Give the path of a checkpoint directory, or the name of a model on the hub."
    )


def local_checkpoint(name_or_path: str) -> Path | None:
    """A model's directory that is on this disk already; None for a name that must be fetched.

    Raises CheckpointError for a path that does not exist: no peer has it under such a name.
    """
    try:
        return resolve_checkpoint(name_or_path, allow_download=False)
    except CheckpointError:
        if _is_path(name_or_path):
            raise
        return None


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~"))


def _hub_snapshot(name: str, allow_download: bool, looked: list[str]) -> Path | None:
    # Imported here: it costs a second that a local path does not need.
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    offline = constants.HF_HUB_OFFLINE or not allow_download
    for local_only in (True,) if offline else (True, False):
        place = f"the Hugging Face cache {constants.HF_HUB_CACHE}" if local_only else "the hub"
        try:
            snapshot = Path(
                huggingface_hub.snapshot_download(
                    name, local_files_only=local_only, allow_patterns=_WANTED_FILES
                )
            )
        except HFValidationError:
            looked.append("the hub (no valid model name)")
            return None
        except Exception as error:  # the hub's client lets errors of several libraries through
            looked.append(f"{place} ({type(error).__name__})")
            continue
        if (snapshot / "config.json").exists() and any(snapshot.glob("*.safetensors")):
            return snapshot
        looked.append(f"{place} (a snapshot without weights: {snapshot})")
    return None
