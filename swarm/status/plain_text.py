"""What may be shown of the texts that strangers declare: one line, and no network address."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

JOINERS = "\u200c\u200d"
"""Invisible, but Devanagari and other scripts are spelled with them."""
ADDRESS = re.compile(
    r"""
    /(?:ip4|ip6|ip6zone|dns|dns4|dns6|dnsaddr)/\S*        # a multiaddress
    | (?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])(?::\d+)?  # IPv4, with a port or without
    | \[?(?<![\w:])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:])\]?(?::\d+)?  # IPv6
    """,
    re.VERBOSE | re.IGNORECASE,
)
ELLIPSIS = "…"
COMMAND_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@+-]*")


@lru_cache(maxsize=1 << 16)
def plain_text(text: str, limit: int = 64) -> str:
    """``text`` in one line of at most ``limit`` characters, addresses left out.

    Control characters, overrides of the writing direction and unassigned characters are dropped.
    """
    kept = "".join(
        character
        for character in unicodedata.normalize("NFC", text)
        if character in JOINERS or unicodedata.category(character)[0] != "C" or character.isspace()
    )
    line = " ".join(kept.split())
    # Fullwidth digits and their kind read as an address too.
    folded = unicodedata.normalize("NFKC", line)
    if ADDRESS.search(folded):
        line = ADDRESS.sub(ELLIPSIS, folded)
    return line if len(line) <= limit else line[: limit - 1] + ELLIPSIS


def is_command_word(text: str) -> bool:
    """Whether ``text`` can stand in a command line that people copy, without quotes."""
    return COMMAND_WORD.fullmatch(text) is not None
