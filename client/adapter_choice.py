"""``--adapter auto``: which of the served adapters fits a prompt; pure.

The language comes first: an adapter for the prompt's language beats one that only knows its
subject. Subjects (*domains*) are words that the authors declare; an adapter that declares any is
for prompts that have one of them. Nothing is picked on a guess: without a clear language or a
subject in common the bare model answers, and the user is told.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from swarm.client.language import Identified

CLEAR = 0.5
"""Probability from which on a language counts as found. Shorter texts rarely reach it."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class OfferedAdapter:
    """An adapter for the model, as its manifest describes it."""

    name: str
    reference: str
    """``NAME@REVISION``: exactly this one."""
    languages: tuple[str, ...]
    """ISO 639 codes; empty: not said."""
    domains: tuple[str, ...]
    holders: int
    """How many peers can send it."""


@dataclass(frozen=True, slots=True)
class Choice:
    adapter: OfferedAdapter | None
    """None: the bare model."""
    reason: str
    """For the user, a part of a sentence."""


def choose_adapter(
    prompt: str,
    offered: Sequence[OfferedAdapter],
    language: Identified,
    known_languages: Collection[str],
) -> Choice:
    """The adapter to answer ``prompt`` with, and why.

    ``known_languages`` are those that the identification can find.
    """
    if not offered:
        return Choice(None, "no adapter for this model is served")
    is_clear = language.probability >= CLEAR
    said = f"{language.code} ({language.probability:.0%} sure)"
    words = frozenset(word.casefold() for word in _WORD.findall(prompt))

    def hits(adapter: OfferedAdapter) -> list[str]:
        return [domain for domain in adapter.domains if domain.casefold() in words]

    def rank(adapter: OfferedAdapter) -> tuple[int, int, str]:
        return -len(hits(adapter)), -adapter.holders, adapter.name

    def fits(adapter: OfferedAdapter) -> bool:
        return not adapter.domains or bool(hits(adapter))

    speaking = [
        each for each in offered if is_clear and language.code in each.languages and fits(each)
    ]
    if speaking:
        best = min(speaking, key=rank)
        reason = f"the prompt is in {said}"
        if found := hits(best):
            reason += f" and about {', '.join(found)}"
        return Choice(best, reason)
    # A subject alone must not pull a text into another language.
    silent = [each for each in offered if not each.languages and hits(each)]
    if silent:
        best = min(silent, key=rank)
        return Choice(best, f"the prompt is about {', '.join(hits(best))}")
    if not is_clear:
        return Choice(None, f"the prompt's language is not clear: perhaps {said}")
    unknown = sorted({code for each in offered for code in each.languages} - set(known_languages))
    reason = f"no served adapter is for {said} and this subject"
    if unknown:
        reason += f"; the identification does not know {', '.join(unknown)}: name such an adapter"
    return Choice(None, reason)
