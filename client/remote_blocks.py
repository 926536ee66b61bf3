"""The decoder blocks of one model as a client sees them: far away, behind chains.

Both faces of the client open sessions here: ``model`` (transformers) and ``generate`` (async).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from swarm.client.adapter_push import AdapterSource
from swarm.client.hops import SessionRequest
from swarm.client.prefixed_chain import PrefixedChain, PromptPrefix
from swarm.client.remote_chain import RemoteChain
from swarm.ledger.audit_rule import UNCALIBRATED, SpanLimits
from swarm.protocol.errors import UsageError
from swarm.protocol.messages import MAX_ROWS, MAX_TOKENS
from swarm.protocol.tensors import DType

SessionAdapter = AdapterSource | PromptPrefix
"""What the nodes add to their layers, or what the client sends ahead."""


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
    audit_limits: SpanLimits = UNCALIBRATED
    adapter: AdapterSource | None = None
    """What the blocks compute with; None: the bare model."""

    prefix: PromptPrefix | None = None
    """Virtual tokens in front of every session, in the wire dtype."""

    def with_adapter(self, adapter: SessionAdapter | None) -> RemoteBlocks:
        """The same blocks with another adapter."""
        if isinstance(adapter, PromptPrefix):
            from swarm.compute.wire_tensors import converted  # torch, which is there by now

            embeddings = converted(adapter.embeddings, self.wire_dtype)
            return replace(self, adapter=None, prefix=PromptPrefix(embeddings))
        return replace(self, adapter=adapter, prefix=None)

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
        prefix = self.prefix
        if prefix is not None:
            maximum_tokens += prefix.tokens
            if left_padding:
                raise UsageError("prompts of a batch must be equally long with a prompt adapter")
        chain = await self.client.open_chain(
            SessionRequest(
                model_revision=self.revision,
                hidden_size=self.hidden_size,
                rows=rows,
                maximum_tokens=maximum_tokens,
                wire_dtype=self.wire_dtype,
                left_padding=left_padding,
                audit_limits=self.audit_limits,
                adapter=self.adapter,
            ),
            number_of_blocks=self.number_of_blocks,
            dtype=self.node_dtype,
            model_name=self.model_name,
        )
        return chain if prefix is None else PrefixedChain(chain, prefix)
