"""Which language a prompt is in, by py3langid's statistics of character sequences.

The library and its 4.6 MB model are on this computer; nothing is asked of anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True, slots=True)
class Identified:
    """The likeliest language (ISO 639, mostly two letters) and how sure that is, 0 to 1."""

    code: str
    probability: float


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify_language(text: str) -> Identified:
    """Takes a second the first time, and milliseconds afterwards."""
    code, probability = _identifier().classify(text)
    return Identified(str(code), float(probability))


def known_languages() -> frozenset[str]:
    """The codes that can be found at all."""
    return frozenset(map(str, _identifier().labels))
