"""The decoder blocks of one model as a client sees them: far away, behind chains.

Both faces of the client open sessions here: ``model`` (transformers) and ``generate`` (async).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from swarm.client.adapter_push import AdapterSource
from swarm.client.hops import SessionRequest
from swarm.protocol.errors import UsageError
from swarm.protocol.messages import MAX_ROWS, MAX_TOKENS
from swarm.protocol.tensors import DType, WireTensor
from swarm.routing import ChainPlan


class RemoteChain(Protocol):
    """What is needed of a chain; ``client.chain.Chain`` is one."""

    @property
    def plan(self) -> ChainPlan: ...

    @property
    def passes(self) -> int: ...

    async def step(
        self,
        activations: WireTensor,
        position: int,
        *,
        output_tokens: int,
        row_order: tuple[int, ...] = (),
    ) -> WireTensor: ...

    async def close(self) -> None: ...


class ChainOpener(Protocol):
    """What is needed of a client; ``client.app.SwarmClient`` is one."""

    async def open_chain(
        self,
        request: SessionRequest,
        *,
        number_of_blocks: int,
        dtype: DType | None = None,
        model_name: str = "",
    ) -> RemoteChain: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RemoteBlocks:
    """All blocks of one model revision in one swarm."""

    client: ChainOpener
    model_name: str
    revision: bytes
    number_of_blocks: int
    hidden_size: int
    wire_dtype: DType
    node_dtype: DType | None = None
    """Only nodes that compute in this precision; None takes any."""
    adapter: AdapterSource | None = None
    """What the blocks compute with; None: the bare model."""

    def with_adapter(self, adapter: AdapterSource | None) -> RemoteBlocks:
        """The same blocks with another adapter."""
        return replace(self, adapter=adapter)

    async def open_chain(
        self, *, rows: int, maximum_tokens: int, left_padding: tuple[int, ...] = ()
    ) -> RemoteChain:
        """Open a session with room for ``rows x maximum_tokens``.

        Raises UsageError for what no node accepts and NoRouteError when the swarm cannot serve now.
        """
        if not 1 <= rows <= MAX_ROWS:
            raise UsageError(
                f"{rows} rows in one batch (prompts x beams); a session takes at most {MAX_ROWS}"
            )
        if not 1 <= maximum_tokens <= MAX_TOKENS:
            raise UsageError(f"a session cannot hold {maximum_tokens} tokens")
        return await self.client.open_chain(
            SessionRequest(
                model_revision=self.revision,
                hidden_size=self.hidden_size,
                rows=rows,
                maximum_tokens=maximum_tokens,
                wire_dtype=self.wire_dtype,
                left_padding=left_padding,
                adapter=self.adapter,
            ),
            number_of_blocks=self.number_of_blocks,
            dtype=self.node_dtype,
            model_name=self.model_name,
        )
