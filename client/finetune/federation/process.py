"""The life of an aggregator's process, and how a federation begins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from swarm.catalogue.adapter import AdapterFiles
from swarm.client.finetune.federation.files import DoneRound, FederationFiles, Tensors
from swarm.client.finetune.federation.rounds import Round
from swarm.client.finetune.federation.service import AggregatorService
from swarm.client.finetune.federation.terms import FederationTerms
from swarm.client.finetune.model import BaseModel, chain_request
from swarm.client.finetune.settings import FinetuneSettings
from swarm.client.finetune.trainer import ChainSource
from swarm.compute.lora import LORA_A, LORA_B, MAGNITUDE, tensor_name
from swarm.compute.wire_tensors import tensor_from_wire
from swarm.operator.app import serve
from swarm.protocol.errors import UsageError
from swarm.protocol.tensors import WireTensor
from swarm.virtual_time import LoopClock


@dataclass(frozen=True, slots=True)
class Beginning:
    """What the first round begins with."""

    adapter: Tensors
    model: str
    model_revision: bytes
    recipe: FinetuneSettings


async def new_beginning(
    open_chain: ChainSource, base: BaseModel, recipe: FinetuneSettings
) -> Beginning:
    """First values of an adapter, made by the nodes as for any training; nothing is trained."""
    shape = recipe.adapter_shape(base.model_type)
    chain = await open_chain(chain_request(base, recipe, recipe.micro_batch_tokens))
    try:
        state = await chain.export_state(0)
    finally:
        await chain.close()
    tensors = {
        name: tensor_from_wire(wire, torch.float32).reshape(-1)
        for name, wire in state.items()
        if "#" not in name
    }
    recipe = replace(recipe, target_modules=shape.target_modules)
    return Beginning(tensors, base.name, base.revision, recipe)


def beginning_of(folder: Path, recipe: FinetuneSettings) -> Beginning:
    """An adapter in PEFT's format; its rank, alpha and modules win over the recipe's.

    Raises AdapterError, UsageError for adapters whose modules have different ranks or scales.
    """
    files = AdapterFiles.open(folder)
    config = files.config
    if config.rank_pattern or config.alpha_pattern or config.use_rslora:
        raise UsageError("a common adapter has one rank and one alpha for all modules")
    if not config.target_modules:
        raise UsageError(f"{folder} names its modules by a pattern; list them instead")
    if not files.model_revision:
        raise UsageError(f"{folder} does not say for which model; use one by swarm finetune")
    tensors = {}
    for module in files.index.modules:
        parts = (LORA_A, LORA_B, MAGNITUDE)[: len(module.tensors)]
        for part, spec, data in zip(parts, module.tensors, files.read(module), strict=True):
            wire = WireTensor(spec.dtype, spec.shape, data)
            name = tensor_name(module.block, module.name, part)
            tensors[name] = tensor_from_wire(wire, torch.float32).reshape(-1)
    recipe = replace(
        recipe,
        method="dora" if config.use_dora else "lora",
        rank=config.rank,
        alpha=config.alpha,
        target_modules=tuple(sorted(config.target_modules)),
    )
    return Beginning(tensors, files.base_model or "model", files.model_revision, recipe)


async def run_aggregator(
    files: FederationFiles,
    host: str,
    port: int,
    *,
    ready: Callable[[str, FederationTerms], None],
    leaving: asyncio.Event,
    changed: Callable[[int, Round], None] | None = None,
    linger_s: float = 3600.0,
) -> tuple[DoneRound, ...]:
    """Serve until all rounds are over and everybody has the result, or until ``leaving``.

    Waits ``linger_s`` at most for those who have not fetched it. Raises UsageErrors, NoRouteError
    when a round fails again and again. Started again it goes on with the round in which it was.
    """
    service = AggregatorService(files, files.identity(), clock=LoopClock(), changed=changed)
    async with serve(service.application(), host, port) as url:
        ready(url, files.terms())
        try:
            rounds = asyncio.create_task(_until_fetched(service, linger_s))
            left = asyncio.create_task(leaving.wait())
            try:
                await asyncio.wait({rounds, left}, return_when=asyncio.FIRST_COMPLETED)
                if rounds.done():
                    rounds.result()
            finally:
                for task in (rounds, left):
                    task.cancel()
                await asyncio.gather(rounds, left, return_exceptions=True)
        finally:
            service.stop()
    return service.done


async def _until_fetched(service: AggregatorService, linger_s: float) -> None:
    await service.run()
    await service.collected(linger_s)
