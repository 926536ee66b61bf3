"""Moves a running node to other blocks when the swarm needs it there more than here.

    waiting -> decides -> announces MOVING, loads the new blocks while it serves the old ones
            -> reads the directory again -> announces JOINING, drains, swaps -> ONLINE

Rules that hold here:

- Nothing is left before others are known to stay with it, by a directory read *after* our MOVING
  was announced (``swarm.placement.may_leave``).
- Whatever fails before the swap leaves the node ONLINE where it was; loaded blocks are given back.
- Nobody decides twice within one view of the swarm: the pause is a fresh draw each time.
- When a block has no node, those who load it fastest go first, so that the others see them and
  stay.

What the steps do to engine, service and directory is the wiring's business (``Mover``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Protocol

from swarm.block_vectors import BlockVectors, PlacedNode, Vector, with_node
from swarm.placement import (
    DEFAULTS,
    PlacementSettings,
    SpanChoice,
    decide_move,
    decision_interval_s,
    gains,
    is_urgent,
    may_leave,
)
from swarm.ports import Clock
from swarm.protocol.errors import SwarmError
from swarm.protocol.records import NodeState

logger = logging.getLogger(__name__)

Span = tuple[int, int]


class Others(Protocol):
    """What the directory says of all other nodes that host the model."""

    async def read(self) -> BlockVectors:
        """Read the directory now, without ourselves. Raises NetworkError."""

    async def emergency(self) -> BlockVectors:
        """What was read last, while ``decision_interval_s`` of it is shorter than usual; waits
        for that to begin."""


class Mover(Protocol):
    """The node's parts, as far as a move concerns them."""

    @property
    def node(self) -> PlacedNode:
        """This node as it is announced now."""

    @property
    def size(self) -> int:
        """How many blocks it can host."""

    def load_s(self) -> Vector:
        """Seconds to get each block ``[number_of_blocks]``: 0 for blocks at hand."""

    async def announce(self, node: PlacedNode) -> None:
        """Announce this span, state and target, and wait until the directory has taken it."""

    async def load(self, span: Span) -> None:
        """Load the blocks of ``span`` beside those that are served. Raises SwarmError."""

    async def give_back(self, span: Span) -> None:
        """Forget what ``load`` loaded, as far as it is not served."""

    async def drain(self) -> None:
        """Accept no new sessions, hand the running ones over; ends when none is left."""

    async def swap(self, span: Span) -> None:
        """Serve ``span`` from now on instead of the old one; accept sessions again.

        Raises SwarmError when that fails: then the old one is served.
        """


class Outcome(StrEnum):
    """How a decision ended."""

    STAYED = "stayed"
    MOVED = "moved"
    BETTER_HERE = "others have gone there meanwhile"
    NEEDED_HERE = "others are leaving the blocks that are served here"
    FAILED = "the new blocks could not be loaded"


class Rebalancer:
    """Decides from time to time; the application owns the task of :meth:`run`."""

    def __init__(
        self,
        others: Others,
        mover: Mover,
        clock: Clock,
        dice: random.Random,
        *,
        settings: PlacementSettings = DEFAULTS,
        observer: Callable[[Outcome], None] | None = None,
    ) -> None:
        self._others = others
        self._mover = mover
        self._clock = clock
        self._dice = dice
        self._settings = settings
        self._observer = observer or (lambda outcome: None)

    async def run(self) -> None:
        """Decide until cancelled. Errors of the network or of loading are logged, never raised."""
        while True:
            await self._pause()
            try:
                outcome = await self.consider()
            except SwarmError as error:
                logger.info("could not look for better blocks: %s", error)
            else:
                self._observer(outcome)

    async def consider(self) -> Outcome:
        """Decide once, and move if that is worth it."""
        others = await self._others.read()
        choice = self._choice(others)
        if choice is not None and is_urgent(with_node(others, self._mover.node)):
            await self._let_faster_ones_go(choice)
            choice = self._choice(await self._others.read())
        if choice is None:
            return Outcome.STAYED
        return await self._move((choice.first_block, choice.end_block))

    def _choice(self, others: BlockVectors) -> SpanChoice | None:
        decision = decide_move(
            others,
            self._mover.node,
            self._mover.load_s(),
            chance=self._dice.random(),
            size=self._mover.size,
            settings=self._settings,
        )
        return decision.target

    async def _move(self, target: Span) -> Outcome:
        before = self._mover.node
        await self._mover.announce(replace(before, state=NodeState.MOVING, target=target))
        try:
            outcome = await self._prepare(before, target)
            if outcome is Outcome.MOVED:
                await self._change(before, target)
        except asyncio.CancelledError:
            await self._mover.give_back(target)
            raise
        except SwarmError as error:
            logger.warning("could not move to blocks %d:%d: %s", *target, error)
            outcome = Outcome.FAILED
        if outcome is not Outcome.MOVED:
            await self._mover.give_back(target)
            await self._mover.announce(replace(before, state=NodeState.ONLINE, target=None))
        return outcome

    async def _prepare(self, before: PlacedNode, target: Span) -> Outcome:
        """Load, while everything goes on; then look again. MOVED means: go."""
        await self._mover.load(target)
        others = await self._others.read()
        if not may_leave(others, before, target, self._settings):
            return Outcome.NEEDED_HERE
        if not self._is_better(others, before, target):
            return Outcome.BETTER_HERE
        return Outcome.MOVED

    async def _change(self, before: PlacedNode, target: Span) -> None:
        joining = replace(
            before,
            first_block=target[0],
            end_block=target[1],
            state=NodeState.JOINING,
            target=None,
        )
        await self._mover.announce(joining)
        await self._mover.drain()
        await self._mover.swap(target)
        await self._mover.announce(replace(joining, state=NodeState.ONLINE))

    def _is_better(self, others: BlockVectors, node: PlacedNode, target: Span) -> bool:
        here = gains(others, node, node.end_block - node.first_block, self._settings)
        there = gains(others, node, target[1] - target[0], self._settings)
        return bool(there[target[0]] > here[node.first_block])

    async def _pause(self) -> None:
        """Until the next decision, or a little when a block is about to be lost."""
        settings = self._settings
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._dice.uniform(0.0, 2 * settings.interval_s)):
                interval_s = decision_interval_s(await self._others.emergency(), settings)
                await self._clock.sleep(self._dice.uniform(0.0, 2 * interval_s))

    async def _let_faster_ones_go(self, choice: SpanChoice) -> None:
        """Wait a share of the time that loading takes."""
        load_s = float(self._mover.load_s()[choice.first_block : choice.end_block].sum())
        await self._clock.sleep(min(load_s / 8, self._settings.emergency_interval_s))
