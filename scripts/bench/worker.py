"""A process of the benchmark that generates: with local transformers, or as a client of a swarm.

    python -m scripts.bench.worker local MODEL DTYPE
    python -m scripts.bench.worker swarm MODEL DTYPE PEER

It reads one JSON command per line and answers each with one line. ``{"prompt": 16, "new": 64,
"sessions": 0}`` makes one greedy generation of exactly ``new`` tokens from a random prompt of
``prompt`` tokens through transformers' ``generate``, which is the same code for both kinds but for
the model. With ``sessions`` above 0 so many generations run at once, through the client's
asynchronous API. The answer holds, for each, ``first_s`` (time to first token) and ``decode_s``
(from the first token to the last), and ``total_s``, the time of all together.

``Worker`` is the other end, in the benchmark's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from scripts.local_swarm import LOOPBACK, Place, compute_environment
from scripts.process_keeper import KeptProcess
from swarm.catalogue.checkpoint import Checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST_PLAIN_TOKEN = 100  # ids below are often special


class WorkerError(Exception):
    """A worker ended or refused; its log says why."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What one command measured. ``first_s`` and ``decode_s`` have one entry per session."""

    new_tokens: int
    first_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    total_s: float

    @property
    def decode_rate(self) -> float:
        """Tokens per second of one session after its first token, the mean over the sessions."""
        seconds = sum(self.decode_s) / len(self.decode_s)
        return (self.new_tokens - 1) / seconds

    @property
    def aggregate_rate(self) -> float:
        """Tokens per second of all sessions together, from the first to the last of all."""
        return len(self.first_s) * self.new_tokens / self.total_s


