"""Spot checks: what hops answered in a session is computed again elsewhere and compared.

At the end of a session each of its hops is looked at with a probability that falls with its record
(``swarm.ledger.reputation``). The hop and the one before show what they handled; hashes that they
signed bind it. Then the hop's inputs go as one prompt through another node with the same blocks.
When the two disagree a third one decides. The prompt's tokens never leave the client, and nobody
else than the nodes of the session and the replicas sees its activations.

What replaying costs is a tenth of the decoding that it checks, or less.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from swarm.client.audit_evidence import Evidence
from swarm.client.audited_chain import AuditedChain, AuditedHop
from swarm.client.challenge_terms import ChallengeTerms
from swarm.client.hops import SessionRequest
from swarm.client.ledger_store import ClientLedger
from swarm.client.link import HopFailed
from swarm.client.replay import replay_through
from swarm.client.router import failure_kind
from swarm.client.shown_work import (
    ShownWork,
    bound_links,
    covered_from,
    in_force,
    inputs_fit,
    outputs_fit,
)
from swarm.client.vouchers import issue_for_ourselves
from swarm.connection import Connection
from swarm.ledger.audit_rule import (
    AdapterShare,
    Comparison,
    Floats,
    Limits,
    adapter_share,
    compare,
    loosest,
    to_array,
)
from swarm.ledger.reputation import Found, NodeReputation, Reputations
from swarm.ledger.sketch import Sketcher
from swarm.ledger.transcript import LINKS_KEPT, Link
from swarm.pieces import join_tokens, slice_tokens
from swarm.ports import Clock, Transport
from swarm.protocol.errors import ErrorCode, ProtocolError, SwarmError
from swarm.protocol.identity import PeerId
from swarm.protocol.messages import (
    MAX_PAYLOAD_BYTES,
    JournalChunk,
    ReadTranscript,
    TranscriptEnd,
    TranscriptPart,
)
from swarm.protocol.tensors import WireTensor
from swarm.protocol.version import STREAM_PROTOCOL
from swarm.routing import Hop as PlannedHop

log = logging.getLogger(__name__)

LONGEST_SEGMENT_TOKENS = 4096
"""Positions of one session that are looked at; a longer one is looked at in its beginning."""
LEAST_TOKENS = 8
"""Shorter sessions say too little."""
REFERENCE_SHARE = 0.25
"""Of the audits of who has a reference: so that replicas that collude do not help."""
SHOW_S = 20.0
RECEIPTS_S = 2.0
MOST_LINKS = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one node."""

    peer_id: PeerId
    first_block: int
    end_block: int
    found: Found
    comparison: Comparison | None = None
    reputation: NodeReputation | None = None
    evidence: Evidence | None = None
    """Of one that passed or failed; a node that keeps no books leaves none."""


@dataclass(frozen=True, slots=True)
class _Opinion:
    """What somebody else computed from the same inputs."""

    states: Floats
    hops: tuple[PlannedHop, ...]
    """Who computed it; empty for a reference that we trust."""
    dtype_class: str

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(hop.peer_id for hop in self.hops)


