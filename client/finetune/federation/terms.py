"""What a federation agrees on before its first round. Pure; free of torch.

The aggregator writes the terms once and everybody reads them: model, recipe, who is invited, how
many rounds. They come from a stranger as far as a participant is concerned, so all is bounded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from swarm.client.finetune.secure_sum import threshold_of
from swarm.client.finetune.settings import FinetuneSettings
from swarm.protocol.bounded_json import parse_json
from swarm.protocol.errors import ErrorCode, ProtocolError, UsageError
from swarm.protocol.identity import PeerId, public_key_from_peer_id
from swarm.protocol.messages import REVISION_BYTES

FEDERATION_ID_BYTES = 16
MAX_INVITED = 100
MAX_ROUNDS = 10_000
MAX_TERMS_BYTES = 64 * 1024
LONGEST_PHASE_S = 30 * 24 * 3600.0
METHODS = ("lora", "dora")
"""Those whose adapter lies at the blocks: the aggregator can begin it without embeddings."""

_LARGEST: dict[str, float] = {
    "rank": 1024,
    "alpha": 1e6,
    "virtual_tokens": 1024,
    "epochs": 1000,
    "steps": 10_000_000,
    "warmup_steps": 10_000_000,
    "batch_size": 65_536,
    "micro_batch_tokens": 65_536,
    "max_length": 1 << 20,
}
_MAX_MODULES = 64


@dataclass(frozen=True, slots=True)
class FederationTerms:
    """One federation. Raises UsageError for terms that make no sense."""

    federation_id: bytes
    aggregator: PeerId
    """Whose key signs the answers."""
    model: str
    """As its owner calls it; ``model_revision`` decides."""
    model_revision: bytes
    recipe: FinetuneSettings
    """How everybody trains in a round."""
    invited: tuple[PeerId, ...]
    rounds: int
    minimum: int
    """A sum of fewer is never taken."""
    train_s: float
    """How long a round waits for those who train."""
    answer_s: float
    """How long each message after that may take."""

    def __post_init__(self) -> None:
        for is_right, text in (
            (len(self.federation_id) == FEDERATION_ID_BYTES, "a federation's id has 16 bytes"),
            (len(self.model_revision) == REVISION_BYTES, "the model's revision is missing"),
            (0 < len(self.model) <= 256, "the model needs a name of at most 256 characters"),
            (self.recipe.method in METHODS, f"federations train {' or '.join(METHODS)}"),
            (bool(self.recipe.target_modules), "the recipe names no modules"),
            (2 <= len(self.invited) <= MAX_INVITED, f"2 to {MAX_INVITED} have to be invited"),
            (len(set(self.invited)) == len(self.invited), "somebody is invited twice"),
            (1 <= self.rounds <= MAX_ROUNDS, f"1 to {MAX_ROUNDS} rounds"),
            (
                2 <= self.minimum <= len(self.invited),
                "the minimum is at least 2, and at most all who are invited",
            ),
            (0 < self.train_s <= LONGEST_PHASE_S, "training may take up to 30 days a round"),
            (0 < self.answer_s <= LONGEST_PHASE_S, "answers may take up to 30 days"),
        ):
            if not is_right:
                raise UsageError(text)
        for peer in (self.aggregator, *self.invited):
            try:
                public_key_from_peer_id(peer)
            except ProtocolError as error:
                raise UsageError(f"{peer[:80]!r} is no peer id") from error

    def round_settings(self, number: int) -> FinetuneSettings:
        """The recipe for round ``number``, from 1: every round has an order of its own."""
        return replace(self.recipe, seed=(self.recipe.seed + number) % (1 << 53))

    def to_json(self) -> bytes:
        content = {
            "federation": self.federation_id.hex(),
            "aggregator": self.aggregator,
            "model": self.model,
            "model_revision": self.model_revision.hex(),
            "recipe": self.recipe.fingerprint(),
            "invited": list(self.invited),
            "rounds": self.rounds,
            "minimum": self.minimum,
            "train_s": self.train_s,
            "answer_s": self.answer_s,
        }
        return json.dumps(content, indent=2, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> FederationTerms:
        """Raises ProtocolError; unknown fields are ignored."""
        value = parse_json(data, maximum_bytes=MAX_TERMS_BYTES, maximum_depth=4)
        try:
            return cls(
                federation_id=bytes.fromhex(_typed(value["federation"], str)),
                aggregator=PeerId(_typed(value["aggregator"], str)),
                model=_typed(value["model"], str),
                model_revision=bytes.fromhex(_typed(value["model_revision"], str)),
                recipe=_recipe(_typed(value["recipe"], dict)),
                invited=tuple(PeerId(_typed(peer, str)) for peer in value["invited"]),
                rounds=_typed(value["rounds"], int),
                minimum=_typed(value["minimum"], int),
                train_s=_number(value["train_s"]),
                answer_s=_number(value["answer_s"]),
            )
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise ProtocolError(ErrorCode.BAD_FIELD, f"terms of a federation: {error}") from error


def default_minimum(invited: int) -> int:
    """More than half, and never one alone."""
    return max(2, threshold_of(invited))


def _recipe(value: dict[str, Any]) -> FinetuneSettings:
    """Exactly the fields of a recipe, each of the type that it has by default."""
    example = FinetuneSettings().fingerprint()
    if value.keys() != example.keys():
        raise ValueError("a recipe with other fields")
    for name, item in value.items():
        if name == "target_modules":
            if not isinstance(item, list) or len(item) > _MAX_MODULES:
                raise ValueError("target_modules")
            if not all(isinstance(one, str) and 0 < len(one) <= 128 for one in item):
                raise ValueError("target_modules")
        elif isinstance(example[name], str):
            _typed(item, str)
        elif name in ("alpha", "steps") and item is None:
            continue
        elif name == "alpha" or isinstance(example[name], float):
            _number(item)
        else:
            _typed(item, int)
        if name in _LARGEST and not 0 <= item <= _LARGEST[name]:
            raise ValueError(name)
    if not 0 <= value["dropout"] < 1 or value["micro_batch_tokens"] < 1:
        raise ValueError("dropout or micro_batch_tokens")
    return FinetuneSettings(**{**value, "target_modules": tuple(value["target_modules"])})


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float) or not isfinite(float(value)):  # type: ignore[arg-type]
        raise ValueError("expected a number")
    return float(value)  # type: ignore[arg-type]
