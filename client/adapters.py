"""Finds the adapter that a user asks for, and checks that it is for the model."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from swarm.catalogue.adapter import AdapterFiles
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.export import export_revision
from swarm.catalogue.library import Library
from swarm.catalogue.prompt_adapter import AnyAdapter, check_fits_model, open_any_adapter
from swarm.catalogue.resolve import models_directory
from swarm.catalogue.store import StoredRevision
from swarm.client.adapter_choice import Choice, OfferedAdapter, choose_adapter
from swarm.client.language import identify_language, known_languages
from swarm.client.prefixed_chain import PromptPrefix
from swarm.client.remote_blocks import SessionAdapter
from swarm.protocol.errors import AdapterError, NetworkError
from swarm.protocol.manifest import Manifest

log = logging.getLogger(__name__)

AUTO = "auto"
ADAPTER_ID = "adapter_id"
"""Attribute of a manifest: what sessions will name, in hexadecimal."""
LANGUAGES = "languages"
DOMAINS = "domains"
DATA = "data"
AUTHOR = "author"
METHOD = "method"
MOST_OFFERED = 64
"""Manifests that are looked at for one choice."""


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """An adapter for the model, read and checked; None of it: the bare model."""

    files: AnyAdapter | None
    name: str = ""
    reason: str = ""
    """Why it was picked, when it was not named."""

    @property
    def source(self) -> SessionAdapter | None:
        """For sessions: what nodes are brought, or what goes ahead of prompts."""
        if self.files is None or isinstance(self.files, AdapterFiles):
            return self.files
        return PromptPrefix(self.files.embeddings())


def open_adapter(directory: Path, checkpoint: Checkpoint) -> AnyAdapter:
    """An adapter in a directory, read whole and checked. Raises AdapterError that says why not."""
    files = open_any_adapter(directory)
    check_fits_model(files, checkpoint)
    return files


async def find_adapter(
    name_or_path: str, checkpoint: Checkpoint, library: Library, *, prompt: str = ""
) -> FoundAdapter:
    """What ``--adapter`` means. Raises AdapterError, or NetworkError when nobody sends it.

    A folder wins over a name in the catalogue; ``auto`` picks by ``prompt``.
    """
    directory = await asyncio.to_thread(_directory, name_or_path)
    if directory is not None:
        files = await asyncio.to_thread(open_adapter, directory, checkpoint)
        return FoundAdapter(files, directory.name)
    if name_or_path != AUTO:
        return FoundAdapter(await fetch_adapter(name_or_path, checkpoint, library), name_or_path)
    choice = await pick(prompt, checkpoint, library)
    if choice.adapter is None:
        return FoundAdapter(None, "", choice.reason)
    files = await fetch_adapter(choice.adapter.reference, checkpoint, library)
    return FoundAdapter(files, choice.adapter.name, choice.reason)


def _directory(name_or_path: str) -> Path | None:
    directory = Path(name_or_path).expanduser().resolve()
    return directory if directory.is_dir() else None


async def fetch_adapter(name: str, checkpoint: Checkpoint, library: Library) -> AnyAdapter:
    """An adapter of the catalogue, on this disk. Raises AdapterError and NetworkError."""
    stored = await library.locate(name, "adapter")
    if stored is None:
        raise AdapterError(
            f"no adapter {name!r}: neither a folder nor in the catalogue; "
            "swarm adapters list shows what there is"
        )
    if stored.manifest.base_revision != checkpoint.revision:
        raise AdapterError(
            f"{name} is for another model, or another revision of it: "
            f"{stored.manifest.base_revision.hex()[:12]} and not {checkpoint.revision.hex()[:12]}"
        )
    files = await fetch_files(stored, library)
    check_fits_model(files, checkpoint)
    return files


async def fetch_files(stored: StoredRevision, library: Library) -> AnyAdapter:
    """All of an adapter, checked, as a folder that PEFT loads. Raises AdapterError."""
    folder = models_directory().parent / "adapters" / stored.manifest.digest.hex()[:32]
    await library.fetch(stored, stored.manifest.parts)

    def export() -> AnyAdapter:
        export_revision(stored, stored.manifest.parts, folder)
        files = open_any_adapter(folder)
        check_described(files, stored.manifest)
        manifest = stored.manifest
        return replace(files, catalogue_name=reference_to(manifest))

    return await asyncio.to_thread(export)


def check_described(files: AnyAdapter, manifest: Manifest) -> None:
    """Raises AdapterError when the files are not what the manifest's author says of them."""
    stated = manifest.attributes.get(ADAPTER_ID, "")
    if stated and stated != files.adapter_id.hex():
        raise AdapterError(
            f"{manifest.name}: the manifest is of another adapter "
            f"({stated[:12]} and not {files.adapter_id.hex()[:12]})"
        )
    if files.model_revision not in (b"", manifest.base_revision):
        raise AdapterError(f"{manifest.name}: manifest and file name different models")


def method_of(files: AnyAdapter) -> str:
    """In words: what kind of adapter, and how large."""
    if not isinstance(files, AdapterFiles):
        return f"prompt, {files.virtual_tokens} tokens"
    return f"{'DoRA' if files.config.use_dora else 'LoRA'}, rank {files.index.rank}"


# --- what is offered -----------------------------------------------------------------------------
def offer_of(manifest: Manifest, holders: int) -> OfferedAdapter:
    """An adapter as its manifest describes it."""
    return OfferedAdapter(
        manifest.name,
        reference_to(manifest),
        words_of(manifest, LANGUAGES),
        words_of(manifest, DOMAINS),
        holders,
    )


def reference_to(manifest: Manifest) -> str:
    """What names this revision and no other in the catalogue."""
    return f"{manifest.name}@{manifest.revision.hex()}"


def adapter_id_of(manifest: Manifest) -> bytes:
    """What sessions name, as the author says; empty when he does not, or not properly."""
    try:
        return bytes.fromhex(manifest.attributes.get(ADAPTER_ID, ""))
    except ValueError:
        return b""


def words_of(manifest: Manifest, attribute: str) -> tuple[str, ...]:
    """An attribute that lists words, separated by commas."""
    text = manifest.attributes.get(attribute, "")
    return tuple(word for part in text.split(",") if (word := part.strip()))


async def listed_adapters(base_revision: bytes, library: Library) -> list[Manifest]:
    """The adapters for a model in the catalogue, the best known first; those whose manifest nobody
    sends are left out. Raises NetworkError."""
    listed = [
        item
        for item in await library.catalogue.all()
        if item.kind == "adapter" and item.base_revision == base_revision
    ]
    manifests = []
    for item in sorted(listed, key=lambda item: -item.listers)[:MOST_OFFERED]:
        known = library.store.open(item.digest)
        try:
            manifest = known.manifest if known else (await library.catalogue.manifest(item))[0]
        except NetworkError as error:
            log.info("the adapter %s is listed only: %s", item.name, error)
            continue
        manifests.append(manifest)
    return manifests


async def offered_adapters(base_revision: bytes, library: Library) -> list[OfferedAdapter]:
    """What ``--adapter auto`` chooses from. Raises NetworkError."""
    return [
        offer_of(manifest, len(await library.catalogue.sources(manifest.digest)))
        for manifest in await listed_adapters(base_revision, library)
    ]


async def pick(prompt: str, checkpoint: Checkpoint, library: Library) -> Choice:
    """``--adapter auto``: by language and subject of the prompt."""
    offered = await offered_adapters(checkpoint.revision, library)
    language = await asyncio.to_thread(identify_language, prompt)
    return choose_adapter(prompt, offered, language, known_languages())
