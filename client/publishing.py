"""What ``swarm models publish`` does: describe a directory, sign it, serve it to others."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.description import (
    adapter_holding,
    describe_adapter,
    describe_model,
    is_adapter,
    model_holding,
)
from swarm.catalogue.holdings import PlainDirectory
from swarm.catalogue.resolve import models_directory, resolve_checkpoint
from swarm.catalogue.store import Store, StoredRevision
from swarm.client.config import ClientSettings
from swarm.client.weights import client_library
from swarm.clock_offset import ClockOffsets, CorrectedClock
from swarm.protocol.errors import UsageError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.manifest import Manifest, ManifestSignature, sign_manifest
from swarm.virtual_time import LoopClock

LISTEN = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1", "/ip6/::/tcp/0")
LOOK_PERIOD_S = 2.0
ANNOUNCE_PERIOD_S = 15.0


@dataclass(frozen=True, slots=True)
class Described:
    """A directory and the manifest made of it."""

    directory: Path
    manifest: Manifest

    def holding(self, signatures: Sequence[ManifestSignature]) -> PlainDirectory:
        """Ready to send chunks."""
        if self.manifest.kind == "adapter":
            return adapter_holding(self.directory, self.manifest, signatures)
        return model_holding(Checkpoint.open(self.directory), self.manifest, signatures)


def describe_directory(
    directory: Path,
    *,
    name: str = "",
    licence: str = "",
    base: str | None = None,
    attributes: Mapping[str, str] | None = None,
) -> Described:
    """The manifest of a checkpoint or an adapter; reads and hashes all of it.

    ``base`` is the model of an adapter: a directory, a name, or a revision in hexadecimal. Raises
    UsageErrors.
    """
    directory = directory.resolve()
    if not is_adapter(directory):
        checkpoint = Checkpoint.open(directory)
        manifest = describe_model(checkpoint, name=name, licence=licence, attributes=attributes)
        return Described(directory, manifest)
    if base is None:
        raise UsageError("an adapter needs --base: the model that it is for")
    manifest = describe_adapter(
        directory,
        name=name or directory.name,
        base_revision=_revision(base),
        licence=licence,
        attributes=attributes,
    )
    return Described(directory, manifest)


def held_directory(directory: Path) -> PlainDirectory:
    """A directory with the manifest that is known for it on this disk, or else a fresh one."""
    described = describe_directory(directory)
    store = Store(models_directory().parent / "store")
    for known in store.revisions():
        if known.manifest.revision == described.manifest.revision and known.signatures:
            holding = Described(described.directory, known.manifest).holding(known.signatures)
            holding.check_files()
            return holding
    key = models_directory().parent / "publisher.key"
    identity = Identity.load_or_create(key)
    return described.holding((sign_manifest(identity, described.manifest),))


def sign_and_keep(described: Described, identity: Identity) -> StoredRevision:
    """Sign a manifest and keep both in this computer's store, where nodes and seeds find it."""
    store = Store(models_directory().parent / "store")
    return store.create(described.manifest, (sign_manifest(identity, described.manifest),))


async def serve_until_held(
    settings: ClientSettings,
    described: Described,
    signatures: Sequence[ManifestSignature],
    copies: int,
    on_event: Callable[[str], None],
) -> None:
    """Be a peer that sends this, until so many others hold all of it. Raises NetworkError."""
    from swarm.hivemind_network import HivemindNetwork, NetworkSettings

    with tempfile.TemporaryDirectory(prefix="swarm-publisher-") as folder:
        key = Path(folder) / "identity.key"
        identity = Identity.load_or_create(key)
        network = await HivemindNetwork.create(
            key,
            NetworkSettings(
                listen_addresses=LISTEN,
                initial_peers=settings.peers,
                use_relays=True,
                start_timeout_s=settings.connect_timeout_s,
            ),
        )
        offsets = ClockOffsets(LoopClock())
        offsets.believe(network.clock_offset_s)
        library = client_library(network, CorrectedClock(LoopClock(), offsets), settings)
        addresses = tuple(await network.addresses())
        announcer = await library.serve(identity, lambda: addresses)
        holding = await asyncio.to_thread(described.holding, signatures)
        library.hold(holding)
        announcing = asyncio.ensure_future(announcer.run())
        try:
            await announcer.announced()
            on_event(f"serving it until {copies} others hold all of it; Ctrl-C ends this")
            held: set[PeerId] = set()
            while len(held) < copies:
                await asyncio.sleep(LOOK_PERIOD_S)
                complete = await library.catalogue.complete_holders(described.manifest)
                for peer in complete - held - {identity.peer_id}:
                    on_event(f"{peer} holds all of it")
                held |= complete - {identity.peer_id}
        finally:
            announcing.cancel()
            await asyncio.gather(announcing, return_exceptions=True)
            await network.close()


def _revision(base: str) -> bytes:
    if len(base) == 64:
        try:
            return bytes.fromhex(base)
        except ValueError:
            pass
    return Checkpoint.open(resolve_checkpoint(base, allow_download=False)).revision
