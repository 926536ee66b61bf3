"""The blocks of a swarm as one function of torch's autograd, for losses of one's own.

::

    with TrainableSwarmModel.from_swarm(path, peers=[...], rank=8) as model:
        logits = model(token_ids)            # [rows, tokens] -> [rows, tokens, vocabulary]
        my_loss(logits).backward()           # gradients reach the adapter, far away ...
        model.optimizer_step(1e-3)           # ... which changes now

Embeddings given by the caller (``model.blocks``) get gradients too. The adapter lives on the nodes;
``export_adapter`` fetches it. A node that dies ends the session with an error: trainings that must
survive that use ``trainer``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from swarm.catalogue.checkpoint import Checkpoint
from swarm.catalogue.resolve import resolve_checkpoint
from swarm.client.app import SwarmClient
from swarm.client.background import BackgroundLoop
from swarm.client.config import ClientSettings
from swarm.client.finetune.adapter_files import write_adapter
from swarm.client.finetune.chain import TrainingChain
from swarm.client.finetune.ends import TrainingEnds
from swarm.client.finetune.model import BaseModel, base_model, chain_request
from swarm.client.finetune.settings import FinetuneSettings
from swarm.compute.wire_tensors import tensor_from_wire, tensor_to_wire


class RemoteBlocks(torch.autograd.Function):
    """Forward and backward through a training chain."""

    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, lengths: tuple[int, ...], session: _Session
    ) -> torch.Tensor:
        """``hidden`` ``[1, sum(lengths), hidden]``; same shape."""
        context.number = session.next_number()
        context.session = session
        context.is_done = [False]
        output = session.forward(context.number, hidden, lengths, needs_gradient=True)
        # Only now: nodes know nothing of a micro-batch that could not be sent.
        weakref.finalize(context, _forget_if_unused, session, context.number, context.is_done)
        return output

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the inputs; the adapter's stay on the nodes, added up."""
        context.is_done[0] = True
        session: _Session = context.session
        return session.backward(context.number, gradients[0]), None, None


def _forget_if_unused(session: _Session, number: int, is_done: list[bool]) -> None:
    """Nobody will ask for this gradient any more."""
    if not is_done[0]:
        session.forget(number)


class _Session:
    """A training chain for synchronous programs."""

    def __init__(self, chain: TrainingChain, background: BackgroundLoop, base: BaseModel) -> None:
        self.chain = chain
        self._background = background
        self._base = base
        self._number = 0
        self.step = 0
        self.returned = 0

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def forward(
        self, number: int, hidden: torch.Tensor, lengths: Sequence[int], *, needs_gradient: bool
    ) -> torch.Tensor:
        wire = tensor_to_wire(hidden, self._base.wire_dtype)
        output = self._background.run(
            self.chain.forward(number, lengths, wire, needs_gradient=needs_gradient)
        )
        return tensor_from_wire(output, hidden.dtype)

    def backward(self, number: int, gradient: torch.Tensor) -> torch.Tensor:
        wire = tensor_to_wire(gradient, self._base.wire_dtype)
        into_inputs = self._background.run(self.chain.backward(number, wire))
        self.returned += 1
        return tensor_from_wire(into_inputs, gradient.dtype)

    def forget(self, number: int) -> None:
        self._background.submit(self.chain.forget(number))

    def optimizer_step(self, rate: float, maximum_norm: float) -> float:
        self.step += 1
        norm, _ = self._background.run(
            self.chain.optimizer_step(
                self.step, self.returned, learning_rate=rate, maximum_norm=maximum_norm
            )
        )
        self.returned = 0
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        self._background.run(self.chain.audited())
        state = self._background.run(self.chain.export_state(self.step))
        return {name: tensor_from_wire(wire).reshape(-1) for name, wire in state.items()}


class TrainableSwarmModel:
    """A causal language model with frozen blocks far away and an adapter that learns there."""

    def __init__(
        self,
        ends: TrainingEnds,
        base: BaseModel,
        settings: FinetuneSettings,
        client: SwarmClient,
        background: BackgroundLoop,
        *,
        maximum_tokens: int,
        owns_client: bool = False,
    ) -> None:
        """Opens the session. Raises NoRouteError when the swarm cannot serve it now."""
        self._ends = ends
        self._base = base
        self._settings = settings
        self._client = client
        self._background = background
        self._owns_client = owns_client
        self._session = _Session(
            background.run(
                client.open_training(
                    chain_request(base, settings, maximum_tokens),
                    dtype=base.node_dtype,
                    model_name=base.name,
                )
            ),
            background,
            base,
        )

    @classmethod
    def from_swarm(
        cls,
        model: str | Path,
        *,
        peers: Sequence[str],
        maximum_tokens: int = 4096,
        dtype: str = "auto",
        **settings: Any,
    ) -> TrainableSwarmModel:
        """Join a swarm; ``settings`` are fields of :class:`FinetuneSettings`.

        ``maximum_tokens`` is the room for one forward pass, all rows together.
        """
        finetune = FinetuneSettings(**settings)
        checkpoint = Checkpoint.open(resolve_checkpoint(str(model)))
        ends = TrainingEnds.load(checkpoint)
        background = BackgroundLoop()
        try:
            client = background.run(
                SwarmClient.connect(ClientSettings(peers=tuple(peers), dtype=dtype))
            )
            try:
                return cls(
                    ends,
                    base_model(checkpoint, dtype),
                    finetune,
                    client,
                    background,
                    maximum_tokens=maximum_tokens,
                    owns_client=True,
                )
            except BaseException:
                background.run(client.close())
                raise
        except BaseException:
            background.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session, and leave the swarm if this object joined it."""
        self._background.run(self._session.chain.close())
        if self._owns_client:
            self._background.run(self._client.close())
            self._background.close()

    @property
    def chain(self) -> TrainingChain:
        """The session, for what it can tell of its hops."""
        return self._session.chain

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``[rows, tokens]`` to ``[rows, tokens, hidden]``."""
        return self._ends.embed(token_ids.reshape(-1)).view(*token_ids.shape, -1)

    def blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, tokens, hidden]`` through all blocks; every row is a sequence of its own."""
        rows, tokens, size = hidden.shape
        flat = hidden.reshape(1, rows * tokens, size)
        lengths = (tokens,) * rows
        if not torch.is_grad_enabled():
            number = self._session.next_number()
            output = self._session.forward(number, flat, lengths, needs_gradient=False)
            return output.view(rows, tokens, size)
        if not flat.requires_grad:
            # The adapter wants its gradient also when the embeddings do not.
            flat = flat.detach().requires_grad_()
        result: torch.Tensor = RemoteBlocks.apply(flat, lengths, self._session)  # type: ignore[no-untyped-call]
        return result.view(rows, tokens, size)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, tokens, hidden]`` out of the last block to ``[rows, tokens, vocabulary]``."""
        return self._ends.logits(hidden)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.logits(self.blocks(self.embed(token_ids)))

    def optimizer_step(self, learning_rate: float, *, maximum_norm: float = 0.0) -> float:
        """Let all hops change the adapter; returns the gradients' global norm before clipping."""
        return self._session.optimizer_step(learning_rate, maximum_norm)

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Adapter and optimizer as they are now, flat, by the names of a snapshot."""
        return self._session.state()

    def export_adapter(self, folder: str | Path) -> None:
        """Write the adapter as it is now, in PEFT's format."""
        write_adapter(
            Path(folder),
            self._session.state(),
            self._settings,
            model_name=self._base.name,
            model_type=self._base.model_type,
            model_revision=self._base.revision,
            model_config=self._ends.config,
        )
