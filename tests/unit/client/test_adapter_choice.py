"""``--adapter auto``: what is picked, and what the user is told."""

from __future__ import annotations

import pytest

from swarm.client.adapter_choice import OfferedAdapter, choose_adapter
from swarm.client.language import Identified, identify_language, known_languages

SWAHILI = OfferedAdapter("swahili-instruct", "swahili-instruct@00", ("sw",), (), 3)
SWAHILI_LAW = OfferedAdapter("sheria", "sheria@00", ("sw",), ("mahakama", "sheria"), 1)
HINDI = OfferedAdapter("hindi-chat", "hindi-chat@00", ("hi", "mr"), (), 2)
MEDICINE = OfferedAdapter("medicine", "medicine@00", (), ("fever", "dose"), 1)
ENGLISH_LAW = OfferedAdapter("law", "law@00", ("en",), ("court",), 1)
OFFERED = [SWAHILI, SWAHILI_LAW, HINDI, MEDICINE, ENGLISH_LAW]


@pytest.mark.parametrize(
    ("prompt", "name", "reason"),
    [
        ("Habari za asubuhi, unaweza kunisaidia kuandika barua?", "swahili-instruct", "in sw"),
        ("Nataka kujua sheria za mahakama ya ardhi nchini", "sheria", "and about mahakama, sheria"),
        ("आप कैसे हैं, क्या आप मेरी मदद कर सकते हैं?", "hindi-chat", "in hi"),
        ("What is the right dose for a child with a fever?", "medicine", "about fever, dose"),
        ("When may a court refuse to hear a witness?", "law", "in en"),
        ("How do I bake bread without an oven?", None, "no served adapter is for en"),
        ("Wie schreibe ich einen Brief an die Behörde?", None, "no served adapter is for de"),
        ("Hi", None, "not clear"),
    ],
)
def test_by_language_then_by_subject(prompt: str, name: str | None, reason: str) -> None:
    choice = choose_adapter(prompt, OFFERED, identify_language(prompt), known_languages())
    assert (choice.adapter.name if choice.adapter else None) == name
    assert reason in choice.reason


def test_without_adapters() -> None:
    choice = choose_adapter("Hello", [], Identified("en", 1.0), ["en"])
    assert choice.adapter is None
    assert "no adapter for this model" in choice.reason


def test_languages_that_cannot_be_found_are_named() -> None:
    offered = [OfferedAdapter("tumbuka", "tumbuka@00", ("tum",), (), 1)]
    choice = choose_adapter("Monire", offered, Identified("sn", 0.9), known_languages())
    assert choice.adapter is None
    assert "does not know tum" in choice.reason


def test_of_equals_the_one_with_more_holders() -> None:
    offered = [
        OfferedAdapter("a", "a@00", ("sw",), (), 1),
        OfferedAdapter("b", "b@00", ("sw",), (), 5),
    ]
    choice = choose_adapter("x", offered, Identified("sw", 0.9), ["sw"])
    assert choice.adapter is offered[1]


def test_an_unclear_language_is_no_language() -> None:
    assert choose_adapter("x", [SWAHILI], Identified("sw", 0.4), ["sw"]).adapter is None
