"""Which adapter a challenge uses: one that its target announces, of a publisher who is believed.

Whoever chooses the adapter of an audit may choose one that magnifies rounding until honest nodes of
different precision disagree, and so have them accused. Therefore only adapters of publishers whom
the validator's settings or the charter name are used; where neither names any, none are.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection

from swarm.catalogue.adapter import AdapterFiles
from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.library import Library
from swarm.client.adapters import adapter_id_of, fetch_adapter, listed_adapters, reference_to
from swarm.protocol.errors import SwarmError
from swarm.routing import adapter_hint

log = logging.getLogger(__name__)

MOST_TRIED = 4


async def draw_adapter(
    announced: Collection[str],
    checkpoint: Checkpoint,
    library: Library,
    dice: random.Random,
    *,
    or_any: bool = False,
) -> AdapterFiles | None:
    """By lot one of those that are ``announced`` (``routing.adapter_hint``), on this disk.

    ``or_any``: another one if none of these is to be had. None when there is nothing to be had.
    """
    if library.believes_everybody:
        return None
    listed = await listed_adapters(checkpoint.revision, library)
    dice.shuffle(listed)
    wanted = [item for item in listed if adapter_hint(adapter_id_of(item)) in announced]
    others = [item for item in listed if item not in wanted] if or_any else []
    for manifest in (*wanted, *others)[:MOST_TRIED]:
        try:
            files = await fetch_adapter(reference_to(manifest), checkpoint, library)
        except SwarmError as error:
            log.info("the adapter %s cannot be used: %s", manifest.name, error)
            continue
        if isinstance(files, AdapterFiles):  # nodes see nothing of the other kind
            return files
    return None
