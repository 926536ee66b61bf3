"""A tokenizer that needs no files of anybody: each letter is a token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = " abcdefghijklmnopqrstuvwxyz?"


def save_letters_tokenizer(folder: Path) -> None:
    """Beside a model whose vocabulary has at least ``len(LETTERS)`` tokens."""
    letters = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(LETTERS)}, "?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
