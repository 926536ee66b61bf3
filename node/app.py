"""Wires a node together and runs it: the only place that knows all of its parts.

The life of ``swarm-node join``: the network starts and the checkpoint is opened at the same time;
the blocks are chosen, announced as JOINING and loaded; the service answers peers and the
announcement says ONLINE; Ctrl-C announces that the node drains, waits until its sessions are handed
over, says goodbye and ends. Whenever the owner's limits (``donor``) do not hold, it leaves in the
same way, rests, and lives again when they do.

One ``asyncio.TaskGroup`` owns everything that runs meanwhile. Heavy imports happen in threads, so
that the view lives while they last.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from swarm.cached_peers import load_peers
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
from swarm.node.config import BlockSpan, NodeSettings, PeerSettings, SeedSettings
from swarm.node.control import control_path, controlled
from swarm.node.donor.bandwidth import CappedNetwork
from swarm.node.donor.diary import Diary, Totals
from swarm.node.donor.guard import Guard
from swarm.node.donor.limits import LimitsFile
from swarm.node.donor.sensors import SystemSensors
from swarm.node.metrics import MetricsServer, NodeMetrics
from swarm.node.model_holder import ModelHolder
from swarm.node.neighbours import Neighbours
from swarm.node.process import held_identity, leave_on_signals
from swarm.node.reachability import follow_reachability
from swarm.node.rebalancing import Rebalancer
from swarm.node.relocation import Relocation, SeenNodes
from swarm.node.service import NodeService, ServiceLimits
from swarm.node.surroundings import Surroundings, remember_peers
from swarm.node.tit_for_tat import Owed
from swarm.node.view import NodeStatus, View
from swarm.node.weights import NodeWeights
from swarm.ports import Clock
from swarm.protocol.errors import ConfigError, NetworkError, SwarmError
from swarm.protocol.identity import Identity, PeerId, public_key_from_peer_id
from swarm.protocol.records import MAX_ADAPTERS, NodeRecord, NodeState
from swarm.protocol.version import MAXIMUM_VERSION, MINIMUM_VERSION, software_version
from swarm.revocations import RevocationWatch
from swarm.routing import adapter_hint
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


class Left(Exception):
    """The owner asked to leave while something was being prepared."""


Life = Callable[[Identity, Board, asyncio.Event], Awaitable[None]]


async def run_node(settings: NodeSettings, view: View) -> None:
    """Host blocks until SIGINT or SIGTERM. Raises SwarmErrors that say what to do."""
    status = NodeStatus(display_name=settings.display_name, model=settings.model)

    async def life(identity: Identity, board: Board, leaving: asyncio.Event) -> None:
        guard = board.guard
        if guard is None:
            raise RuntimeError("a node has an owner")
        async with _watching(guard):
            while await guard.rested(leaving, board.rest):
                async with guard.shift(leaving) as over:
                    with contextlib.suppress(Left):
                        await _alone(_Node(settings, view, identity, board, over).live())
                board.forget_engine()
                if not leaving.is_set():
                    await asyncio.to_thread(_give_memory_back)

    await _run(settings, view, status, life, owner=lambda board: _owner(settings, board))


def _owner(settings: NodeSettings, board: Board) -> Guard:
    """The owner's limits, sensors and diary. Raises ConfigError for damaged files."""

    def totals() -> Totals:
        counted, guard = board.metrics.totals, board.guard
        return Totals(
            sessions=counted.sessions,
            tokens=counted.tokens,
            energy_j=counted.energy_j,
            sent_bytes=0 if guard is None else guard.up.total_bytes,
            received_bytes=0 if guard is None else guard.down.total_bytes,
        )

    diary = Diary(settings.diary_file, datetime.now, totals)
    diary.load()
    return Guard(
        LimitsFile(settings.limits_file, settings.donor_limits),
        SystemSensors(settings.identity_file.parent),
        diary,
        clock=LoopClock(),
    )


