"""A program for test_behind_routers: a client that answers what it is asked on standard input.

``nodes`` prints who is announced, as a JSON object of display names and addresses; ``generate N``
the next ``N`` tokens, as a JSON list; ``generate N until FILE`` as many as ``N``, and no more than
some once there is a file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.background import BackgroundLoop
from swarm.client.config import ClientSettings
from swarm.client.model import SwarmModelForCausalLM

PROMPT = (1, 5, 9, 13)
TOKENS_AFTERWARDS = 50


class AfterFile(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer so many tokens after a file appears."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._left = TOKENS_AFTERWARDS

    def __call__(self, input_ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        self._left -= self._file.exists()
        return torch.full((len(input_ids),), self._left <= 0)


def main(checkpoint: Path, peers: list[str]) -> None:
    revision = Checkpoint.open(checkpoint).revision
    background = BackgroundLoop()
    reader = background.run(SwarmClient.connect(ClientSettings(peers=tuple(peers))))
    with SwarmModelForCausalLM.from_swarm(str(checkpoint), peers=peers, dtype="float32") as model:
        print("ready", flush=True)
        for line in sys.stdin:
            match line.split():
                case ["nodes"]:
                    records = background.run(reader.nodes(revision))
                    answer = {record.display_name: record.addresses for record in records}
                    print(json.dumps(answer), flush=True)
                case ["generate", count, *until]:
                    criteria = [AfterFile(Path(file)) for file in until[1:]]
                    tokens = model.generate(
                        torch.tensor([PROMPT]),
                        max_new_tokens=int(count),
                        do_sample=False,
                        stopping_criteria=StoppingCriteriaList(criteria),
                    )
                    print(json.dumps(tokens[0].tolist()), flush=True)
    background.run(reader.close())
    background.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
