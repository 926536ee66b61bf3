"""Which blocks a node takes, by the memory that it may use and what the swarm lacks."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.block_vectors import PlacedNode
from swarm.catalogue.checkpoint import Checkpoint
from swarm.node.config import BlockSpan, NodeSettings
from swarm.node.engine.hosting import MINIMUM_CACHE_BYTES, OpenedModel, choose_blocks, load_blocks
from swarm.protocol.errors import CapacityError, ConfigError
from swarm.protocol.identity import PeerId
from swarm.protocol.tensors import DType

BLOCKS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Checkpoint.open(folder)


def opened(checkpoint: Checkpoint, usable_bytes: int) -> OpenedModel:
    return OpenedModel(checkpoint, torch.device("cpu"), torch.float32, usable_bytes)


def bytes_for(checkpoint: Checkpoint, blocks: int) -> int:
    return MINIMUM_CACHE_BYTES + blocks * checkpoint.block_bytes(0)


def test_everything_where_it_fits(checkpoint: Checkpoint) -> None:
    model = opened(checkpoint, 2**40)
    span = choose_blocks(model, NodeSettings(model="m"), [])
    assert span == BlockSpan(0, BLOCKS)
    assert model.wire_dtype is DType.FLOAT32


@pytest.mark.parametrize("blocks", range(1, BLOCKS + 1))
def test_as_many_blocks_as_fit_beside_the_smallest_cache(
    checkpoint: Checkpoint, blocks: int
) -> None:
    model = opened(checkpoint, bytes_for(checkpoint, blocks))
    assert len(choose_blocks(model, NodeSettings(model="m"), [])) == blocks
    with pytest.raises(CapacityError, match="fewer blocks"):
        choose_blocks(
            opened(checkpoint, bytes_for(checkpoint, blocks) - 1),
            NodeSettings(model="m", blocks=BlockSpan(0, blocks)),
            [],
        )


def test_where_the_swarm_is_weakest(checkpoint: Checkpoint) -> None:
    settings = NodeSettings(model="m", number_of_blocks=2)
    others = [PlacedNode(PeerId("a"), 0, 2, 100.0), PlacedNode(PeerId("b"), 0, 1, 100.0)]
    assert choose_blocks(opened(checkpoint, 2**40), settings, others) == BlockSpan(2, 4)


@pytest.mark.parametrize(
    "settings",
    [
        NodeSettings(model="m", blocks=BlockSpan(0, BLOCKS + 1)),
        NodeSettings(model="m", number_of_blocks=BLOCKS + 1),
    ],
)
def test_blocks_that_the_model_has_not(checkpoint: Checkpoint, settings: NodeSettings) -> None:
    with pytest.raises(ConfigError, match=str(BLOCKS)):
        choose_blocks(opened(checkpoint, 2**40), settings, [])


async def test_the_memory_that_was_allowed_bounds_the_cache(checkpoint: Checkpoint) -> None:
    memory_bytes = bytes_for(checkpoint, 1)
    settings = NodeSettings(model="m", memory_bytes=memory_bytes, threads=1)
    progress: list[tuple[int, int]] = []
    engine = load_blocks(
        opened(checkpoint, memory_bytes),
        settings,
        BlockSpan(1, 2),
        lambda loaded, total: progress.append((loaded, total)),
    )
    assert (engine.first_block, engine.end_block) == (1, 2)
    assert engine.describe()["cache_bytes"] <= MINIMUM_CACHE_BYTES
    assert progress == [(1, 1)]
    await engine.close()
