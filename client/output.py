"""What the command ``swarm`` prints: answers as they come, who served them, and errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from swarm.protocol.errors import NoRouteError, RemoteError, SwarmError

if TYPE_CHECKING:
    from swarm.client.adapters import FoundAdapter
    from swarm.client.generate import GenerationResult, TextPiece


class Answer:
    """Shows an answer while it comes, and remembers it should it be interrupted."""

    def __init__(self, *, shown: bool, adapter: FoundAdapter | None = None) -> None:
        self._shown = shown
        self._adapter = adapter
        self.text = ""
        self.result: GenerationResult | None = None

    async def follow(self, pieces: AsyncIterator[TextPiece]) -> None:
        async for piece in pieces:
            self.text += piece.text
            if self._shown:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
            if piece.result is not None:
                self.result = piece.result
        if self._shown:
            print()

    def report(self, as_json: bool) -> None:
        if self.result is None:
            return
        if as_json:
            print(json.dumps(result_to_json(self.result) | self._adapter_to_json()), flush=True)
        else:
            note(describe(self.result))

    def _adapter_to_json(self) -> dict[str, Any]:
        found = self._adapter
        if found is None:
            return {}
        adapter_id = found.files.adapter_id.hex() if found.files is not None else None
        return {"adapter": {"name": found.name, "id": adapter_id, "reason": found.reason}}


def result_to_json(result: GenerationResult) -> dict[str, Any]:
    """An answer for programs."""
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "time_to_first_token_s": round(result.time_to_first_token_s, 4),
        "tokens_per_s": round(result.tokens_per_s, 2),
        "chain_passes": result.chain_passes,
        "chain": [
            {
                "peer_id": hop.peer_id,
                "name": hop.display_name,
                "first_block": hop.first_block,
                "end_block": hop.end_block,
            }
            for hop in result.plan.hops
        ],
    }


def describe(result: GenerationResult) -> str:
    """The chain that served an answer, and how fast it was."""
    hops = " -> ".join(
        f"{hop.display_name or hop.peer_id[-8:]} [{hop.first_block}:{hop.end_block}]"
        for hop in result.plan.hops
    )
    return (
        f"served by {hops}\n"
        f"{len(result.token_ids)} tokens, {result.tokens_per_s:.1f} tokens/s, "
        f"first token after {result.time_to_first_token_s:.2f} s"
    )


def explain(error: SwarmError) -> str:
    """One line for a user."""
    text = " ".join(str(error).split())
    retry_after_ms = error.retry_after_ms if isinstance(error, NoRouteError | RemoteError) else 0
    if retry_after_ms and "retry in" not in text:
        text += f"; retry in {retry_after_ms / 1000:.0f} s"
    return text


def error_to_json(error: SwarmError) -> dict[str, Any]:
    """An error for programs, in place of the object that they asked for."""
    fields: dict[str, Any] = {"error": explain(error), "kind": type(error).__name__}
    if isinstance(error, NoRouteError):
        fields["missing_blocks"] = list(error.missing_blocks)
    if isinstance(error, NoRouteError | RemoteError):
        fields["retry_after_ms"] = error.retry_after_ms
    return fields


def note(text: str) -> None:
    """A line for the user beside the answer: on stderr, dim where the terminal can."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[2m{text}\033[0m" if dim else text, file=sys.stderr, flush=True)
