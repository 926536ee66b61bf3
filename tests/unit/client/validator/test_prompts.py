"""Sentences of a validator's texts are used once, wherever they stand and whoever restarts."""

from __future__ import annotations

import random
import re

import pytest

from swarm.client.validator.prompts import PrivateTexts
from swarm.protocol.errors import UsageError

NUMBERS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
TEXT = " ".join(f"This is the sentence with the number {number}." for number in NUMBERS)


def numbers_in(text: str) -> list[str]:
    return re.findall(r"with the number (\w+)", text)


def test_no_sentence_twice_also_after_a_restart_and_in_another_order() -> None:
    backwards = "\n\n".join(reversed(TEXT.split(". ")))
    used: set[bytes] = set()
    seen: list[str] = []
    for restart in range(3):
        texts = PrivateTexts([backwards if restart % 2 else TEXT], used)
        piece = texts.take(60, random.Random(restart))
        used.update(piece.digests)
        seen += numbers_in(piece.text)
    rest = PrivateTexts([TEXT], used)
    while rest.sentences_left:
        piece = rest.take(60, random.Random(9))
        used.update(piece.digests)
        seen += numbers_in(piece.text)
    assert sorted(seen) == sorted(NUMBERS)
    with pytest.raises(UsageError, match="were used"):
        PrivateTexts([TEXT], used)


def test_it_takes_until_nothing_is_left() -> None:
    texts = PrivateTexts([TEXT, TEXT.upper()], ())  # the same words count once
    assert texts.sentences_left == len(NUMBERS)
    piece = texts.take(10**6, random.Random(3))
    assert numbers_in(piece.text)
    while texts.sentences_left:
        texts.take(1, random.Random(4))
    with pytest.raises(UsageError, match="add more text"):
        texts.take(1, random.Random(5))


@pytest.mark.parametrize("text", ["", "Ok. No. 12345678901234567890. \n\n ---"])
def test_what_says_nothing_of_its_own_is_no_text(text: str) -> None:
    with pytest.raises(UsageError, match="no text"):
        PrivateTexts([text], ())


def test_texts_of_other_scripts_have_sentences_too() -> None:
    chinese = "人人生而自由在尊严和权利上一律平等。他们赋有理性和良心并应以兄弟关系的精神相对待。"
    hindi = (
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में स्वतन्त्रता प्राप्त है। "
        "उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है।"
    )
    assert PrivateTexts([chinese], ()).sentences_left == 2
    assert PrivateTexts([hindi], ()).sentences_left == 2
    long = "word " * 1000
    assert (
        max(len(PrivateTexts([long], ()).take(1, random.Random(n)).text) for n in range(3)) <= 1000
    )
