"""The life of one node, from the start of its network to its goodbye: wires its parts together.

``app`` lives it, again after each rest that the owner's limits ask for. One ``asyncio.TaskGroup``
owns everything that runs meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import random
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from swarm.clock_offset import ClockOffsets, CorrectedClock
from swarm.gate import Gate
from swarm.ledger.model_price import block_price
from swarm.ledger.node_books import LedgerStore
from swarm.membership import Announcer, coverage, read_nodes
from swarm.node.accounts import LedgerTerms, NodeLedger
from swarm.node.adapter_weights import CatalogueAdapters
from swarm.node.addresses import for_people, for_record, is_public
from swarm.node.advice import Adviser
from swarm.node.announced_work import AnnouncedWork
from swarm.node.board import Board
from swarm.node.config import BlockSpan, NodeSettings
from swarm.node.donor.bandwidth import CappedNetwork
from swarm.node.neighbours import Neighbours
from swarm.node.own_record import first_record, with_load
from swarm.node.owned_tasks import Left, announcing, guarded_by, unless_left
from swarm.node.reachability import follow_reachability
from swarm.node.rebalancing import Rebalancer
from swarm.node.relocation import Relocation, SeenNodes
from swarm.node.service import NodeService, ServiceLimits
from swarm.node.starting import (
    choose_blocks,
    fit_together,
    load_blocks,
    open_model,
    revocation_watch,
    start_network,
    trusted_publishers,
)
from swarm.node.surroundings import Surroundings
from swarm.node.tit_for_tat import Owed
from swarm.node.view import View
from swarm.node.weights import NodeWeights
from swarm.protocol.identity import Identity, public_key_from_peer_id
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.version import software_version
from swarm.threads import run_in_own_thread
from swarm.virtual_time import LoopClock

if TYPE_CHECKING:
    from swarm.hivemind_network import HivemindNetwork
    from swarm.node.engine.engine import SpanEngine
    from swarm.node.engine.hosting import OpenedModel
    from swarm.nodes_view import NodesView

log = logging.getLogger(__name__)

T = TypeVar("T")

ANNOUNCE_TIMEOUT_S = 10.0
HOSTING = "swarm.node.engine.hosting"
COVERAGE_PERIOD_S = 5.0


class NodeLife:
    """The life of one node, in the order in which it happens."""

    def __init__(
        self,
        settings: NodeSettings,
        view: View,
        identity: Identity,
        board: Board,
        leaving: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._view = view
        self._identity = identity
        self._board = board
        self._leaving = leaving
        self._weights: NodeWeights
        self._gate: Gate | None = None
        self._clock_offsets = ClockOffsets(LoopClock())
        self._clock = CorrectedClock(LoopClock(), self._clock_offsets)
        self._work = AnnouncedWork(board.metrics, settings.declared_watts)

    async def live(self) -> None:
        async with AsyncExitStack() as stack:
            network = await self._unless_left(self._start(stack))
            async with guarded_by(network) as group:
                weights = self._weights = self._node_weights(network)
                stack.callback(weights.close)
                if self._gate is not None:
                    watch = revocation_watch(
                        self._identity, network, self._clock, self._gate, self._settings
                    )
                    watching = group.create_task(watch.run())
                    stack.callback(watching.cancel)
                holding = group.create_task(
                    (await weights.serve(for_record(await network.addresses()))).run()
                )
                model = await self._unless_left(self._open(weights))
                checkpoint = model.checkpoint
                others = await self._others(network, model)
                replicas = coverage(others, checkpoint.number_of_blocks)
                span = choose_blocks(model, self._settings, others, now_unix_s=self._clock.unix_s())
                self._board.update(
                    state="loading",
                    model=checkpoint.name,
                    model_blocks=checkpoint.number_of_blocks,
                    first_block=span.first_block,
                    end_block=span.end_block,
                    coverage=tuple(replicas),
                )
                announcer = await self._announcer(network, model, span)
                async with announcing(announcer, group):
                    engine = await self._unless_left(self._load(model, span))
                    self._show_engine(model, engine)
                    stack.push_async_callback(engine.close)
                    around = self._surroundings(network, announcer)
                    owed = Owed(
                        self._settings.ledger_file, self._settings.client_ledger, self._clock
                    )
                    ledger = await self._ledger(stack, model, owed)
                    service = await self._serve(network, model, engine, around.view, ledger)
                    relocation = self._relocation(model, engine, service, announcer)
                    stack.push_async_callback(relocation.close)
                    stack.push_async_callback(service.close)
                    online = replace(announcer.record, state=NodeState.ONLINE)
                    announcer.update(with_load(online, engine))
                    await self._unless_left(_announced(announcer))
                    self._board.update(state="online", coverage=_with_own(replicas, span))
                    self._view.ready(self._board.snapshot())
                    looking = group.create_task(around.run())
                    refreshing = group.create_task(
                        self._refresh(around, relocation, announcer, Adviser(network, self._clock))
                    )
                    rebalancing = group.create_task(self._rebalance(around, relocation, announcer))
                    reaching = group.create_task(self._stay_reachable(network, announcer))
                    moving = group.create_task(service.leave_relays())
                    comparing = group.create_task(owed.run())
                    settling = group.create_task(self._settle(ledger))
                    await self._leaving.wait()
                    rebalancing.cancel()
                    await asyncio.wait((rebalancing,))
                    await self._drain(announcer, service)
                    settling.cancel()
                    comparing.cancel()
                    moving.cancel()
                    reaching.cancel()
                    refreshing.cancel()
                    looking.cancel()
                    holding.cancel()

    async def _unless_left(self, work: Awaitable[T]) -> T:
        return await unless_left(self._leaving, work)

    async def _start(self, stack: AsyncExitStack) -> HivemindNetwork:
        """The network, while torch is imported in a thread; both take seconds."""
        async with asyncio.TaskGroup() as group:
            files = self._settings.membership_files
            self._gate = files.require(self._identity.peer_id, self._clock)
            group.create_task(asyncio.to_thread(importlib.import_module, HOSTING))
            network = await start_network(self._settings, self._gate)
            stack.push_async_callback(network.close)
            self._clock_offsets.believe(network.clock_offset_s)
            addresses = for_people(await network.addresses(), network.peer_id)
            self._board.update(state="joining", peer_id=network.peer_id, addresses=addresses)
        return network

    def _capped(self, network: HivemindNetwork) -> CappedNetwork:
        """The network as the owner allows it."""
        guard = self._board.guard
        if guard is None:
            raise RuntimeError("a node has an owner")
        return CappedNetwork(network, guard.up, guard.down)

    def _node_weights(self, network: HivemindNetwork) -> NodeWeights:
        return NodeWeights(
            self._capped(network),
            self._identity,
            self._clock,
            self._settings,
            trusted=trusted_publishers(self._gate),
            may_use_hub=self._gate is None or self._gate.charter.hub,
            on_progress=lambda progress: self._board.update(fetching=progress),
        )

    async def _open(self, weights: NodeWeights) -> OpenedModel:
        """The checkpoint, wherever it is found; of one that is not here, the small files."""
        self._board.update(state="looking")
        path = await weights.find(self._settings.model)
        model = await asyncio.to_thread(open_model, self._settings, path)
        await weights.give(model.checkpoint)
        return model

    async def _others(self, network: HivemindNetwork, model: OpenedModel) -> list[NodeRecord]:
        """The other nodes of the model, in every state."""
        records = await read_nodes(network, model.checkpoint.revision, self._clock)
        return [record for record in records if record.peer_id != network.peer_id]

    async def _announcer(
        self, network: HivemindNetwork, model: OpenedModel, span: BlockSpan
    ) -> Announcer:
        record = first_record(
            self._settings, self._identity, model, span, await network.addresses(), self._gate
        )
        return Announcer(
            self._identity,
            network,
            self._clock,
            record,
            hidden_size=model.checkpoint.hidden_size,
            announce_period_s=self._settings.announce_period_s,
        )

    async def _load(self, model: OpenedModel, span: BlockSpan) -> SpanEngine:
        def progress(loaded: int, total: int) -> None:
            if self._leaving.is_set():
                raise Left
            self._board.update(loading_fraction=loaded / total)

        await self._weights.ensure(model.checkpoint, span)
        engine = await run_in_own_thread(
            partial(load_blocks, model, self._settings, span, progress)
        )
        # What was imported and loaded stays: the collector need not look at it between two tokens.
        gc.collect()
        gc.freeze()
        self._board.update(loading_fraction=None)
        return engine

    def _show_engine(self, model: OpenedModel, engine: SpanEngine) -> None:
        """Tell the owner what is served now."""
        description = {key: str(value) for key, value in engine.describe().items()}
        self._board.engine = engine
        self._work.computes_on(description["device"])
        self._board.update(
            first_block=engine.first_block,
            end_block=engine.end_block,
            engine=_in_words(description),
        )
        metrics = self._board.metrics
        metrics.describe_engine(
            {**description, "model": model.checkpoint.name, "software": software_version()}
        )
        metrics.watch_engine(engine)
        engine.observe_batches(
            lambda report: metrics.batch_computed(report.steps, report.compute_s)
        )

    def _relocation(
        self,
        model: OpenedModel,
        engine: SpanEngine,
        service: NodeService,
        announcer: Announcer,
    ) -> Relocation[SpanEngine]:
        def served(engine: SpanEngine) -> None:
            self._show_engine(model, engine)
            self._board.update(state="online")

        return Relocation(
            engine,
            service,
            announcer,
            self._clock,
            load=lambda span: self._load(model, span),
            fits=lambda spans: fit_together(model, self._settings, spans),
            drain_timeout_s=self._settings.drain_timeout_s,
            on_drain=lambda: self._board.update(state="moving"),
            on_served=served,
        )

    async def _rebalance(
        self, around: Surroundings, relocation: Relocation[SpanEngine], announcer: Announcer
    ) -> None:
        """Go where the swarm needs us more, unless the owner has chosen the blocks."""
        if self._settings.blocks is not None:
            return
        await around.view.ready()
        rebalancer = Rebalancer(
            SeenNodes(around.view, announcer, self._clock),
            relocation,
            self._clock,
            random.Random(),  # noqa: S311 (spreads decisions over time; no secret)
            observer=lambda outcome: log.info("blocks: %s", outcome),
        )
        await rebalancer.run()

    async def _ledger(
        self, stack: AsyncExitStack, model: OpenedModel, owed: Owed
    ) -> NodeLedger | None:
        """The node's books, closed after everything that writes into them."""
        settings = self._settings
        if not settings.books:
            return None
        store = await asyncio.to_thread(LedgerStore.open, settings.ledger_file)
        stack.push_async_callback(store.close)
        terms = LedgerTerms(
            model_revision=model.checkpoint.revision,
            mflop_per_block_token=await asyncio.to_thread(block_price, model.checkpoint),
            dtype_class=model.wire_dtype.name.lower(),
            operators=frozenset(map(bytes.fromhex, settings.operator_keys)),
            owner_keys=frozenset(
                {
                    self._identity.public_key_bytes,
                    *map(public_key_from_peer_id, settings.owner_keys),
                }
            ),
            anonymous_tokens_per_s=settings.anonymous_tokens_per_s,
        )
        return NodeLedger(self._identity, store, terms, self._clock, owed_to=owed)

    async def _settle(self, ledger: NodeLedger | None) -> None:
        """Present vouchers to the operator, where there is one."""
        settings = self._settings
        if ledger is None or not settings.operator_url:
            return
        # aiohttp takes a moment to import: only where there is an operator
        from swarm.node.settling import Settling, SettlingTerms

        terms = SettlingTerms(
            settings.operator_url,
            ledger.terms.operators,
            settings.payout,
            settings.certificate,
            settings.settle_interval_s,
        )
        await Settling(terms, self._identity, settings.ledger_file, ledger.store, self._clock).run()

    async def _serve(
        self,
        network: HivemindNetwork,
        model: OpenedModel,
        engine: SpanEngine,
        view: NodesView,
        ledger: NodeLedger | None,
    ) -> NodeService:
        settings = self._settings
        revision = model.checkpoint.revision
        service = NodeService(
            self._capped(network),
            engine,
            model_revision=revision,
            resolve=Neighbours(network, self._clock, revision, view).resolve,
            observer=self._board.metrics,
            clock=LoopClock(),  # peers are told what this computer's own clock says
            limits=ServiceLimits(
                sessions=settings.max_sessions,
                sessions_per_peer=settings.max_sessions_per_peer,
                session_idle_s=settings.session_idle_s,
                session_lifetime_s=settings.session_lifetime_s,
            ),
            gate=self._gate,
            adapter_catalogue=CatalogueAdapters(self._weights.library, revision),
            ledger=ledger,
        )
        self._board.metrics.watch_service(service)
        await service.start()
        return service

    async def _drain(self, announcer: Announcer, service: NodeService) -> None:
        """No new sessions; those that run are handed over or end, or we have waited enough."""
        wait_s = self._settings.drain_timeout_s
        service.stop_accepting(wait_s)
        leaving = replace(announcer.record, state=NodeState.DRAINING, cache_tokens_free=0)
        announcer.update(self._work.added_to(leaving))
        self._board.drain(wait_s)
        try:
            async with asyncio.timeout(wait_s):
                await service.emptied()
        except TimeoutError:
            log.warning("%d sessions end with this node", service.sessions)

    def _surroundings(self, network: HivemindNetwork, announcer: Announcer) -> Surroundings:
        return Surroundings(
            self._identity,
            network,
            announcer,
            clock=self._clock,
            clock_offsets=self._clock_offsets,
            peers_file=self._settings.peers_file,
            on_clock=lambda text: self._board.update(clock=text),
        )

    async def _stay_reachable(self, network: HivemindNetwork, announcer: Announcer) -> None:
        """Announce new addresses at once, and show how others reach us."""

        def moved(addresses: Sequence[str]) -> None:
            announcer.update(
                replace(
                    announcer.record,
                    addresses=for_record(addresses),
                    reachable_directly=any(map(is_public, addresses)),
                )
            )
            self._weights.moved(for_record(addresses))
            self._board.update(addresses=for_people(addresses, network.peer_id))

        await follow_reachability(
            network,
            use_relays=self._settings.use_relay,
            moved=moved,
            judged=lambda reachability: self._board.update(reachability=reachability.found),
        )

    async def _refresh(
        self,
        around: Surroundings,
        relocation: Relocation[SpanEngine],
        announcer: Announcer,
        adviser: Adviser,
    ) -> None:
        """Keep the announced load and the shown coverage young."""
        await around.view.ready()
        while True:
            record = with_load(announcer.record, relocation.engine)
            announcer.update(self._work.added_to(record))
            records = around.view.records()
            covered = coverage(records, announcer.record.number_of_blocks)
            self._board.update(coverage=tuple(covered), advice=await adviser.advise(records))
            await asyncio.sleep(min(self._settings.announce_period_s / 2, COVERAGE_PERIOD_S))


async def _announced(announcer: Announcer) -> None:
    """Wait until others can find us, but not forever: the announcer goes on trying."""
    try:
        async with asyncio.timeout(ANNOUNCE_TIMEOUT_S):
            await announcer.announced()
    except TimeoutError:
        log.warning("no peer has taken our announcement yet")


def _with_own(replicas: Sequence[int], span: BlockSpan) -> tuple[int, ...]:
    own = range(span.first_block, span.end_block)
    return tuple(count + (block in own) for block, count in enumerate(replicas))


def _in_words(engine: dict[str, str]) -> str:
    packed = f", {engine['packed_linears']} packed linears" if engine["packed_linears"] else ""
    return f"{engine['device']}, {engine['dtype']}, {engine['threads']} threads{packed}"
