"""The models that a gateway serves, under the names that clients use."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from swarm.client.adapter_push import AdapterSource
from swarm.client.gateway.errors import ApiError
from swarm.client.generate import LocalModel
from swarm.client.remote_blocks import ChainOpener
from swarm.membership import coverage
from swarm.protocol.errors import SwarmError, UsageError
from swarm.protocol.identity import Identity
from swarm.protocol.policy import Policy
from swarm.protocol.records import NodeRecord

if TYPE_CHECKING:
    from swarm.client.grants import OperatorGrants

log = logging.getLogger(__name__)

LOOK_PERIOD_S = 10.0


class SwarmView(ChainOpener, Protocol):
    """What a gateway needs of a client; ``client.app.SwarmClient`` is one."""

    def under(self, policy: Policy | None, grants: OperatorGrants | None = None) -> ChainOpener:
        """With a policy beside its own, and another payer. Raises ConfigError when nothing
        satisfies both policies."""

    def paid_by(self, account: Identity, budget: str = "") -> OperatorGrants | None:
        """Allowances of another account; None where there is no operator."""

    async def nodes(self, model_revision: bytes) -> list[NodeRecord]: ...


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a model the swarm has."""

    nodes: int = 0
    fewest_replicas: int = 0
    """Of any block; 0: no answer is possible."""


class ServedModel:
    """One model with its own tokenizer thread: long prompts must not hold up the event loop."""

    def __init__(
        self,
        name: str,
        local: LocalModel,
        client: SwarmView,
        adapters: Mapping[str, AdapterSource] | None = None,
    ) -> None:
        blocks = local.blocks_of(client)
        self.name = name
        self.adapters = dict(adapters or {})
        self.local = local
        self.revision = blocks.revision
        self.number_of_blocks = blocks.number_of_blocks
        self.created_unix_s = int(time.time())
        self.coverage = Coverage()
        self._client = client
        # Its own copy: a fast tokenizer must not be used by two threads at a time.
        self._encoder = copy.copy(local)
        self._encoder.tokenizer = copy.deepcopy(local.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="swarm-tokenizer")

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return await self._encode(lambda: self._encoder.encode_chat(messages))

    async def encode(self, text: str) -> list[int]:
        return await self._encode(lambda: self._encoder.encode(text))

    def check_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Token ids that a client sent in place of text."""
        vocabulary = int(self.local.ends.config.vocab_size)
        if not all(0 <= token_id < vocabulary for token_id in token_ids):
            raise ApiError(
                400,
                f"token ids of this model are 0 to {vocabulary - 1}",
                code="invalid_value",
                param="prompt",
            )
        return list(token_ids)

    async def look(self) -> None:
        """Ask the directory who serves it now."""
        nodes = await self._client.nodes(self.revision)
        self.coverage = Coverage(len(nodes), min(coverage(nodes, self.number_of_blocks)))

    async def _encode(self, work: Any) -> list[int]:
        try:
            ids: list[int] = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except UsageError:
            raise
        except Exception as error:
            # Chat templates refuse conversations by exceptions of their own. Their text is the
            # model's, and may repeat what was said.
            log.info("a conversation was refused by the chat template: %s", type(error).__name__)
            raise ApiError(
                400, "the model's chat template refuses this conversation", code="invalid_value"
            ) from None
        return ids

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class Shelf:
    """All served models. ``watch`` keeps what is known of their nodes young."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    @property
    def models(self) -> list[ServedModel]:
        return list(self._models.values())

    @property
    def named(self) -> list[tuple[str, ServedModel]]:
        """All models, and each with each of its adapters."""
        return [
            (name, model)
            for model in self.models
            for name in (model.name, *(f"{model.name}@{adapter}" for adapter in model.adapters))
        ]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.named]

    def find(self, name: str) -> tuple[ServedModel, AdapterSource | None]:
        """A model, and the adapter of ``MODEL@ADAPTER``. Raises ApiError 404, as OpenAI does."""
        base, at, adapter = name.rpartition("@")
        model = self._models.get(name)
        if model is not None:
            return model, None
        model = self._models.get(base) if at else None
        if model is None or adapter not in model.adapters:
            served = ", ".join(self.names)
            raise ApiError(
                404,
                f"no such model; this gateway serves {served}",
                code="model_not_found",
                param="model",
            )
        return model, model.adapters[adapter]

    @property
    def any_complete(self) -> bool:
        return any(model.coverage.fewest_replicas > 0 for model in self.models)

    async def watch(self) -> None:
        """Look around until cancelled."""
        while True:
            for model in self.models:
                try:
                    await model.look()
                except SwarmError as error:
                    log.info("the directory does not answer: %s", error)
            complete = self.any_complete
            await asyncio.sleep(LOOK_PERIOD_S if complete else LOOK_PERIOD_S / 10)
