"""Token ids to text, piece by piece. Pure: the tokenizer comes in as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

CONTEXT_TOKENS = 6
"""Tokens before the new ones that are decoded along with them: spacing depends on neighbours."""

MAXIMUM_HELD_TOKENS = 16
"""After so many tokens an unfinished character is taken to be broken, and shown as such."""


class IncrementalDetokenizer:
    """Turns a growing list of token ids into text without repeating or splitting a character.

    A token may hold only some of the bytes of a character; text is held back until they are all
    there. Decoding a window instead of everything keeps the cost of a token constant.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._token_ids: list[int] = []
        self._window_start = 0
        self._shown_end = 0

    def add(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""
        self._token_ids.append(token_id)
        return self._take(flush=len(self._token_ids) - self._shown_end >= MAXIMUM_HELD_TOKENS)

    def finish(self) -> str:
        """What is left at the end, broken characters included."""
        return self._take(flush=True)

    def _take(self, *, flush: bool) -> str:
        shown = self._decode(self._token_ids[self._window_start : self._shown_end])
        text = self._decode(self._token_ids[self._window_start :])
        if not flush and (text.endswith(REPLACEMENT) or len(text) <= len(shown)):
            return ""
        self._shown_end = len(self._token_ids)
        self._window_start = max(self._window_start, self._shown_end - CONTEXT_TOKENS)
        return text[len(shown) :]


class StopStrings:
    """Holds text back while it could be the beginning of a stop string.

    After ``stopped`` is True nothing more is let through; the stop string itself never is.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(text for text in stop_strings if text)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The part of the text so far that is certain to belong to the answer."""
        if self.stopped:
            return ""
        self._held += text
        ends = [end for stop in self._stop_strings if (end := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends))
        return self._release(len(self._held) - self._possible_beginning())

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop_strings):
                return length
        return 0
