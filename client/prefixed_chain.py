"""A chain whose sessions begin with virtual tokens (prompt tuning).

They go out in front of the first step, and all positions after them are shifted; to the caller the
chain looks like one without them. Nodes see ordinary activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.client.remote_chain import RemoteChain
from swarm.pieces import join_tokens
from swarm.protocol.tensors import WireTensor
from swarm.routing import ChainPlan


@dataclass(frozen=True, slots=True)
class PromptPrefix:
    """Embeddings ``[1, virtual tokens, hidden]`` of virtual tokens."""

    embeddings: WireTensor

    @property
    def tokens(self) -> int:
        return self.embeddings.shape[1]

    def of_rows(self, rows: int) -> WireTensor:
        """The same for each row."""
        _, tokens, hidden = self.embeddings.shape
        data = bytes(self.embeddings.data) * rows
        return WireTensor(self.embeddings.dtype, (rows, tokens, hidden), data)


class PrefixedChain:
    """A ``RemoteChain`` on top of another."""

    def __init__(self, chain: RemoteChain, prefix: PromptPrefix) -> None:
        self._chain = chain
        self._prefix = prefix
        self._is_sent = False

    @property
    def plan(self) -> ChainPlan:
        return self._chain.plan

    @property
    def passes(self) -> int:
        return self._chain.passes

    async def step(
        self,
        activations: WireTensor,
        position: int,
        *,
        output_tokens: int,
        row_order: tuple[int, ...] = (),
    ) -> WireTensor:
        if self._is_sent:
            position += self._prefix.tokens
        else:
            rows, tokens, _ = activations.shape
            parts = [self._prefix.of_rows(rows), activations]
            activations = join_tokens(parts, self._prefix.tokens + tokens)
        result = await self._chain.step(
            activations, position, output_tokens=output_tokens, row_order=row_order
        )
        self._is_sent = True
        return result

    async def close(self) -> None:
        await self._chain.close()
