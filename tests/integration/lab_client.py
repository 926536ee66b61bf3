"""A program for test_behind_routers: a client that answers what it is asked on standard input.

``nodes`` prints who is announced, as a JSON object of display names and addresses; ``generate N``
the next ``N`` tokens, as a JSON list.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from swarm.catalogue.checkpoint import Checkpoint
from swarm.client.app import SwarmClient
from swarm.client.background import BackgroundLoop
from swarm.client.config import ClientSettings
from swarm.client.model import SwarmModelForCausalLM

PROMPT = (1, 5, 9, 13)


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
                case ["generate", count]:
                    tokens = model.generate(
                        torch.tensor([PROMPT]), max_new_tokens=int(count), do_sample=False
                    )
                    print(json.dumps(tokens[0].tolist()), flush=True)
    background.run(reader.close())
    background.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
