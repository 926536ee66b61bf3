"""What a move to other blocks does to the parts of a running node, for ``rebalancing``.

The new blocks are loaded beside the old ones when the memory that the owner gave holds both;
otherwise the old ones go first, and the node serves nothing while it loads. What was served before
is kept as long as it does not stand in the way, so that a way back costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Generic, TypeVar

from swarm.block_vectors import BlockVectors, PlacedNode, Vector, block_vectors, placed_nodes
from swarm.membership import Announcer
from swarm.node.config import BlockSpan
from swarm.node.engine.api import Engine
from swarm.node.service import NodeService
from swarm.nodes_view import NodesView
from swarm.placement import DEFAULTS, decision_interval_s, loading_s
from swarm.ports import Clock
from swarm.protocol.errors import NetworkError, SwarmError

log = logging.getLogger(__name__)

ANNOUNCE_TIMEOUT_S = 10.0
USUAL_LOAD_S = 1.0
"""For one block from the disk, as long as none was loaded for a move."""
LOOK_PERIOD_S = 8.0
"""How often to see in what the view holds whether blocks are about to be lost."""

E = TypeVar("E", bound=Engine)
Span = tuple[int, int]


class SeenNodes:
    """``rebalancing.Others`` over what the node has read of the directory."""

    def __init__(self, view: NodesView, announcer: Announcer, clock: Clock) -> None:
        self._view = view
        self._announcer = announcer
        self._clock = clock

    async def read(self) -> BlockVectors:
        """Read the directory now, without ourselves. Raises NetworkError."""
        await self._view.read()
        return self._vectors(with_own=False)

    async def emergency(self) -> BlockVectors:
        """Wait until nodes should decide more often than usual."""
        while True:
            vectors = self._vectors(with_own=True)
            if decision_interval_s(vectors) < DEFAULTS.interval_s:
                return vectors
            await self._clock.sleep(LOOK_PERIOD_S)

    def _vectors(self, *, with_own: bool) -> BlockVectors:
        own = self._announcer.record
        records = [record for record in self._view.records() if record.peer_id != own.peer_id]
        nodes = placed_nodes(
            [*records, own] if with_own else records, now_unix_s=self._clock.unix_s()
        )
        return block_vectors(nodes, own.number_of_blocks)


class Relocation(Generic[E]):
    """``rebalancing.Mover``: owns the engines of a node, of which one is served."""

    def __init__(
        self,
        engine: E,
        service: NodeService,
        announcer: Announcer,
        clock: Clock,
        *,
        load: Callable[[BlockSpan], Awaitable[E]],
        fits: Callable[[list[BlockSpan]], bool],
        drain_timeout_s: float,
        on_drain: Callable[[], None],
        on_served: Callable[[E], None],
    ) -> None:
        """``fits`` tells whether spans may be in memory at the same time.

        ``on_drain`` is called when sessions are given away, ``on_served`` when that is over.
        """
        self.engine = engine
        self._service = service
        self._announcer = announcer
        self._clock = clock
        self._load = load
        self._seconds_per_block = USUAL_LOAD_S
        self._fits = fits
        self._drain_timeout_s = drain_timeout_s
        self._on_drain = on_drain
        self._on_served = on_served
        self._size = len(_span_of(engine))
        self._spare: E | None = None
        """Loaded and not served: what comes next, or what was before."""

    @property
    def node(self) -> PlacedNode:
        return PlacedNode.from_record(self._announcer.record, now_unix_s=self._clock.unix_s())

    @property
    def size(self) -> int:
        return self._size

    def load_s(self) -> Vector:
        engines = [self.engine] if self._spare is None else [self.engine, self._spare]
        at_hand = {
            block for engine in engines for block in range(engine.first_block, engine.end_block)
        }
        total = self._announcer.record.number_of_blocks
        return loading_s(total, at_hand, self._seconds_per_block)

    async def announce(self, node: PlacedNode) -> None:
        """Raises NetworkError when the directory does not take it in time."""
        target = node.target or (0, 0)
        self._announcer.update(
            replace(
                self._announcer.record,
                first_block=node.first_block,
                end_block=node.end_block,
                state=node.state,
                target_first_block=target[0],
                target_end_block=target[1],
            )
        )
        try:
            async with asyncio.timeout(ANNOUNCE_TIMEOUT_S):
                await self._announcer.announced()
        except TimeoutError:
            raise NetworkError("no peer takes our announcement") from None

    async def load(self, span: Span) -> None:
        """Load the blocks beside those that are served, if there is memory for both."""
        wanted, served = BlockSpan(*span), _span_of(self.engine)
        if self._spare is not None and _span_of(self._spare) == wanted:
            return
        await self._close_spare()
        if self._fits([served, wanted]):
            self._spare = await self._loaded(wanted)

    async def give_back(self, span: Span) -> None:
        """The spare is kept: a move that was given up is often wanted again soon."""

    async def drain(self) -> None:
        """Hand all sessions over; those that stay too long end, and are healed elsewhere."""
        self._on_drain()
        self._service.stop_accepting(self._drain_timeout_s)
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await self._service.emptied()
        except TimeoutError:
            log.warning("%d sessions do not move and end here", self._service.sessions)
            await self._service.end_sessions()

    async def swap(self, span: Span) -> None:
        """Serve ``span`` from now on. Raises SwarmError; the old blocks are then served again.

        Raises RuntimeError when these are lost too: nothing can be served any more.
        """
        before = _span_of(self.engine)
        try:
            if self._spare is None:
                await self.engine.close()
                self._serve(await self._loaded(BlockSpan(*span)))
            else:
                self._spare, engine = self.engine, self._spare
                self._serve(engine)
        except SwarmError:
            try:
                self._serve(await self._loaded(before))
            except SwarmError as error:
                raise RuntimeError(f"blocks {before} cannot be loaded again") from error
            raise
        log.info("serves blocks %s instead of %s", _span_of(self.engine), before)

    async def close(self) -> None:
        """Free the device."""
        await self._close_spare()
        await self.engine.close()

    def _serve(self, engine: E) -> None:
        self.engine = engine
        self._service.serve(engine)
        self._on_served(engine)

    async def _loaded(self, span: BlockSpan) -> E:
        started_s = time.monotonic()
        engine = await self._load(span)
        self._seconds_per_block = (time.monotonic() - started_s) / len(span)
        return engine

    async def _close_spare(self) -> None:
        if self._spare is not None:
            spare, self._spare = self._spare, None
            await spare.close()


def _span_of(engine: Engine) -> BlockSpan:
    return BlockSpan(engine.first_block, engine.end_block)
