from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.text_stream import MAXIMUM_HELD_TOKENS, IncrementalDetokenizer, StopStrings


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are single bytes."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def decode_words(token_ids: Sequence[int]) -> str:
    """A tokenizer that drops the space before the first word, as sentencepiece does."""
    return "".join(f" w{token}" for token in token_ids).removeprefix(" ")


@given(st.text())
def test_pieces_join_to_the_text(text: str) -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.finish() == text
    assert text.count("�") == "".join(pieces).count("�") or "�" in text


def test_a_character_is_never_split() -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)
    pieces = [detokenizer.add(byte) for byte in "aé🌍".encode()]
    assert pieces == ["a", "", "é", "", "", "", "🌍"]


def test_spaces_between_words_are_kept() -> None:
    detokenizer = IncrementalDetokenizer(decode_words)
    pieces = [detokenizer.add(token) for token in range(20)]
    assert "".join(pieces) == decode_words(range(20))
    assert all(pieces)


def test_broken_characters_come_at_last() -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)
    pieces = [detokenizer.add(0xFF) for _ in range(MAXIMUM_HELD_TOKENS + 1)]
    assert "".join(pieces) == "�" * MAXIMUM_HELD_TOKENS
    assert detokenizer.finish() == "�"


@pytest.mark.parametrize("pieces", [["one STOP two"], ["one ST", "OP two"], list("one STOP two")])
def test_stop_string_ends_the_text(pieces: list[str]) -> None:
    stop = StopStrings(["STOP", "unused"])
    assert "".join(map(stop.add, pieces)) + stop.finish() == "one "
    assert stop.stopped


def test_the_earliest_stop_string_counts() -> None:
    stop = StopStrings(["two", "one"])
    assert stop.add("zero one two") == "zero "


def test_what_only_began_like_a_stop_string_is_shown() -> None:
    stop = StopStrings(["</end>"])
    assert stop.add("a </en") == "a "
    assert stop.add("try> b </") == "</entry> b "
    assert stop.finish() == "</"
    assert not stop.stopped


@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=4)))
def test_stops_where_the_whole_text_would(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    end = min([text.find(stop) for stop in stops if stop in text], default=None)
    shown = ""
    stream = StopStrings(stops)
    for piece in pieces:
        shown += stream.add(piece)
        if stream.stopped:
            break
    shown += stream.finish()
    assert stream.stopped == (end is not None)
    # Pieces may complete a later but shorter stop string first; nothing beyond a stop is shown.
    assert text.startswith(shown)
    assert shown == text if end is None else not any(stop in shown for stop in stops)
