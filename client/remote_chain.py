"""What is needed of a chain by whoever generates text with it."""

from __future__ import annotations

from typing import Protocol

from swarm.protocol.tensors import WireTensor
from swarm.routing import ChainPlan


class RemoteChain(Protocol):
    """``client.chain.Chain`` is one."""

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