class Auditor:
    """The audits of one client; shared by its sessions."""

    def __init__(
        self,
        transport: Transport,
        *,
        clock: Clock,
        dice: random.Random,
        reputations: Reputations | None = None,
        ledger: ClientLedger | None = None,
        challenge: ChallengeTerms | None = None,
    ) -> None:
        """``challenge``: a validator's, who may have own weights as a reference. It is asked in
        ``reference_share`` of the audits, and where others disagree or there is no other."""
        self.reputations = reputations or Reputations()
        self._transport = transport
        self._clock = clock
        self._dice = dice
        self._ledger = ledger
        self._reference = challenge.reference if challenge is not None else None
        self.reference_share = REFERENCE_SHARE
        self._looked_at: WeakKeyDictionary[AuditedChain, int] = WeakKeyDictionary()
        """Sessions that were looked at as a whole, and how long they were then."""
        self.audits = 0
        self.failures = 0
        self.replayed_tokens = 0

    async def spot_check(self, chain: AuditedChain) -> list[Finding]:
        """Look at some hops of a session, by lot."""
        if self._looked_at.get(chain) == chain.length:
            return []
        chosen = [
            hop.peer_id
            for hop in chain.audited_hops()
            if self._dice.random() < self.reputations.of(hop.peer_id).audit_probability()
        ]
        return await self.audit(chain, chosen) if chosen else []

    async def audit(
        self, chain: AuditedChain, peers: Collection[PeerId] | None = None
    ) -> list[Finding]:
        """Look at these hops of a session, or at all; no step may be under way meanwhile.

        What cannot be looked at (too short, rows reordered, no other node) gives no finding.
        """
        hops = chain.audited_hops()
        length = min(chain.length, LONGEST_SEGMENT_TOKENS)
        inputs = chain.own_inputs(length)
        if length < LEAST_TOKENS or inputs is None:
            return []
        if peers is None:
            self._looked_at[chain] = chain.length
        await chain.collect_receipts(RECEIPTS_S)
        shown: dict[PeerId, ShownWork | None] = {}
        findings: list[Finding] = []
        for index, hop in enumerate(hops):
            if peers is not None and hop.peer_id not in peers:
                continue
            for each in hops[max(0, index - 1) : index + 1]:
                if each.peer_id not in shown:
                    shown[each.peer_id] = await self._ask(each, chain.request, length)
            before = hops[index - 1] if index else None
            given = inputs
            if before is not None:
                before_shown = shown[before.peer_id]
                if before_shown is None or before_shown.outputs is None:
                    findings.append(await self._note(before, Found.REFUSED))
                    continue
                given = before_shown.outputs
            findings += await self._examine(chain, hop, before, shown[hop.peer_id], given, length)
        return findings

    async def _examine(
        self,
        chain: AuditedChain,
        hop: AuditedHop,
        before: AuditedHop | None,
        shown: ShownWork | None,
        given: WireTensor,
        length: int,
    ) -> list[Finding]:
        receipt = hop.account.receipt if hop.account is not None else None
        is_last = chain.ends_with_blocks(hop.end_block)
        signed = hop.account.receipt_signed if hop.account is not None else None
        shows_nothing = shown is None or (shown.outputs is None and not is_last)
        if shown is None or receipt is None or signed is None or shows_nothing:
            return [await self._note(hop, Found.REFUSED)]
        evidence = Evidence(receipt, signed, length)
        policy = chain.request.policy
        bound = bound_links(
            shown, receipt, hop.session_id, b"" if policy is None else policy.to_bytes()
        )
        if bound is None:
            return [await self._note(hop, Found.FAILED, evidence=evidence)]
        links = in_force(bound)
        if receipt.steps <= LINKS_KEPT // 2 and covered_from(links, length) > 0:
            return [await self._note(hop, Found.REFUSED)]
        if not is_last and shown.outputs is not None and not outputs_fit(links, shown.outputs):
            return [await self._note(hop, Found.FAILED, evidence=evidence)]
        if not inputs_fit(links, given):
            if before is None:
                return [await self._note(hop, Found.FAILED, evidence=evidence)]
            return [
                await self._note(hop, Found.DISPUTED, other=before.peer_id),
                await self._note(before, Found.DISPUTED, other=hop.peer_id),
            ]
        length = min(length, given.shape[1])
        given = slice_tokens(given, 0, length)
        if is_last:
            positions, answered = chain.results_before(length)
            sketcher = chain.sketcher
        else:
            if shown.outputs is None or shown.outputs.shape[1] < length:
                return [await self._note(hop, Found.REFUSED)]
            positions = np.arange(length)
            answered = to_array(slice_tokens(shown.outputs, 0, length))
            sketcher = None
        padding = chain.request.left_padding
        measured = _Measured(padding, positions, sketcher, to_array(given), answered)
        return await self._judge(
            chain, hop, given, measured, evidence.of_work(given, answered, length)
        )

    async def _judge(
        self,
        chain: AuditedChain,
        hop: AuditedHop,
        given: WireTensor,
        measured: _Measured,
        evidence: Evidence,
    ) -> list[Finding]:
        """Compare with a second opinion, and with a third one if they differ."""
        if measured.is_empty:
            return []
        self.audits += 1
        second = None
        if self._reference is not None and self._dice.random() < self.reference_share:
            second = await self._trusted(hop, given, chain.request)
        second = second or await self._opinion(chain, hop, given, excluded=())
        second = second or await self._trusted(hop, given, chain.request)
        if second is None:
            return []
        comparison = measured.against(second.states)
        declared = hop.account.dtype_class if hop.account is not None else ""
        limits = _limits_between(chain, hop, declared, second.dtype_class)
        seen = evidence.against(second.states, limits, is_trusted=not second.peers)
        if comparison.passes(limits) and await self._has_adapter(
            chain, hop, given, measured, second, limits
        ):
            return [await self._note(hop, Found.PASSED, comparison, evidence=seen)]
        if not second.peers:  # a reference that we trust
            return [await self._note(hop, Found.FAILED, comparison, evidence=seen)]
        third = await self._trusted(hop, given, chain.request)
        third = third or await self._opinion(chain, hop, given, excluded=second.peers)
        if third is None:
            return [
                await self._note(hop, Found.DISPUTED, comparison, other=second.peers[0]),
            ]
        again = measured.against(third.states)
        limits = _limits_between(chain, hop, declared, third.dtype_class)
        seen_again = evidence.against(third.states, limits, is_trusted=not third.peers)
        if again.passes(limits) and await self._has_adapter(
            chain, hop, given, measured, third, limits
        ):
            findings = [await self._note(hop, Found.PASSED, again, evidence=seen_again)]
            if len(second.peers) == 1:
                replica = hop.at(second.peers[0])
                findings.append(await self._note(replica, Found.FAILED, comparison))
            return findings
        if not third.peers:
            return [await self._note(hop, Found.FAILED, again, evidence=seen_again)]
        between = measured.between(second.states, third.states)
        if between.passes(_limits_between(chain, hop, second.dtype_class, third.dtype_class)):
            return [await self._note(hop, Found.FAILED, comparison, evidence=seen)]
        return [await self._note(hop, Found.DISPUTED, comparison, other=second.peers[0])]

    async def _has_adapter(
        self,
        chain: AuditedChain,
        hop: AuditedHop,
        given: WireTensor,
        measured: _Measured,
        opinion: _Opinion,
        limits: Limits,
    ) -> bool:
        """Whether an answer that passed has the session's adapter, which may do less than rounding.

        Who had the other opinion computes once more without it. When they do not, nothing speaks
        against.
        """
        if chain.request.adapter is None:
            return True
        request = replace(chain.request, adapter=None)
        try:
            bare = (
                await self._replayed(chain, opinion.hops, given, request)
                if opinion.hops
                else await self._trusted(hop, given, request)
            )
        except HopFailed as error:
            log.info("a replica failed: %s", error)
            return True
        if bare is None:
            return True
        share = measured.adapter_share(opinion.states, bare.states)
        log.debug("adapter: effect %.4f, share %.2f", share.effect, share.share)
        return share.passes(limits)

    # --- opinions
    async def _trusted(
        self, hop: AuditedHop, given: WireTensor, request: SessionRequest
    ) -> _Opinion | None:
        """The span computed by the reference; None when there is none for it."""
        if self._reference is None:
            return None
        output = await self._reference(hop.first_block, hop.end_block, given, request.adapter)
        return None if output is None else _Opinion(to_array(output), (), "float32")

    async def _opinion(
        self,
        chain: AuditedChain,
        hop: AuditedHop,
        given: WireTensor,
        *,
        excluded: Sequence[PeerId],
    ) -> _Opinion | None:
        """The span computed by somebody else; None when there is nobody."""
        left_out = {hop.peer_id, *excluded}
        for _ in range(3):
            try:
                plan = await chain.planner.plan(
                    hop.first_block, hop.end_block, excluded=tuple(left_out)
                )
            except SwarmError as error:
                log.debug("nobody to replay blocks of %s: %s", hop.peer_id, error)
                return None
            try:
                return await self._replayed(chain, plan.hops, given, chain.request)
            except HopFailed as error:
                log.info("a replica failed: %s", error)
                left_out.add(error.peer_id)
                # Else the next audit waits for it again.
                cause = error.__cause__
                if isinstance(cause, SwarmError):
                    chain.planner.failed(error.peer_id, failure_kind(cause))
        return None

    async def _replayed(
        self,
        chain: AuditedChain,
        hops: Sequence[PlannedHop],
        given: WireTensor,
        request: SessionRequest,
    ) -> _Opinion:
        """The inputs through other nodes, one after the other. Raises HopFailed."""
        states, dtype_class = given, ""
        for replica in hops:
            replayed = await replay_through(
                self._transport,
                replica,
                states,
                request,
                issue_for_ourselves(self._clock.unix_s()),
                self._clock,
            )
            self.replayed_tokens += given.shape[0] * given.shape[1]
            states, dtype_class = replayed.output, replayed.dtype_class or dtype_class
        return _Opinion(to_array(states), tuple(hops), dtype_class)

    # --- what hops show
    async def _ask(self, hop: AuditedHop, request: SessionRequest, length: int) -> ShownWork | None:
        """None when the hop does not show it, whatever the reason."""
        try:
            async with asyncio.timeout(SHOW_S):
                stream = await self._transport.open(hop.peer_id, STREAM_PROTOCOL, hop.addresses)
                async with Connection(stream) as connection:
                    connection.maximum_payload_bytes = MAX_PAYLOAD_BYTES
                    await connection.say_hello(
                        ReadTranscript(session_id=hop.session_id, end_position=length)
                    )
                    return await _receive_work(connection, request, length)
        except (TimeoutError, SwarmError) as error:
            log.info("%s does not show its work: %s", hop.peer_id, error)
            return None

    # --- what follows
    async def _note(
        self,
        hop: AuditedHop,
        found: Found,
        comparison: Comparison | None = None,
        *,
        other: str = "",
        evidence: Evidence | None = None,
    ) -> Finding:
        reputation = self.reputations.found(
            hop.peer_id,
            found,
            segment=hashlib.sha256(hop.session_id).hexdigest(),
            other=other,
            now_unix_s=self._clock.unix_s(),
        )
        if found is Found.FAILED:
            self.failures += 1
        if found is not Found.PASSED:
            log.warning("audit of %s: %s", hop.peer_id, found.value)
        if self._ledger is not None:
            await self._ledger.keep_reputation(hop.peer_id, reputation.to_json())
        return Finding(
            hop.peer_id, hop.first_block, hop.end_block, found, comparison, reputation, evidence
        )


