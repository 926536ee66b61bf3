"""Who takes part: models, computers, cities, countries and organisations, by a seed.

The proportions of hardware, countries and organisations are exact, only who is what is drawn:
small swarms of different seeds would otherwise differ by their luck with large cards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from swarm.placement import span_size
from swarm.protocol.identity import PeerId

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """A model as far as placement and routing see it."""

    number_of_blocks: int
    block_gb: float
    """Weights of a block in memory and on the wire."""
    cache_gb: float
    """What a block's share of the caches takes beside them."""


MODELS = {
    32: SimulatedModel(32, 0.45, 0.15),  # 8 B parameters, bfloat16
    80: SimulatedModel(80, 0.45, 0.12),  # 70 B, 4 bits
    126: SimulatedModel(126, 1.80, 0.45),  # 405 B, 4 bits
}


@dataclass(frozen=True, slots=True)
class Hardware:
    """A class of computers."""

    name: str
    share: float
    """Of all volunteers."""
    memory_gb: float
    bandwidth_gb_per_s: float
    """Weights are read once per token: it bounds decoding of one session."""
    batching: float
    """Speed at the batch that fills the memory / speed of one session."""


HARDWARE = (
    Hardware("CPU", 0.20, 14.0, 30.0, 2.5),
    Hardware("GPU 8 GB", 0.34, 7.0, 250.0, 8.0),
    Hardware("GPU 12 GB", 0.26, 11.0, 360.0, 8.0),
    Hardware("GPU 24 GB", 0.15, 22.0, 800.0, 10.0),
    Hardware("GPU 48 GB", 0.04, 45.0, 800.0, 12.0),
    Hardware("GPU 80 GB", 0.01, 76.0, 2500.0, 16.0),
)

CITIES = 8
COUNTRIES = (("AA", 0.30), ("BB", 0.22), ("CC", 0.16), ("DD", 0.12), ("EE", 0.10), ("FF", 0.10))
CITIES_OF_COUNTRY = {"AA": (0, 1), "BB": (2, 3), "CC": (4,), "DD": (5,), "EE": (6,), "FF": (7,)}
ORGANISATIONS = (
    ("org-0", 0.30),
    ("org-1", 0.15),
    ("org-2", 0.10),
    ("org-3", 0.08),
    ("org-4", 0.06),
    ("org-5", 0.04),
    ("org-6", 0.04),
    ("org-7", 0.03),
    ("", 0.20),
)
"""The largest owns 30 %; a fifth belongs to nobody."""
LABS = frozenset({"org-0", "org-1", "org-2"})
"""Run their computers longer and more evenly than volunteers."""


@dataclass(frozen=True, slots=True)
class Volunteer:
    """One computer and its owner."""

    peer_id: PeerId
    hardware: Hardware
    size: int
    """How many blocks it hosts."""
    speed_one_session: float
    """Tokens per second through one block."""
    speed: float
    """The same, batched."""
    download_s_per_block: float
    city: int
    country: str
    organisation: str

    @property
    def is_lab(self) -> bool:
        return self.organisation in LABS


def dice_of(seed: int, *purpose: str) -> random.Random:
    """Draws of their own for each purpose, so that a change in one leaves the others alone."""
    return random.Random("/".join((str(seed), *purpose)))  # noqa: S311


def draw_volunteers(count: int, model: SimulatedModel, dice: random.Random) -> list[Volunteer]:
    """``count`` volunteers for a model, in random order."""
    hardware = _in_proportion([(kind, kind.share) for kind in HARDWARE], count, dice)
    countries = _in_proportion(COUNTRIES, count, dice)
    organisations = _in_proportion(ORGANISATIONS, count, dice)
    volunteers = []
    for index in range(count):
        kind, country = hardware[index], countries[index]
        speed_one_session = kind.bandwidth_gb_per_s / model.block_gb * dice.uniform(0.8, 1.1)
        fitting = int(kind.memory_gb / (model.block_gb + model.cache_gb))
        megabit_per_s = dice.uniform(100.0, 300.0)
        volunteers.append(
            Volunteer(
                peer_id=PeerId(f"peer-{index:05}"),
                hardware=kind,
                size=min(span_size(fitting, speed_one_session), model.number_of_blocks),
                speed_one_session=speed_one_session,
                speed=speed_one_session * kind.batching,
                download_s_per_block=model.block_gb * 8000.0 / megabit_per_s,
                city=dice.choice(CITIES_OF_COUNTRY[country]),
                country=country,
                organisation=organisations[index],
            )
        )
    return volunteers


def draw_round_trips_s(dice: random.Random) -> list[list[float]]:
    """Between each two cities ``[city][city]``: 5 ms within one, up to 60 ms."""
    round_trips_s = [[0.005] * CITIES for _ in range(CITIES)]
    for one in range(CITIES):
        for other in range(one):
            round_trips_s[one][other] = round_trips_s[other][one] = dice.uniform(0.008, 0.060)
    return round_trips_s


def _in_proportion(shares: Sequence[tuple[T, float]], count: int, dice: random.Random) -> list[T]:
    """``count`` values in exactly these proportions (largest remainders), shuffled."""
    exact = [(value, share * count) for value, share in shares]
    values = [value for value, wanted in exact for _ in range(int(wanted))]
    by_remainder = sorted(exact, key=lambda pair: pair[1] % 1.0, reverse=True)
    values += [value for value, _ in by_remainder][: count - len(values)]
    dice.shuffle(values)
    return values
