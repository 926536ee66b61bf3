"""Answers in OpenAI's words: whole objects, and the chunks of a stream.

Beside OpenAI's fields a last chunk or whole answer has ``swarm``: the nodes that served each
choice, by the names that they give themselves, and how fast it went. Clients that do not know the
field ignore it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from swarm.client.gateway.answers import Event
from swarm.client.gateway.token_text import TokenTexts
from swarm.client.generate import GenerationResult, TextPiece
from swarm.client.text_stream import REPLACEMENT
from swarm.routing import ChainPlan, Hop


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    hops: tuple[Hop, ...] = ()
    result: GenerationResult | None = None
    characters: int = 0


class Reply:
    """One answer in the making: ``add`` every event, then take ``whole``, or send each chunk."""

    def __init__(
        self,
        *,
        request_id: str,
        model_name: str,
        fingerprint: str,
        created_unix_s: int,
        is_chat: bool,
        choices: int,
        prompt_tokens: int,
        texts: TokenTexts,
        wants_logprobs: bool,
        wants_usage: bool = False,
        wants_chain: bool = False,
    ) -> None:
        self._is_chat = is_chat
        self._choices = [_Choice() for _ in range(choices)]
        self._prompt_tokens = prompt_tokens
        self._texts = texts
        self._wants_logprobs = wants_logprobs
        self._wants_usage = wants_usage
        self._wants_chain = wants_chain
        self.completion_tokens = 0
        self._head = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + request_id,
            "object": "chat.completion" if is_chat else "text_completion",
            "created": created_unix_s,
            "model": model_name,
            "system_fingerprint": fingerprint,
        }
        chunk_head: dict[str, Any] = dict(self._head)
        if is_chat:
            chunk_head["object"] = "chat.completion.chunk"
        if wants_usage:
            chunk_head["usage"] = None
        # The same in all chunks: encoded once.
        self._chunk_start = json.dumps(chunk_head)[:-1] + ', "choices": ['

    # --- whole answers
    def add(self, event: Event) -> None:
        """Remember a piece."""
        piece = event.piece
        if piece is None:
            return
        choice = self._choices[event.index]
        self.completion_tokens += len(piece.token_ids)
        choice.texts.append(piece.text)
        choice.logprobs += self._logprobs(piece)
        choice.result = piece.result

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self._choices):
            text = "".join(choice.texts)
            content: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self._is_chat
                else {"text": text}
            )
            choices.append(
                {
                    "index": index,
                    **content,
                    "logprobs": self._logprobs_field(choice, choice.logprobs, 0),
                    "finish_reason": choice.result.finish_reason if choice.result else None,
                }
            )
        results = [choice.result for choice in self._choices if choice.result is not None]
        return {
            **self._head,
            "choices": choices,
            "usage": self.usage(),
            "swarm": [_served(index, result) for index, result in enumerate(results)],
        }

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self._prompt_tokens + self.completion_tokens,
        }

    # --- streams
    def opening(self) -> bytes:
        """The first chunk of each choice: who speaks."""
        if not self._is_chat:
            return b""
        return b"".join(
            self._chunk(index, {"delta": {"role": "assistant", "content": "", "refusal": None}})
            for index in range(len(self._choices))
        )

    def chunk(self, event: Event) -> bytes:
        """What is sent for a piece; empty when there is nothing to tell yet."""
        piece = event.piece
        if piece is None:
            return b""
        choice = self._choices[event.index]
        self.completion_tokens += len(piece.token_ids)
        logprobs = self._logprobs(piece)
        extra: dict[str, Any] = {}
        if self._wants_chain and event.plan is not None and event.plan.hops != choice.hops:
            choice.hops = event.plan.hops
            extra["swarm"] = [{"index": event.index, "chain": _chain(event.plan)}]
        content = b""
        if piece.text or logprobs or extra:
            text: dict[str, Any] = (
                {"delta": {"content": piece.text}} if self._is_chat else {"text": piece.text}
            )
            field = self._logprobs_field(choice, logprobs, choice.characters)
            choice.characters += len(piece.text)
            content = self._chunk(event.index, text, logprobs=field, **extra)
        if piece.result is None:
            return content
        end: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        return content + self._chunk(
            event.index,
            end,
            finish_reason=piece.result.finish_reason,
            swarm=[_served(event.index, piece.result)],
        )

    def closing(self) -> bytes:
        """After the last chunk."""
        if not self._wants_usage:
            return DONE
        usage: dict[str, Any] = {**self._head, "choices": [], "usage": self.usage()}
        if self._is_chat:
            usage["object"] = "chat.completion.chunk"
        return event_of(usage) + DONE

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        **extra: Any,
    ) -> bytes:
        choice = {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        end = ", " + json.dumps(extra)[1:] if extra else "}"
        return f"data: {self._chunk_start}{json.dumps(choice)}]{end}\n\n".encode()

    # --- log probabilities
    def _logprobs(self, piece: TextPiece) -> list[dict[str, Any]]:
        return [
            {
                **self._texts.describe(token.token_id, token.logprob),
                "top_logprobs": [self._texts.describe(*pair) for pair in token.alternatives],
            }
            for token in piece.logprobs
            if token.token_id not in self._texts.end_token_ids
        ]

    def _logprobs_field(
        self, choice: _Choice, tokens: list[dict[str, Any]], offset: int
    ) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        if self._is_chat:
            return {"content": tokens, "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token["token"])
        return {
            "tokens": [_label(token) for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [
                {_label(other): other["logprob"] for other in token["top_logprobs"]}
                for token in tokens
            ],
            "text_offset": offsets,
        }


DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"


def event_of(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _label(token: dict[str, Any]) -> str:
    """Names a token among others: parts of characters all look the same as text."""
    text = str(token["token"])
    if REPLACEMENT not in text or token["bytes"] is None:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token["bytes"])


def _chain(plan: ChainPlan) -> list[dict[str, Any]]:
    # Never an address.
    return [
        {
            "name": hop.display_name or f"node {hop.peer_id[-8:]}",
            "peer_id": hop.peer_id,
            "first_block": hop.first_block,
            "end_block": hop.end_block,
        }
        for hop in plan.hops
    ]


def _served(index: int, result: GenerationResult) -> dict[str, Any]:
    return {
        "index": index,
        "chain": _chain(result.plan),
        "time_to_first_token_s": round(result.time_to_first_token_s, 4),
        "tokens_per_s": round(result.tokens_per_s, 2),
    }