class Worker:
    """A worker process. It loads its model on its own while others start."""

    def __init__(
        self,
        kind: str,
        model: Path,
        dtype: str,
        *,
        threads: int,
        log: Path,
        peer: str | None = None,
        place: Place = LOOPBACK,
    ) -> None:
        self._command = [*place.command_prefix, sys.executable, "-m", "scripts.bench.worker"]
        self._command += [kind, str(model), dtype, *([peer] if peer is not None else [])]
        # Local transformers is measured at its best: alone, with threads that spin as they like.
        self._thread_environment = (
            {"OMP_NUM_THREADS": str(threads)} if kind == "local" else compute_environment(threads)
        )
        self._log = log
        self._is_ready = False
        self._resources = ExitStack()

    def __enter__(self) -> Worker:
        log = self._resources.enter_context(self._log.open("wb"))
        self._process = self._resources.enter_context(
            KeptProcess(
                self._command,
                environment=os.environ
                | self._thread_environment
                | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
                folder=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._resources.close()

    def wait_until_ready(self) -> None:
        """Wait until its model is loaded. Raises WorkerError."""
        if not self._is_ready:
            self._answer()
            self._is_ready = True

    def generate(self, prompt_tokens: int, new_tokens: int, sessions: int = 0) -> Generation:
        """Have it generate; blocks until it is done. 0 sessions: one, by ``generate``.

        Raises WorkerError.
        """
        self.wait_until_ready()
        stdin = self._process.stdin
        if stdin is None:
            raise WorkerError("the worker has not started")
        command = {"prompt": prompt_tokens, "new": new_tokens, "sessions": sessions}
        stdin.write(json.dumps(command).encode() + b"\n")
        stdin.flush()
        answer = self._answer()
        return Generation(
            new_tokens, tuple(answer["first_s"]), tuple(answer["decode_s"]), answer["total_s"]
        )

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        line = stdout.readline() if stdout is not None else b""
        if not line:
            last_words = self._log.read_text(errors="replace").splitlines()[-15:]
            raise WorkerError("\n  ".join(["a benchmark process ended", *last_words]))
        answer: dict[str, Any] = json.loads(line)
        return answer


class TokenTimes:
    """A streamer for ``generate`` that notes when each token comes."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._prompt_seen = False

    def put(self, value: object) -> None:
        """Called once with the prompt and then with each token."""
        if self._prompt_seen:
            self.times_s.append(time.monotonic())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to flush."""


def random_prompt(vocabulary: int, tokens: int, number: int) -> list[int]:
    """Token ids that are the same in every process for the same arguments."""
    import random

    source = random.Random(f"{vocabulary}/{tokens}/{number}")
    return [source.randrange(FIRST_PLAIN_TOKEN, vocabulary) for _ in range(tokens)]


def generate_alone(model: Any, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """One greedy generation through transformers' ``generate``."""
    import torch

    prompt = torch.tensor([random_prompt(model.config.vocab_size, prompt_tokens, 0)])
    times = TokenTimes()
    started_s = time.monotonic()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=times,
    )
    return _measured(started_s, [times.times_s])


class ManySessions:
    """Concurrent generations of one swarm client, over the asynchronous API."""

    def __init__(self, model: Any, checkpoint_path: str, peers: Sequence[str], dtype: str) -> None:
        from swarm.client.app import SwarmClient
        from swarm.client.config import ClientSettings
        from swarm.client.ends import remote_blocks
        from swarm.client.generate import LocalModel

        checkpoint = Checkpoint.open(checkpoint_path)
        blocks_of = partial(remote_blocks, checkpoint=checkpoint, ends=model.ends, dtype=dtype)
        # Only numbers matter here, and no token ends a text before its time.
        self._model = LocalModel(model.ends, blocks_of, NumberTokenizer(), frozenset())
        self._vocabulary = model.config.vocab_size
        self._runner = asyncio.Runner()
        settings = ClientSettings(peers=tuple(peers), dtype=dtype)
        self._client = self._runner.run(SwarmClient.connect(settings))

    def generate(self, prompt_tokens: int, new_tokens: int, sessions: int) -> dict[str, Any]:
        """Run ``sessions`` generations at once."""
        return self._runner.run(self._generate(prompt_tokens, new_tokens, sessions))

    async def _generate(self, prompt_tokens: int, new_tokens: int, sessions: int) -> dict[str, Any]:
        from swarm.client.config import SamplingSettings
        from swarm.client.generate import stream_generate

        settings = SamplingSettings(max_new_tokens=new_tokens)

        async def one(number: int) -> list[float]:
            prompt = random_prompt(self._vocabulary, prompt_tokens, number)
            pieces = stream_generate(self._client, self._model, prompt, settings)
            return [time.monotonic() async for _ in pieces]

        started_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(number)) for number in range(sessions)]
        return _measured(started_s, [task.result() for task in running])

    def close(self) -> None:
        """Leave the swarm."""
        self._runner.run(self._client.close())
        self._runner.close()
        self._model.close()


class NumberTokenizer:
    """Stands in for a tokenizer, which a model of random weights has none of."""

    def decode(self, token_ids: Sequence[int], **_: object) -> str:
        return " ".join(map(str, token_ids))


def _measured(started_s: float, times_s: Sequence[Sequence[float]]) -> dict[str, Any]:
    return {
        "first_s": [times[0] - started_s for times in times_s],
        "decode_s": [times[-1] - times[0] for times in times_s],
        "total_s": max(times[-1] for times in times_s) - started_s,
    }


def serve(model: Any, many: ManySessions | None, answers: TextIO) -> None:
    """Answer commands until standard input ends."""
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        prompt, new, sessions = command["prompt"], command["new"], command["sessions"]
        if sessions == 0:
            answer = generate_alone(model, prompt, new)
        elif many is not None:
            answer = many.generate(prompt, new, sessions)
        else:
            raise ValueError("transformers alone has no concurrent sessions")
        print(json.dumps(answer), file=answers, flush=True)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import torch

    kind, path, dtype, *peers = arguments
    if kind == "local":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        serve(model, None, answers)
    else:
        from swarm.client import SwarmModelForCausalLM

        with (
            SwarmModelForCausalLM.from_swarm(path, peers=peers, dtype=dtype) as remote,
            contextlib.closing(ManySessions(remote, path, peers, dtype)) as many,
        ):
            serve(remote, many, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
