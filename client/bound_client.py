"""A client under the terms of whom it works for: a policy, a payer. A gateway has one per key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from swarm.client.hops import SessionRequest
from swarm.protocol.policy import Policy
from swarm.protocol.tensors import DType

if TYPE_CHECKING:
    from swarm.client.chain import Chain
    from swarm.client.grants import OperatorGrants


class _Opener(Protocol):
    """``client.app.SwarmClient``."""

    async def open_chain(
        self,
        request: SessionRequest,
        *,
        number_of_blocks: int,
        dtype: DType | None = None,
        model_name: str = "this model",
        grants: OperatorGrants | None = None,
    ) -> Chain: ...


@dataclass(frozen=True, slots=True)
class BoundClient:
    """A client whose sessions keep a policy and are paid for; ``remote_blocks.ChainOpener``."""

    client: _Opener
    policy: Policy | None
    grants: OperatorGrants | None = None
    """Of the account that pays; None: whoever pays for the client's own sessions."""

    async def open_chain(
        self,
        request: SessionRequest,
        *,
        number_of_blocks: int,
        dtype: DType | None = None,
        model_name: str = "this model",
    ) -> Chain:
        """As the client's, under the terms. Raises AllowanceRefused as well."""
        return await self.client.open_chain(
            replace(request, policy=self.policy),
            number_of_blocks=number_of_blocks,
            dtype=dtype,
            model_name=model_name,
            grants=self.grants,
        )

    async def close(self) -> None:
        """The client goes on: others use it too."""