def _limits_between(chain: AuditedChain, hop: AuditedHop, first: str, second: str) -> Limits:
    """What nodes of these declared precisions may differ by."""
    limits, blocks = chain.request.audit_limits, hop.end_block - hop.first_block
    return loosest(limits.of(first, blocks), limits.of(second, blocks))


class _Measured:
    """One hop's segment: which positions are compared, in full or as sketches."""

    def __init__(
        self,
        left_padding: Sequence[int],
        positions: np.ndarray[Any, np.dtype[np.intp]],
        sketcher: Sketcher | None,
        given: Floats,
        answered: Floats,
    ) -> None:
        """``answered`` has the ``positions`` only; they are ascending."""
        self._sketcher = sketcher
        self._positions = positions
        self._given = self._view(given)
        self._answered = answered
        rows = given.shape[0]
        padding = np.array(left_padding or [0] * rows)
        # attention sinks: at the first real position honest rounding is large
        self._counts = positions[None, :] > padding[:, None]

    @property
    def is_empty(self) -> bool:
        return not self._counts.any()

    def against(self, reference: Floats) -> Comparison:
        """The hop's answer against somebody else's ``[rows, tokens, hidden]``."""
        return self._compare(self._answered, self._view(reference))

    def between(self, first: Floats, second: Floats) -> Comparison:
        """Two others against each other."""
        return self._compare(self._view(first), self._view(second))

    def adapter_share(self, adapted: Floats, bare: Floats) -> AdapterShare:
        """How much of an adapter's effect the hop's answer has."""
        states = (self._given, self._answered, self._view(adapted), self._view(bare))
        return adapter_share(*(each[self._counts] for each in states))

    def _compare(self, answered: Floats, reference: Floats) -> Comparison:
        return compare(self._given[self._counts], answered[self._counts], reference[self._counts])

    def _view(self, states: Floats) -> Floats:
        chosen: Floats = states[:, self._positions]
        return chosen if self._sketcher is None else self._sketcher.project(chosen)


