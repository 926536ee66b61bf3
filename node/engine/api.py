"""What the rest of a node knows of its engine. Free of torch: simulations plug in a toy.

The service hands wire tensors in and gets wire tensors out; what happens in between (device,
batching, attention) is the engine's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from swarm.protocol.adapter_index import AdapterIndex, ModuleSpec
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import DType, WireTensor


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """One session's cache: ``rows x maximum_tokens`` for blocks ``[first_block, end_block)``.

    Block numbers are the model's, not the span's. ``left_padding`` is empty or has one count per
    row: that many leading positions are padding.
    """

    first_block: int
    end_block: int
    rows: int
    maximum_tokens: int
    wire_dtype: DType
    left_padding: tuple[int, ...] = ()
    adapter_id: bytes = b""
    """Which adapter the session computes with; empty: the bare model."""
    payer: str = ""
    """By whom sessions take turns when not all steps fit into a batch."""
    priority: int = 0
    """Steps of a lower number go first."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """Activations ``[rows, tokens, hidden]`` for positions ``position .. position + tokens``.

    The session's state machine has already checked numbers, positions and shapes. The engine first
    cuts the cache to ``position``, then permutes its rows by ``row_order`` (if not empty), then
    computes. ``output_tokens`` trailing positions are returned.
    """

    activations: WireTensor
    position: int
    output_tokens: int
    row_order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Activations ``[rows, output_tokens, hidden]`` in the session's wire dtype, encoding RAW."""

    activations: WireTensor
    queue_us: int
    compute_us: int


@dataclass(frozen=True, slots=True)
class CacheRegion:
    """Keys and values of blocks ``[first_block, end_block)`` at positions ``[first, end)``."""

    first_block: int
    end_block: int
    first_position: int
    end_position: int


@dataclass(frozen=True, slots=True)
class CacheState:
    """What makes sense of a cache's keys and values.

    ``left_padding`` has one count per row, in the present order of the rows.
    """

    length: int
    left_padding: tuple[int, ...]


class SessionCache(Protocol):
    """The reserved cache of one session."""

    def close(self) -> None:
        """Free the reservation. Steps still queued are dropped; a second call does nothing."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot for announcements, the terminal view and metrics."""

    cache_tokens_total: int
    """Tokens (one row) for which the whole span has room."""
    cache_tokens_free: int
    queued_steps: int
    busy_fraction: float
    """Share of the last 10 s in which the device worked, 0 to 1."""


class IncomingAdapter(Protocol):
    """An adapter for which there is room, tensor by tensor."""

    @property
    def wanted(self) -> Sequence[ModuleSpec]:
        """The modules of this engine's blocks."""

    async def load_module(self, module: ModuleSpec, tensors: Sequence[bytes | bytearray]) -> None:
        """Take the tensors of one module. Raises ProtocolError(ADAPTER_REFUSED)."""

    def finish(self) -> None:
        """Let sessions use it. Raises ProtocolError(ADAPTER_REFUSED) when modules are missing."""

    def abandon(self) -> None:
        """Give the room back; does nothing after :meth:`finish`."""


class Adapters(Protocol):
    """The adapters that an engine holds, for its blocks."""

    @property
    def adapter_ids(self) -> Sequence[bytes]:
        """What is loaded, the most recently used last."""

    def __contains__(self, adapter_id: bytes) -> bool: ...

    def admit(self, index: AdapterIndex) -> IncomingAdapter:
        """Make room for an adapter, where need be by evicting others that no session uses.

        Raises ProtocolError: ADAPTER_REFUSED when it does not fit the model, ADAPTER_NO_ROOM.
        """


class NoAdapters:
    """Of an engine that computes with none."""

    adapter_ids: Sequence[bytes] = ()

    def __contains__(self, adapter_id: bytes) -> bool:
        return False

    def admit(self, index: AdapterIndex) -> IncomingAdapter:
        raise ProtocolError(ErrorCode.ADAPTER_REFUSED, "this engine has no adapters")


class Engine(Protocol):
    """Blocks ``[first_block, end_block)`` of one model revision on one device."""

    @property
    def first_block(self) -> int: ...

    @property
    def end_block(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def maximum_step_tokens(self) -> int:
        """Most ``rows x tokens`` of one step: what keeps a long prompt from delaying others."""

    @property
    def load(self) -> EngineLoad: ...

    @property
    def adapters(self) -> Adapters: ...

    def reserve(self, request: CacheRequest) -> SessionCache:
        """Reserve the cache; never evicts another session.

        Raises ProtocolError: NO_CAPACITY, or ADAPTER_MISSING for an adapter that is not loaded.
        """

    async def step(self, cache: SessionCache, step: StepInput) -> StepOutput:
        """Run one step, batched with those of other sessions.

        Steps of one cache run in the order of the calls. Cancelling is safe before the step has
        started and otherwise waits for it. Raises ProtocolError when activations are not finite or
        beyond the model's limit: INPUT_NOT_FINITE for those that came, NOT_FINITE for the result.
        """

    def pieces(
        self, cache: SessionCache, first_position: int, end_position: int
    ) -> Sequence[CacheRegion]:
        """These positions of all the cache's blocks, in pieces for :meth:`export_region`.

        Each is quickly copied and fits into one message. They never overlap.
        """

    async def export_state(self, cache: SessionCache) -> CacheState:
        """Length and padding after the steps computed so far."""

    async def export_region(self, cache: SessionCache, region: CacheRegion) -> WireTensor:
        """A copy of the keys and values of a piece, in the cache's dtype.

        Its shape is the engine's business; an engine of the same model and dtype takes it as it is.
        Runs between two batches, so that steps are not delayed. Raises ProtocolError(BAD_POSITION)
        for positions that are not cached, BLOCKS_NOT_HOSTED for blocks that are not.
        """

    async def import_region(
        self, cache: SessionCache, region: CacheRegion, content: WireTensor
    ) -> None:
        """Write what another engine exported, bit for bit.

        Nothing of it counts before :meth:`import_state`. Raises ProtocolError, and then nothing
        changed: BAD_TENSOR when dtype or shape do not fit this cache, NOT_FINITE, BAD_POSITION for
        positions beyond the reservation, BLOCKS_NOT_HOSTED.
        """

    async def import_state(self, cache: SessionCache, state: CacheState) -> None:
        """Let the cache continue at ``state.length``; positions never imported are zeros.

        Raises ProtocolError(BAD_POSITION, BAD_FIELD) when it does not fit the reservation.
        """

    async def close(self) -> None:
        """Finish the running batch, drop the queue, free the device."""