async def run_seed(settings: SeedSettings, view: View) -> None:
    """Be a meeting point until SIGINT or SIGTERM. Raises SwarmErrors that say what to do."""

    async def life(identity: Identity, board: Board, leaving: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            gate = settings.membership_files.require(identity.peer_id, LoopClock())
            network = await _unless_left(leaving, _start_network(settings, gate))
            stack.push_async_callback(network.close)
            addresses = for_people(await network.addresses(), network.peer_id)
            board.update(state="online", peer_id=network.peer_id, addresses=addresses)
            view.ready(board.snapshot())
            async with _guarded_by(network) as group:
                running = [
                    group.create_task(
                        remember_peers(network, LoopClock(), identity.peer_id, settings.peers_file)
                    )
                ]
                if gate is not None:
                    watch = _revocation_watch(identity, network, LoopClock(), gate, settings)
                    running.append(group.create_task(watch.run()))
                if settings.models:
                    holder = ModelHolder(
                        network, identity, settings, board, trusted=_trusted_publishers(gate)
                    )
                    stack.callback(holder.close)
                    running.append(group.create_task(holder.run()))
                await leaving.wait()
                for task in running:
                    task.cancel()

    await _run(settings, view, NodeStatus(display_name=settings.display_name), life)


async def _run(
    settings: PeerSettings,
    view: View,
    status: NodeStatus,
    life: Life,
    *,
    owner: Callable[[Board], Guard] | None = None,
) -> None:
    """What nodes and seeds share: key, signals, metrics, view, and one error instead of a group."""
    leaving = asyncio.Event()
    board = Board(status, NodeMetrics())
    control = control_path(settings.identity_file)
    try:
        async with AsyncExitStack() as stack:
            identity = stack.enter_context(held_identity(settings.identity_file))
            stack.enter_context(leave_on_signals(leaving))
            if owner is not None:
                board.guard = owner(board)
            if settings.metrics:
                url = await stack.enter_async_context(_served_metrics(settings, board.metrics))
                board.update(metrics_url=url)
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(view.watch(board.snapshot))
                async with controlled(control, board.snapshot, leaving.set, board.guard):
                    await life(identity, board, leaving)
                watching.cancel()
    except BaseExceptionGroup as group_of_errors:
        error = _only_error(group_of_errors)
        if not isinstance(error, Left):
            raise error from None
    view.stopped()


class _Node:
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
            async with _guarded_by(network) as group:
                weights = self._weights = self._node_weights(network)
                stack.callback(weights.close)
                if self._gate is not None:
                    watch = _revocation_watch(
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
                span = _choose(model, self._settings, others, now_unix_s=self._clock.unix_s())
                self._board.update(
                    state="loading",
                    model=checkpoint.name,
                    model_blocks=checkpoint.number_of_blocks,
                    first_block=span.first_block,
                    end_block=span.end_block,
                    coverage=tuple(replicas),
                )
                announcer = await self._announcer(network, model, span)
                async with _announcing(announcer, group):
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
                    announcer.update(_with_load(online, engine))
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
        return await _unless_left(self._leaving, work)

    async def _start(self, stack: AsyncExitStack) -> HivemindNetwork:
        """The network, while torch is imported in a thread; both take seconds."""
        async with asyncio.TaskGroup() as group:
            files = self._settings.membership_files
            self._gate = files.require(self._identity.peer_id, self._clock)
            group.create_task(asyncio.to_thread(importlib.import_module, HOSTING))
            network = await _start_network(self._settings, self._gate)
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
            trusted=_trusted_publishers(self._gate),
            may_use_hub=self._gate is None or self._gate.charter.hub,
            on_progress=lambda progress: self._board.update(fetching=progress),
        )

    async def _open(self, weights: NodeWeights) -> OpenedModel:
        """The checkpoint, wherever it is found; of one that is not here, the small files."""
        self._board.update(state="looking")
        path = await weights.find(self._settings.model)
        model = await asyncio.to_thread(_open, self._settings, path)
        await weights.give(model.checkpoint)
        return model

    async def _others(self, network: HivemindNetwork, model: OpenedModel) -> list[NodeRecord]:
        """The other nodes of the model, in every state."""
        records = await read_nodes(network, model.checkpoint.revision, self._clock)
        return [record for record in records if record.peer_id != network.peer_id]

    async def _announcer(
        self, network: HivemindNetwork, model: OpenedModel, span: BlockSpan
    ) -> Announcer:
        addresses = await network.addresses()
        checkpoint = model.checkpoint
        passport = None if self._gate is None else self._gate.own_passport()
        record = NodeRecord(
            peer_id=self._identity.peer_id,
            model_name=checkpoint.name,
            model_revision=checkpoint.revision,
            number_of_blocks=checkpoint.number_of_blocks,
            shards=1,
            first_block=span.first_block,
            end_block=span.end_block,
            state=NodeState.JOINING,
            dtype=model.wire_dtype,
            minimum_version=MINIMUM_VERSION,
            maximum_version=MAXIMUM_VERSION,
            sequence=0,
            expires_unix_s=0,
            addresses=for_record(addresses),
            reachable_directly=any(map(is_public, addresses)),
            software=software_version(),
            display_name=self._settings.display_name,
            organisation=(passport and passport.organisation) or self._settings.organisation,
            country=(passport and passport.country) or self._settings.country,
            passport_hash=b"" if self._gate is None else self._gate.passport_hash,
        )
        return Announcer(
            self._identity,
            network,
            self._clock,
            record,
            hidden_size=checkpoint.hidden_size,
            announce_period_s=self._settings.announce_period_s,
        )

    async def _load(self, model: OpenedModel, span: BlockSpan) -> SpanEngine:
        def progress(loaded: int, total: int) -> None:
            if self._leaving.is_set():
                raise Left
            self._board.update(loading_fraction=loaded / total)

        await self._weights.ensure(model.checkpoint, span)
        engine = await run_in_own_thread(partial(_load, model, self._settings, span, progress))
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
            engine=_describe(description),
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
            fits=lambda spans: _fit_together(model, self._settings, spans),
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
            record = _with_load(announcer.record, relocation.engine)
            announcer.update(self._work.added_to(record))
            records = around.view.records()
            covered = coverage(records, announcer.record.number_of_blocks)
            self._board.update(coverage=tuple(covered), advice=await adviser.advise(records))
            await asyncio.sleep(min(self._settings.announce_period_s / 2, COVERAGE_PERIOD_S))


# --- parts of the start --------------------------------------------------------------------------
async def _start_network(settings: PeerSettings, gate: Gate | None) -> HivemindNetwork:
    module = await asyncio.to_thread(importlib.import_module, "swarm.hivemind_network")
    network: HivemindNetwork = await module.HivemindNetwork.create(
        settings.identity_file,
        module.NetworkSettings(
            listen_addresses=settings.listen_addresses,
            initial_peers=settings.peers,
            fallback_peers=load_peers(settings.peers_file),
            announce_addresses=settings.announce_addresses,
            relay_for_others=isinstance(settings, SeedSettings) and settings.relay,
            use_relays=isinstance(settings, NodeSettings) and settings.use_relay,
            relays=settings.relays if isinstance(settings, NodeSettings) else (),
            gate=gate,
        ),
    )
    return network


def _revocation_watch(
    identity: Identity,
    network: HivemindNetwork,
    clock: Clock,
    gate: Gate,
    settings: PeerSettings,
) -> RevocationWatch:
    return RevocationWatch(
        identity,
        network,
        clock,
        gate,
        announce_period_s=settings.announce_period_s,
        keep=settings.membership_files.keep,
    )


def _trusted_publishers(gate: Gate | None) -> frozenset[PeerId] | None:
    """Those of the charter; None believes everybody."""
    if gate is None or not gate.charter.publishers:
        return None
    return frozenset(map(PeerId, gate.charter.publishers))


def _open(settings: NodeSettings, path: Path) -> OpenedModel:
    from swarm.node.engine.hosting import open_model

    model = open_model(settings, path)
    _ = model.checkpoint.revision  # reads the disk: here, not on the event loop
    return model


def _choose(
    model: OpenedModel, settings: NodeSettings, others: list[NodeRecord], *, now_unix_s: float
) -> BlockSpan:
    from swarm.block_vectors import placed_nodes
    from swarm.node.engine.hosting import choose_blocks

    return choose_blocks(model, settings, placed_nodes(others, now_unix_s=now_unix_s))


def _load(
    model: OpenedModel,
    settings: NodeSettings,
    span: BlockSpan,
    progress: Callable[[int, int], None],
) -> SpanEngine:
    from swarm.node.engine.hosting import load_blocks

    return load_blocks(model, settings, span, progress)


def _fit_together(model: OpenedModel, settings: NodeSettings, spans: list[BlockSpan]) -> bool:
    from swarm.node.engine.hosting import fit_together

    return fit_together(model, settings, spans)


def _with_load(record: NodeRecord, engine: SpanEngine) -> NodeRecord:
    """The record with the engine's speed and load."""
    load = engine.load
    return replace(
        record,
        decode_tokens_per_s=int(engine.decode_tokens_per_s),
        batched_tokens_per_s=int(engine.batched_tokens_per_s),
        prefill_tokens_per_s=int(engine.prefill_tokens_per_s),
        cache_tokens_total=load.cache_tokens_total,
        cache_tokens_free=load.cache_tokens_free if record.takes_sessions else 0,
        queued_steps=load.queued_steps,
        busy_permille=min(1000, round(load.busy_fraction * 1000)),
        adapters=tuple(map(adapter_hint, engine.adapters.adapter_ids[-MAX_ADAPTERS:])),
    )


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


def _describe(engine: dict[str, str]) -> str:
    packed = f", {engine['packed_linears']} packed linears" if engine["packed_linears"] else ""
    return f"{engine['device']}, {engine['dtype']}, {engine['threads']} threads{packed}"


def _give_memory_back() -> None:
    from swarm.node.engine.freed_memory import return_freed_memory

    gc.unfreeze()
    gc.collect()
    return_freed_memory()


# --- owners of what runs -------------------------------------------------------------------------
@asynccontextmanager
async def _guarded_by(network: HivemindNetwork) -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that ends with NetworkError when the network daemon dies."""

    async def guard() -> None:
        await network.wait_failed()
        raise NetworkError("the network daemon (p2pd) has ended; start the node again")

    async with asyncio.TaskGroup() as group:
        guarding = group.create_task(guard())
        yield group
        guarding.cancel()


@asynccontextmanager
async def _watching(guard: Guard) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(guard.watch())
        try:
            yield
        finally:
            watching.cancel()


@asynccontextmanager
async def _announcing(announcer: Announcer, group: asyncio.TaskGroup) -> AsyncIterator[None]:
    """Announce meanwhile, and at the end that we leave."""
    announcing = group.create_task(announcer.run())
    try:
        yield
    except asyncio.CancelledError:
        raise  # the network is gone, or the owner does not want to wait
    except BaseException:
        await _leave(announcer, announcing)
        raise
    await _leave(announcer, announcing)


async def _leave(announcer: Announcer, announcing: asyncio.Task[None]) -> None:
    announcing.cancel()
    await asyncio.wait((announcing,))
    await announcer.leave()


@asynccontextmanager
async def _served_metrics(settings: PeerSettings, metrics: NodeMetrics) -> AsyncIterator[str]:
    try:
        server = MetricsServer(metrics.registry, settings.metrics_port)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on port {settings.metrics_port}: {error.strerror}; "
            "choose another with --metrics-port, or --no-metrics"
        ) from None
    try:
        yield server.url
    finally:
        await asyncio.to_thread(server.close)


async def _alone(life: Awaitable[None]) -> None:
    """Run one life of a node; raises one error instead of a group."""
    try:
        await life
    except BaseExceptionGroup as group_of_errors:
        raise _only_error(group_of_errors) from None


async def _unless_left(leaving: asyncio.Event, work: Awaitable[T]) -> T:
    """The result of ``work``; when the owner leaves before, it is cancelled and Left raised."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(leaving.wait())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Left
    finally:
        waiting.cancel()
        working.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def _only_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """What the owner is told of several errors: a bug as it is, else the first of ours."""
    _, bugs = errors.split((Left, SwarmError))
    if bugs is not None:
        return bugs
    _, ours = errors.split(Left)
    error: BaseException = ours or errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
