"""Greedy generations through a swarm whose every token and moment is written down.

``Watched`` holds one client and the model's ends on a background event loop, so that plain
asynchronous generation and transformers' ``generate`` (prompt lookup) run side by side.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from scripts.faults.answers import Session, Task
from scripts.faults.progress import Event, Listener, WatchedChains, WatchedNetwork
from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import Network, SwarmClient
from swarm.client.background import BackgroundLoop
from swarm.client.config import SamplingSettings
from swarm.client.ends import ModelEnds, read_generation_config, remote_blocks
from swarm.client.generate import LocalModel, TextSession, stream_generate
from swarm.client.metrics import ClientMetrics
from swarm.client.model import SwarmModelForCausalLM
from swarm.protocol.identity import Identity

if TYPE_CHECKING:
    from swarm.hivemind_network import HivemindNetwork

DTYPE = "float32"
PARAGRAPH = (
    "The cooperative met on the first Monday of each month in the school by the river. Members "
    "brought figures on milk, maize and repairs, and the treasurer read them out while children "
    "played outside. In dry years they argued about the pump; in wet years about the road. "
)
LOOKUP_TOKENS = 8
HEALS = re.compile(r"^swarm_client_healing_seconds_count (\S+)$", re.MULTILINE)


def make_tasks(model: Path, lengths: Sequence[int], new_tokens: int) -> list[Task]:
    """Prompts of so many tokens with the answers of ``transformers.generate`` in this process."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    whole.generation_config.eos_token_id = None  # answers have the length that was asked for
    tasks = []
    for length in lengths:
        repeated = PARAGRAPH * (1 + length // 40)
        prompt = tokenizer(f"Lesson {length}. {repeated}")["input_ids"][:length]
        inputs = torch.tensor([prompt])
        with torch.inference_mode():
            output = whole.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=new_tokens,
            )
        answer = tuple(output[0, length:].tolist())
        tasks.append(Task(tuple(prompt), answer))
    return tasks


class Watched:
    """One client of a swarm whose network tells ``listener`` of everything."""

    def __init__(self, model: Path, background: BackgroundLoop, listener: Listener) -> None:
        """Reads the ends of the model; ``connect`` joins a swarm."""
        self.metrics = ClientMetrics()
        self._listener = listener
        self._background = background
        self._checkpoint = Checkpoint.open(model)
        self._ends = ModelEnds.load(self._checkpoint, dtype=DTYPE)
        self._blocks_of = partial(
            remote_blocks, checkpoint=self._checkpoint, ends=self._ends, dtype=DTYPE
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        self._local = LocalModel(self._ends, self._blocks_of, tokenizer, frozenset())
        self._folder = tempfile.TemporaryDirectory(prefix="swarm-chaos-")
        self.client: SwarmClient | None = None
        self._network: HivemindNetwork | None = None

    async def connect(self, peers: Sequence[str], listen_ip: str = "127.0.0.1") -> None:
        """Join the swarm. Raises NetworkError."""
        # hivemind takes seconds to import, which --help need not wait for.
        from swarm.hivemind_network import HivemindNetwork, NetworkSettings

        key = Path(self._folder.name) / "client.key"
        Identity.load_or_create(key)
        network = await HivemindNetwork.create(
            key,
            NetworkSettings(
                listen_addresses=(f"/ip4/{listen_ip}/tcp/0",),
                initial_peers=tuple(peers),
                serve_directory=False,
            ),
        )
        self._network = network
        self.client = self._new_client(network)

    async def forget(self) -> None:
        """Be a client that has not met any node: those that were slow are avoided for minutes."""
        if self.client is None or self._network is None:
            raise RuntimeError("connect first")
        await self.client.close()
        self.client = self._new_client(self._network)

    def _new_client(self, network: HivemindNetwork) -> SwarmClient:
        watched = cast(Network, WatchedNetwork(network, self._listener))
        return SwarmClient(watched, observer=self.metrics)

    @property
    def heals(self) -> int:
        """How often a chain of this client was made whole again."""
        return sum(int(float(count)) for count in HEALS.findall(self.metrics.text()))

    @property
    def token_bytes(self) -> int:
        """What the activations of one token weigh between two hops."""
        return self._checkpoint.hidden_size * torch.float32.itemsize

    async def close(self) -> None:
        """Leave the swarm."""
        if self.client is not None:
            await self.client.close()
        if self._network is not None:
            await self._network.close()
        self._local.close()
        self._folder.cleanup()

    def text_session(self, task: Task) -> TextSession:
        """A session that may outlive an error. Connect first."""
        if self.client is None:
            raise RuntimeError("connect first")
        return TextSession(self.client, self._local, len(task.prompt) + len(task.answer) + 1)

    async def run(self, task: Task, started: Callable[[Session], None] | None = None) -> Session:
        """One generation. An error ends up in the session; ``started`` sees it before it begins."""
        if self.client is None:
            raise RuntimeError("connect first")
        session = Session(task, WatchedChains(self.client, self._listener))
        if started is not None:
            started(session)
        generate = self._speculate if task.speculative else self._stream
        try:
            await generate(session)
        except asyncio.CancelledError as error:
            session.error = error  # it took too long; its tokens may still be right
            raise
        except Exception as error:  # whatever it is, it is what this session came to
            session.error = error
        finally:
            session.ended = True
        return session

    async def _stream(self, session: Session) -> None:
        settings = SamplingSettings(max_new_tokens=len(session.task.answer))
        prompt = list(session.task.prompt)
        async for piece in stream_generate(session.chains, self._local, prompt, settings):
            self._took(session, piece.token_ids)

    async def _speculate(self, session: Session) -> None:
        loop = asyncio.get_running_loop()
        generation_config = read_generation_config(self._checkpoint, self._ends.config)
        generation_config.eos_token_id = None
        model = SwarmModelForCausalLM(
            self._ends.config,
            self._ends,
            self._blocks_of(session.chains),
            self._background,
            generation_config=generation_config,
        )
        inputs = torch.tensor([session.task.prompt])
        new_tokens = len(session.task.answer)
        # The thread tells the loop of tokens: sessions and listeners belong to the loop.
        streamer = _Streamer(lambda tokens: loop.call_soon_threadsafe(self._took, session, tokens))
        try:
            await asyncio.to_thread(
                model.generate,
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=new_tokens,
                prompt_lookup_num_tokens=LOOKUP_TOKENS,
                streamer=streamer,
            )
        except asyncio.CancelledError:
            if session.chains.chain is not None:
                await session.chains.chain.close()  # which ends the thread, too
            raise

    def _took(self, session: Session, tokens: Sequence[int]) -> None:
        now_s = time.monotonic()
        for token in tokens:
            session.tokens.append(token)
            session.times_s.append(now_s)
            self._listener(Event("token"))


class _Streamer:
    """For ``generate``: passes on all tokens but the prompt's."""

    def __init__(self, took: Callable[[list[int]], Any]) -> None:
        self._took = took
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._took([int(token) for token in value.flatten()])
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to flush."""
