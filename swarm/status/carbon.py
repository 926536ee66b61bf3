"""How much CO2 a kilowatt-hour stands for, by country; ``grid_factors.csv`` names its sources.

Yearly means of generation in the country. They are approximate, blind to the hour of the day and to
what a donor's own roof or contract delivers, and good enough to compare and to report.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

TABLE = "grid_factors.csv"


@dataclass(frozen=True, slots=True)
class GridFactor:
    """One row of the table."""

    country: str
    """ISO 3166-1 alpha-2."""
    grams_per_kwh: float
    """CO2 equivalent."""
    year: int
    source: str


class GridFactors:
    """The table."""

    def __init__(self, factors: Mapping[str, GridFactor]) -> None:
        self.factors = factors

    @classmethod
    def read(cls) -> GridFactors:
        """Read the table that comes with this package."""
        text = (files("swarm.status") / TABLE).read_text(encoding="utf-8")
        rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
        factors = (
            GridFactor(row["country"], float(row["grams_per_kwh"]), int(row["year"]), row["source"])
            for row in rows
        )
        return cls({factor.country: factor for factor in factors})

    def grams_per_kwh(self, country: str) -> float | None:
        """None for countries that the table lacks, and for nodes that declare none."""
        factor = self.factors.get(country)
        return None if factor is None else factor.grams_per_kwh
