"""Wiring of a client: the network, the directory and the chains that are open.

``SwarmClient`` is what the SDK, the command line and other programs share. One client serves any
number of sessions on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from swarm.cached_peers import load_peers, save_peers, worth_keeping
from swarm.catalogue.download import Progress
from swarm.catalogue.library import Library
from swarm.catalogue.resolve import local_checkpoint
from swarm.client.adapter_push import push_timeout_s
from swarm.client.auditing import Auditor
from swarm.client.bound_client import BoundClient
from swarm.client.chain import Chain, ChainObserver, ChainTimeouts
from swarm.client.challenge_terms import ChallengeTerms
from swarm.client.config import ClientSettings
from swarm.client.finetune.auditing import TrainingAuditor
from swarm.client.finetune.chain import TrainingChain, TrainingTimeouts
from swarm.client.finetune.chain_request import TrainingChainRequest
from swarm.client.hops import SessionRequest
from swarm.client.known_nodes import KnownNodes
from swarm.client.ledger_store import ClientLedger, known_reputations
from swarm.client.router import OLDEST_VIEW_S, READ_AGAIN_S, Router
from swarm.client.temporary_folder import remove_abandoned_folders, temporary_folder
from swarm.client.vouchers import Grant, issue_for_ourselves
from swarm.client.weights import client_library, fetch_ends
from swarm.clock_offset import ClockOffsets, CorrectedClock
from swarm.gate import Gate
from swarm.journal import JournalBudget
from swarm.ledger.reputation import Reputations
from swarm.ledger.sketch import Sketcher
from swarm.membership import ModelSummary, list_models, read_nodes
from swarm.membership_files import MembershipFiles
from swarm.ports import Clock, Directory, Transport
from swarm.protocol.errors import NetworkError, NoRouteError, PolicyUnmet, UsageError
from swarm.protocol.identity import Identity, PeerId
from swarm.protocol.passport import Passport
from swarm.protocol.policy import Policy
from swarm.protocol.records import NodeRecord
from swarm.protocol.tensors import DType
from swarm.revocations import RevocationWatch
from swarm.routing import Needs
from swarm.virtual_time import LoopClock

if TYPE_CHECKING:
    from swarm.client.grants import OperatorGrants

log = logging.getLogger(__name__)

AUDIT_WAIT_S = 3.0
"""For audits of the last sessions, when a client ends."""


class Network(Transport, Directory, Protocol):
    """Both ports of one peer."""

    async def close(self) -> None: ...


class SwarmClient:
    """A peer that hosts nothing: finds nodes, opens chains. An async context manager."""

    def __init__(
        self,
        network: Network,
        *,
        clock: Clock | None = None,
        timeouts: ChainTimeouts | None = None,
        observer: ChainObserver | None = None,
        seed: int | None = None,
        settings: ClientSettings | None = None,
        gate: Gate | None = None,
        ledger: ClientLedger | None = None,
        owner: Identity | None = None,
        audits: bool = False,
        reputations: Reputations | None = None,
        vouches: bool = True,
        grants: OperatorGrants | None = None,
        challenge: ChallengeTerms | None = None,
    ) -> None:
        """``ledger``: where what hops did is kept; ``owner``: whose node's key signs allowances.

        ``grants``: an operator's allowances, where there are any.

        ``audits``: look at what hops answered when sessions end (``client.auditing``).
        ``vouches``: sign for what hops do; who does not is served last.
        ``challenge``: sessions are kept fit for audits that the caller asks for.
        """
        self.vouches = vouches
        self._audits = audits
        self._keeps_sketches = audits or challenge is not None
        self._reputations = reputations or Reputations()
        self._steering = self._reputations if challenge is None else challenge.steering
        self._auditing = 0
        self._no_audits = asyncio.Event()
        self._no_audits.set()
        self._sketchers: dict[int, Sketcher] = {}
        self._ledger = ledger
        self._owner = owner
        self._policy = settings.policy if settings is not None else None
        self.gate = gate
        """Whom we deal with; None in a swarm without a charter."""
        self._settings = settings
        self._grants = grants
        self._network = network
        self._clock = clock or LoopClock()
        self._timeouts = timeouts or ChainTimeouts()
        self._observer = observer
        self._random = random.Random(seed)  # noqa: S311  (spreads load; no secret)
        self._known: dict[bytes, KnownNodes] = {}
        self._journals = JournalBudget()
        self._tasks: set[asyncio.Task[None]] = set()
        self.auditor = Auditor(
            network,
            clock=self._clock,
            dice=self._random,
            reputations=self._reputations,
            ledger=ledger,
            challenge=challenge,
        )
        self.training_auditor = TrainingAuditor(
            network,
            clock=self._clock,
            dice=self._random,
            own=self._own,
            reputations=self._reputations,
            ledger=ledger,
        )
        self._resources = AsyncExitStack()

    @classmethod
    async def connect(
        cls,
        settings: ClientSettings,
        *,
        observer: ChainObserver | None = None,
        challenge: ChallengeTerms | None = None,
        grants: OperatorGrants | None = None,
    ) -> SwarmClient:
        """Join the swarm through the settings' peers. Raises NetworkError when none answers."""
        # hivemind takes seconds to import: here, and not when a program only asks for --help.
        from swarm.hivemind_network import HivemindNetwork, NetworkSettings

        async with AsyncExitStack() as stack:
            identity_path = settings.key_file
            if identity_path is None:
                await asyncio.to_thread(remove_abandoned_folders)
                identity_path = stack.enter_context(temporary_folder()) / "identity.key"
            identity = Identity.load_or_create(identity_path)
            gate = settings.membership_files.require(identity.peer_id, LoopClock())
            network = await HivemindNetwork.create(
                identity_path,
                NetworkSettings(
                    # Clients are never dialled: nodes answer on the streams that clients open.
                    listen_addresses=("/ip4/127.0.0.1/tcp/0",),
                    initial_peers=settings.peers,
                    fallback_peers=load_peers(settings.peers_file) if settings.peers_file else (),
                    serve_directory=False,
                    start_timeout_s=settings.connect_timeout_s,
                    gate=gate,
                ),
            )
            stack.push_async_callback(network.close)
            offsets = ClockOffsets(LoopClock())
            offsets.believe(network.clock_offset_s)
            ledger = owner = reputations = None
            if settings.ledger_file is not None:
                ledger = await asyncio.to_thread(ClientLedger.open, settings.ledger_file)
                reputations = await asyncio.to_thread(known_reputations, settings.ledger_file)
                stack.push_async_callback(ledger.close)
            if settings.owner_key_path is not None:
                owner = Identity.load(settings.owner_key_path)
            clock = CorrectedClock(LoopClock(), offsets)
            if grants is None and settings.operator_url and settings.operator_key:
                # aiohttp takes a moment to import: only where there is an operator
                from swarm.client.grants import grants_by

                grants = await grants_by(settings, stack, clock)
            client = cls(
                network,
                clock=clock,
                timeouts=ChainTimeouts(
                    open_s=settings.open_timeout_s, step_s=settings.step_timeout_s
                ),
                observer=observer,
                settings=settings,
                gate=gate,
                ledger=ledger,
                owner=owner,
                audits=settings.audits,
                reputations=reputations,
                grants=grants,
                challenge=challenge,
            )
            if gate is not None:
                await client._watch_revocations(identity, gate, settings.membership_files)
            if settings.peers_file is not None:
                stack.callback(client._remember, settings.peers_file)
            client._resources = stack.pop_all()
            return client
        raise AssertionError("unreachable")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all chains and leave the network; audits that run have a moment to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AUDIT_WAIT_S):
                await self._no_audits.wait()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._resources.aclose()

    def _remember(self, peers_file: Path) -> None:
        """Keep nodes that were met, so that the next client needs no seed."""
        records = [record for known in self._known.values() for record in known.records]
        if not records:
            return
        try:
            save_peers(peers_file, worth_keeping(records, before=load_peers(peers_file)))
        except OSError as error:
            log.warning("could not keep the peers in %s: %s", peers_file, error.strerror)

    @property
    def transport(self) -> Transport:
        """Streams to other peers."""
        return self._network

    @property
    def directory(self) -> Directory:
        """For programs that read it themselves."""
        return self._network

    @property
    def clock(self) -> Clock:
        """Time as the swarm has it."""
        return self._clock

    async def models(self) -> list[ModelSummary]:
        """What the swarm serves, by its directory."""
        return await list_models(self._network, self._clock)

    async def nodes(self, model_revision: bytes) -> list[NodeRecord]:
        """Nodes that announce blocks of a model revision."""
        return await read_nodes(self._network, model_revision, self._clock)

    async def _watch_revocations(
        self, identity: Identity, gate: Gate, files: MembershipFiles
    ) -> None:
        watch = RevocationWatch(
            identity, self._network, self._clock, gate, keep=files.keep, brings=False
        )
        try:
            await watch.look()
        except NetworkError as error:
            log.warning("the revocation list cannot be read now: %s", error)
        self._own(watch.run())

    def library(self) -> Library:
        """The catalogue as this client sees it. Raises UsageError without settings."""
        if self._settings is None:
            raise UsageError("a client that was made without settings has no library")
        publishers = self.gate.charter.publishers if self.gate is not None else ()
        trusted = frozenset(map(PeerId, publishers)) or None
        return client_library(self._network, self._clock, self._settings, trusted)

    async def find_ends(self, model_name: str) -> Path:
        """As ``fetch_ends``, but of a model that may be on this disk already."""
        local = await asyncio.to_thread(local_checkpoint, model_name)
        return local if local is not None else await self.fetch_ends(model_name)

    async def fetch_ends(
        self, model_name: str, on_progress: Callable[[Progress], None] | None = None
    ) -> Path:
        """The directory of a model that is not on this disk, with all that a client needs of it.

        Raises CheckpointError when it is nowhere, UsageError when the name is ambiguous.
        """
        hub = self._settings is None or self._settings.hub
        hub = hub and (self.gate is None or self.gate.charter.hub)
        return await fetch_ends(self.library(), model_name, hub=hub, on_progress=on_progress)

    def under(self, policy: Policy | None, grants: OperatorGrants | None = None) -> BoundClient:
        """This client with a policy for all that is opened through it, beside its own, and with
        another payer.

        Raises ConfigError when nothing satisfies both policies.
        """
        own = self._policy
        if own is not None:
            policy = own if policy is None else own.both(policy)
        return BoundClient(self, policy, grants)

    def paid_by(self, account: Identity, budget: str = "") -> OperatorGrants | None:
        """Allowances of another account, for ``under``; None where there is no operator."""
        return None if self._grants is None else self._grants.of_account(account, budget)

    def _passport_of(self, peer: PeerId) -> Passport | None:
        return None if self.gate is None else self.gate.known(peer)

    def _check_policy(self, policy: Policy) -> None:
        """Raises PolicyUnmet for a policy of which nobody could say that it is kept."""
        if policy.needs_passports and self.gate is None:
            raise PolicyUnmet(
                f"the policy asks for {policy.describe()}, and this swarm has no authority that "
                "vouches for its nodes (no charter)",
                is_final=True,
            )

    async def open_chain(
        self,
        request: SessionRequest,
        *,
        number_of_blocks: int,
        dtype: DType | None = None,
        model_name: str = "this model",
        grants: OperatorGrants | None = None,
    ) -> Chain:
        """Choose hops and open a session on them; nodes that refuse or are gone are left out.

        ``dtype`` restricts the nodes to one compute precision; ``grants`` are of the account that
        has to pay. Raises NoRouteError when blocks are served by nobody or have no room, and when
        too many attempts failed; AllowanceRefused.
        """
        if request.policy is None and self._policy is not None:
            request = replace(request, policy=self._policy)
        if request.policy is not None:
            self._check_policy(request.policy)
            if request.adapter is not None and not request.policy.allows_adapter(
                request.adapter_id.hex()
            ):
                raise PolicyUnmet("the policy does not allow this adapter", is_final=True)
        grant = await self._grant(grants)
        needs = Needs(
            request.model_revision,
            number_of_blocks,
            tokens=request.rows * request.maximum_tokens,
            route_seed=bytes.fromhex(grant.allowance.route_seed) if grant is not None else b"",
            dtype=dtype,
            preferred_adapter=request.adapter_id,
            policy=request.policy,
            passport_of=self._passport_of,
        )
        router = await self._router(needs, model_name)
        chain = Chain(
            self._network,
            router,
            request,
            number_of_blocks,
            clock=self._clock,
            observer=self._observer,
            timeouts=self._timeouts_for(request),
            journal_budget=self._journals,
            grant=grant,
            renew=partial(self._grant, grants),
            on_renewal=lambda fresh: router.pays_with(bytes.fromhex(fresh.allowance.route_seed)),
            sketcher=self._sketcher(request.hidden_size) if self._keeps_sketches else None,
            on_finished=self._audit if self._audits else None,
        )
        self._own(self._run(chain))
        try:
            await chain.opened()
        except BaseException:
            await chain.close()
            raise
        return chain

    def _timeouts_for(self, request: SessionRequest) -> ChainTimeouts:
        """Hops may have to be brought an adapter before they open a session with it."""
        if request.adapter is None:
            return self._timeouts
        open_s = self._timeouts.open_s + push_timeout_s(request.adapter)
        return replace(self._timeouts, open_s=open_s)

    async def open_training(
        self,
        request: TrainingChainRequest,
        *,
        dtype: DType | None = None,
        model_name: str = "this model",
        timeouts: TrainingTimeouts | None = None,
    ) -> TrainingChain:
        """Choose hops and open a training session on them; raises as ``open_chain`` does."""
        if request.policy is None and self._policy is not None:
            request = replace(request, policy=self._policy)
        if request.policy is not None:
            self._check_policy(request.policy)
        if not self._audits:
            request = replace(request, audited_micro_batches=0)
        needs = Needs(
            request.model_revision,
            request.number_of_blocks,
            dtype=dtype,
            policy=request.policy,
            passport_of=self._passport_of,
        )
        chain = TrainingChain(
            self._network,
            await self._router(needs, model_name),
            request,
            clock=self._clock,
            timeouts=timeouts,
            auditor=self.training_auditor if self._audits else None,
        )
        self._own(chain.run())
        try:
            await chain.opened()
        except BaseException:
            await chain.close()
            raise
        return chain

    async def _router(self, needs: Needs, model_name: str) -> Router:
        return Router(
            self._network,
            await self._known_nodes(needs.model_revision, model_name),
            needs,
            clock=self._clock,
            dice=self._random,
            reputations=self._steering,
        )

    async def _grant(self, payer: OperatorGrants | None = None) -> Grant | None:
        if not self.vouches:
            return None
        grants = payer or self._grants
        if grants is not None and (granted := await grants.take()) is not None:
            return granted
        owner = self._owner.private_key if self._owner is not None else None
        return issue_for_ourselves(self._clock.unix_s(), owner)

    def _sketcher(self, hidden_size: int) -> Sketcher:
        """With a seed that nobody else knows, for as long as this client lives."""
        if hidden_size not in self._sketchers:
            self._sketchers[hidden_size] = Sketcher(hidden_size)
        return self._sketchers[hidden_size]

    async def _audit(self, chain: Chain) -> None:
        self._auditing += 1
        self._no_audits.clear()
        try:
            await self.auditor.spot_check(chain)
        finally:
            self._auditing -= 1
            if not self._auditing:
                self._no_audits.set()

    async def _run(self, chain: Chain) -> None:
        try:
            await chain.run()
        finally:
            if self._ledger is not None:
                await self._ledger.keep(chain.accounts)

    async def _known_nodes(self, model_revision: bytes, model_name: str) -> KnownNodes:
        """What this client knows of a model, kept young as long as it opens sessions.

        Raises NoRouteError when nobody serves it.
        """
        known = self._known.get(model_revision)
        if known is None:
            known = KnownNodes(self._network, model_revision, clock=self._clock, dice=self._random)
            self._known[model_revision] = known
            self._own(self._keep_young(known))
        await known.refresh(older_than_s=OLDEST_VIEW_S)
        if not known.records:
            await known.refresh(older_than_s=READ_AGAIN_S)
        if not known.records:
            raise NoRouteError(await self._unknown_model(model_name))
        return known

    async def _keep_young(self, known: KnownNodes) -> None:
        try:
            await known.run()
        finally:
            del self._known[known.model_revision]

    def _own(self, work: Coroutine[None, None, None]) -> None:
        """Run until it ends or the client is closed."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unknown_model(self, model_name: str) -> str:
        served = await self.models()
        others = [model for model in served if model.model_name == model_name]
        if others:
            return (
                f"the swarm serves another revision of {model_name}; "
                "use the same checkpoint as its nodes"
            )
        names = ", ".join(sorted({model.model_name for model in served})) or "no model at all"
        return f"nobody serves {model_name}; this swarm serves: {names}"
