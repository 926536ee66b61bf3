"""Adapters in the engine against PEFT on the whole model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.catalogue.adapter import AdapterFiles
from swarm.node.engine.api import CacheRequest, SessionCache
from swarm.node.engine.engine import SpanEngine
from swarm.protocol.errors import ErrorCode, ProtocolError
from swarm.protocol.tensors import DType
from tests.adapter_making import (
    ALL_LINEAR,
    ATTENTION,
    PHI3_LINEAR,
    make_adapter,
    peft_logits,
)
from tests.integration.engine.conftest import Chain, LoadChain, MakeTiny, TinyModel

SPANS = [(0, 2), (2, 6)]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits of size 2; another adapter's differ by more than 1, rounding alone by 3e-4."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


async def load(engine: SpanEngine, files: AdapterFiles) -> bytes:
    loading = engine.adapters.admit(files.index)
    for module in loading.wanted:
        await loading.load_module(module, files.read(module))
    loading.finish()
    return files.adapter_id


def open_session(
    chain: Chain, adapter_id: bytes, rows: int = 1, maximum_tokens: int = 64
) -> list[SessionCache]:
    return [
        engine.reserve(
            CacheRequest(
                engine.first_block,
                engine.end_block,
                rows,
                maximum_tokens,
                DType.FLOAT32,
                adapter_id=adapter_id,
            )
        )
        for engine in chain.engines
    ]


async def logits_in_steps(
    tiny: TinyModel, chain: Chain, caches: list[SessionCache], tokens: torch.Tensor, cut: int
) -> torch.Tensor:
    """A prompt of ``cut`` tokens, then one token at a time."""
    position, parts = 0, []
    for count in (cut, *([1] * (tokens.shape[1] - cut))):
        piece = tokens[:, position : position + count]
        parts.append(await chain.step(caches, tiny.embed(piece), position))
        position += count
    return tiny.head(torch.cat(parts, dim=1))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": list(ALL_LINEAR)}),
        ("llama_rope_scaled", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ("llama_rope_scaled", {"target_modules": list(ALL_LINEAR), "use_dora": True}),
        (
            "llama",
            {
                "target_modules": list(ALL_LINEAR),
                "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 7},
                "alpha_pattern": {"^model.layers.3.mlp.down_proj": 3, "k_proj": 16},
            },
        ),
        ("llama", {"target_modules": ["down_proj"], "layers_to_transform": [0, 3]}),
        ("llama", {"target_modules": r".*layers\.[24]\..*(q_proj|up_proj)"}),
        ("qwen2", {"target_modules": list(ALL_LINEAR), "use_dora": True}),
        ("qwen3", {"target_modules": ["k_proj", "up_proj"]}),
        ("phi3", {"target_modules": list(PHI3_LINEAR)}),
        ("gemma3", {"target_modules": list(ALL_LINEAR)}),
        ("mixtral", {"target_modules": list(ATTENTION)}),
    ],
)
async def test_same_logits_as_peft(
    make_tiny: MakeTiny, load_chain: LoadChain, tmp_path: Path, family: str, settings: Any
) -> None:
    tiny = make_tiny(family)
    adapted = make_adapter(tiny.model, tmp_path, **settings)
    tokens = torch.randint(3, 128, (1, 14), generator=torch.Generator().manual_seed(3))
    expected = peft_logits(adapted, tokens)
    assert not torch.allclose(expected, tiny.logits(tokens), rtol=1e-2, atol=1e-2)
    chain = load_chain(tiny, SPANS)
    files = AdapterFiles.open(tmp_path)
    for engine in chain.engines:
        adapter_id = await load(engine, files)
    caches = open_session(chain, adapter_id)
    found = await logits_in_steps(tiny, chain, caches, tokens, cut=9)
    assert_same(found, expected)
    await chain.close()


async def test_two_adapters_and_the_bare_model_in_one_batch(
    make_tiny: MakeTiny, load_chain: LoadChain, tmp_path: Path
) -> None:
    """Six sessions at different positions, of which two have the same adapter."""
    tiny = make_tiny("llama")
    models = [
        tiny.model,
        make_adapter(tiny.model, tmp_path / "one", seed=1),
        make_adapter(
            tiny.model, tmp_path / "two", seed=2, r=3, target_modules=["q_proj", "v_proj"]
        ),
        make_adapter(
            tiny.model, tmp_path / "three", seed=3, use_dora=True, target_modules=["down_proj"]
        ),
    ]
    chain = load_chain(tiny, SPANS)
    ids = [b""]
    for name in ("one", "two", "three"):
        files = AdapterFiles.open(tmp_path / name)
        ids += {await load(engine, files) for engine in chain.engines}
    reports: list[int] = []
    chain.engines[0].observe_batches(lambda report: reports.append(report.steps))
    users = [1, 0, 2, 1, 0, 3]
    dice = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 128, (1, 18 + each), generator=dice) for each in range(len(users))]
    sessions = [open_session(chain, ids[user]) for user in users]
    found = await asyncio.gather(
        *(
            logits_in_steps(tiny, chain, caches, tokens, cut=4 + index)
            for index, (caches, tokens) in enumerate(zip(sessions, prompts, strict=True))
        )
    )
    for user, tokens, logits in zip(users, prompts, found, strict=True):
        assert_same(logits, peft_logits(models[user], tokens))
    assert max(reports) == len(users)
    # Those that went on meeting were computed in one product, where none of them is a DoRA.
    assert all(engine._span.adapted.joint.used > 0 for engine in chain.engines)
    await chain.close()


async def test_rows_of_one_session_share_its_adapter(
    make_tiny: MakeTiny, load_chain: LoadChain, tmp_path: Path
) -> None:
    tiny = make_tiny("llama")
    adapted = make_adapter(tiny.model, tmp_path)
    chain = load_chain(tiny, [(0, 6)])
    adapter_id = await load(chain.engines[0], AdapterFiles.open(tmp_path))
    tokens = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(6))
    caches = open_session(chain, adapter_id, rows=3)
    found = await logits_in_steps(tiny, chain, caches, tokens, cut=10)
    assert_same(found, peft_logits(adapted, tokens))
    await chain.close()


async def test_a_missing_adapter_is_an_error(make_tiny: MakeTiny, load_chain: LoadChain) -> None:
    chain = load_chain(make_tiny("llama"), [(0, 2)])
    free = chain.engines[0].load.cache_tokens_free
    with pytest.raises(ProtocolError) as error:
        open_session(chain, bytes(32))
    assert error.value.code is ErrorCode.ADAPTER_MISSING
    assert chain.engines[0].load.cache_tokens_free == free
    await chain.close()


async def test_eviction_by_size_but_never_under_a_session(
    make_tiny: MakeTiny, load_chain: LoadChain, tmp_path: Path
) -> None:
    tiny = make_tiny("llama")
    files = []
    for seed in range(4):
        make_adapter(tiny.model, tmp_path / str(seed), seed=seed)
        files.append(AdapterFiles.open(tmp_path / str(seed)))
    engine = load_chain(tiny, [(0, 2)]).engines[0]
    size_bytes = engine.adapters.admit(files[0].index).size_bytes
    chain = load_chain(tiny, [(0, 2)], adapter_bytes=2 * size_bytes + 100)
    adapters = chain.engines[0].adapters
    first, second = [await load(chain.engines[0], each) for each in files[:2]]
    assert adapters.size_bytes == 2 * size_bytes
    (cache,) = open_session(chain, first)  # makes it the most recently used one, too
    third = await load(chain.engines[0], files[2])
    assert set(adapters.adapter_ids) == {first, third}
    open_session(chain, third)
    with pytest.raises(ProtocolError) as error:
        adapters.admit(files[3].index)
    assert error.value.code is ErrorCode.ADAPTER_NO_ROOM
    assert second not in adapters
    cache.close()
    await load(chain.engines[0], files[3])
    assert first not in adapters
    await chain.close()
    await engine.close()


async def test_refused_tensors(make_tiny: MakeTiny, load_chain: LoadChain, tmp_path: Path) -> None:
    tiny = make_tiny("llama")
    make_adapter(tiny.model, tmp_path / "adapter")
    files = AdapterFiles.open(tmp_path / "adapter")
    chain = load_chain(tiny, [(0, 2)])
    adapters = chain.engines[0].adapters
    loading = adapters.admit(files.index)
    module = loading.wanted[0]
    a, b = files.read(module)
    flipped = bytes([a[0] ^ 1]) + a[1:]
    for tensors in ([flipped, b], [a, b[:-4]], [a], [b, a]):
        with pytest.raises(ProtocolError) as error:
            await loading.load_module(module, tensors)
        assert error.value.code is ErrorCode.ADAPTER_REFUSED
    await loading.load_module(module, [a, b])
    with pytest.raises(ProtocolError):
        loading.finish()  # the other modules are missing
    loading.abandon()
    assert adapters.size_bytes == 0
    other = make_tiny("qwen3")
    make_adapter(other.model, tmp_path / "other")
    with pytest.raises(ProtocolError) as error:
        adapters.admit(AdapterFiles.open(tmp_path / "other").index)
    assert error.value.code is ErrorCode.ADAPTER_REFUSED
    await chain.close()


async def test_a_layer_past_its_hook_fails_the_batch(
    make_tiny: MakeTiny, load_chain: LoadChain, tmp_path: Path
) -> None:
    """Rather an error than the bare model's answer."""
    tiny = make_tiny("llama")
    make_adapter(tiny.model, tmp_path)
    chain = load_chain(tiny, [(0, 2)])
    adapter_id = await load(chain.engines[0], AdapterFiles.open(tmp_path))
    caches = open_session(chain, adapter_id)
    mlp = chain.engines[0]._span.layers[1].get_submodule("mlp")
    mlp.forward = lambda hidden: hidden
    with pytest.raises(ProtocolError) as error:
        await chain.step(caches, tiny.embed(torch.tensor([[5, 6]])), 0)
    assert error.value.code is ErrorCode.INTERNAL
    await chain.close()