async def _receive_work(connection: Connection, request: SessionRequest, length: int) -> ShownWork:
    """Bounded by what was asked for. Raises ProtocolError and NetworkError."""
    links: list[Link] = []
    chunks: list[WireTensor] = []
    positions = 0
    wanted = (request.rows, request.hidden_size, request.wire_dtype)
    while True:
        message = await connection.receive()
        match message:
            case TranscriptPart():
                links += map(Link.from_bytes, message.links)
                if len(links) > MOST_LINKS:
                    raise ProtocolError(ErrorCode.TOO_LARGE, "too many links")
            case JournalChunk():
                if message.position != positions:
                    raise ProtocolError(ErrorCode.BAD_POSITION, "a gap in what was shown")
                rows, tokens, hidden = message.activations.shape
                if (rows, hidden, message.activations.dtype) != wanted:
                    raise ProtocolError(ErrorCode.BAD_TENSOR, "shape of what was shown")
                positions += tokens
                if positions > length:
                    raise ProtocolError(ErrorCode.TOO_LARGE, "more than was asked for")
                chunks.append(message.activations)
            case TranscriptEnd():
                outputs = join_tokens(chunks, positions) if chunks else None
                return ShownWork(message.start, tuple(links), outputs)
            case _:
                raise ProtocolError(ErrorCode.UNEXPECTED_MESSAGE, type(message).__name__)
