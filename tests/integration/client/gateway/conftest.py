"""A gateway on a port of loopback, in front of a tiny model whose blocks are in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swarm.client.adapter_push import AdapterSource
from swarm.client.gateway.keys import KeyFile, make_key
from swarm.client.gateway.process import Listening, serve
from swarm.client.gateway.settings import GatewaySettings
from swarm.client.gateway.shelf import ServedModel
from swarm.client.generate import LocalModel
from swarm.client.grants import OperatorGrants
from swarm.client.metrics import ClientMetrics
from swarm.protocol.identity import Identity
from swarm.protocol.policy import Policy
from swarm.protocol.records import NodeRecord, NodeState
from swarm.protocol.tensors import DType, WireTensor

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' and loop.first %}{{ raise_exception(m['content']) }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BLOCKS = 3
SPECIAL = ("<pad>", "<s>", "</s>")


def byte_tokenizer() -> Any:
    """One token per byte of UTF-8, as byte-level tokenizers write them, after three others."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = {"eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special_tokens
    )


class Gate:
    """Lets steps of chains through; closed, it holds them."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self.passes_left: int | None = None
        self.held = 0

    async def pass_through(self) -> None:
        if self.passes_left is not None:
            if self.passes_left == 0:
                self._open.clear()
            self.passes_left = max(0, self.passes_left - 1)
        self.held += 1
        await self._open.wait()
        self.held -= 1

    def close_after(self, passes: int) -> None:
        self.passes_left = passes

    def open(self) -> None:
        self.passes_left = None
        self._open.set()


class GatedChain:
    def __init__(self, chain: Any, gate: Gate) -> None:
        self._chain = chain
        self._gate = gate

    @property
    def plan(self) -> Any:
        return self._chain.plan

    @property
    def passes(self) -> int:
        return int(self._chain.passes)

    async def step(self, activations: WireTensor, position: int, **options: Any) -> WireTensor:
        await self._gate.pass_through()
        return await self._chain.step(activations, position, **options)  # type: ignore[no-any-return]

    async def close(self) -> None:
        await self._chain.close()


class TinySwarm:
    """The client's side of a swarm with one node."""

    def __init__(self, client: Any, gate: Gate) -> None:
        self.client = client
        self.gate = gate
        self.records = [_record()]
        self.policies: list[Policy] = []

    def under(self, policy: Policy | None, grants: OperatorGrants | None = None) -> TinySwarm:
        if policy is not None:
            self.policies.append(policy)
        return self

    def paid_by(self, account: Identity, budget: str = "") -> OperatorGrants | None:
        return None

    async def open_chain(self, request: Any, **options: Any) -> GatedChain:
        return GatedChain(await self.client.open_chain(request, **options), self.gate)

    async def nodes(self, model_revision: bytes) -> list[NodeRecord]:
        return self.records

    async def close(self) -> None:
        pass

    @property
    def open_sessions(self) -> int:
        return sum(not chain.closed for chain in self.client.chains)


def _record() -> NodeRecord:
    return NodeRecord(
        peer_id=Identity.generate().peer_id,
        model_name="tiny",
        model_revision=bytes(32),
        number_of_blocks=BLOCKS,
        shards=1,
        first_block=0,
        end_block=BLOCKS,
        state=NodeState.ONLINE,
        dtype=DType.FLOAT32,
        minimum_version=1,
        maximum_version=1,
        sequence=1,
        expires_unix_s=1060,
    )


@dataclass
class Running:
    """A gateway that answers."""

    url: str
    swarm: TinySwarm
    whole: Any
    model: LocalModel
    keys: KeyFile
    stop: asyncio.Event
    task: asyncio.Task[None]
    http: aiohttp.ClientSession
    key: str = ""
    clients: list[openai.AsyncOpenAI] = field(default_factory=list)

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        """The official client."""
        own: dict[str, Any] = {"api_key": self.key or "none", "max_retries": 0, **options}
        client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", **own)
        self.clients.append(client)
        return client

    async def metrics(self) -> dict[str, float]:
        async with self.http.get(f"{self.url}/metrics") as reply:
            lines = (await reply.text()).splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def post(self, path: str = "/v1/chat/completions", **options: Any) -> Any:
        """A request by hand; an async context manager."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= options.pop("headers", {})
        return self.http.post(self.url + path, headers=headers, **options)


RunGateway = Callable[..., Any]


@pytest.fixture
def run_gateway(make_swarm: Any, tmp_path: Path) -> RunGateway:
    """``async with run_gateway(**settings) as running``; at the end no session may be open."""

    @asynccontextmanager
    async def run(
        *,
        with_key: bool = True,
        key_limits: dict[str, Any] | None = None,
        adapters: dict[str, AdapterSource] | None = None,
        **changes: Any,
    ) -> AsyncIterator[Running]:
        shape = {"vocab_size": 259, "max_position_embeddings": 512, "num_hidden_layers": BLOCKS}
        tiny = make_swarm("llama", **shape)
        blocks = tiny.model._blocks
        model = LocalModel(
            tiny.model.ends,
            lambda client: replace(blocks, client=client),
            byte_tokenizer(),
            frozenset({2}),
        )
        swarm = TinySwarm(tiny.client, Gate())
        keys = KeyFile(tmp_path / "keys.json")
        text = ""
        if with_key:
            key, text = make_key("tests", **(key_limits or {}))
            keys.add(key)
        limits = {"key_requests_per_minute": 10**6, "key_tokens_per_minute": 10**9}
        settings = GatewaySettings(
            port=0, keys_file=keys.path, **{"key_answers": 64, **limits, **changes}
        )
        stop = asyncio.Event()
        listening: asyncio.Future[Listening] = asyncio.get_running_loop().create_future()
        served = ServedModel("tiny", model, swarm, adapters)
        task = asyncio.create_task(
            serve(settings, swarm, [served], ClientMetrics(), keys, listening.set_result, stop)
        )
        async with aiohttp.ClientSession() as http:

            def ended(_: object) -> None:
                if not listening.done():
                    listening.set_exception(RuntimeError("the gateway has ended"))

            task.add_done_callback(ended)
            running = Running(
                (await listening).url, swarm, tiny.whole, model, keys, stop, task, http, text
            )
            try:
                yield running
            finally:
                for client in running.clients:
                    await client.close()
                stop.set()
                await task
                served.close()
                model.close()
        assert swarm.open_sessions == 0

    return run


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="swarm")
    return caplog
