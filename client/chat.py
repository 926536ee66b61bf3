"""A conversation: its turns, and one session on the nodes for all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from swarm.client.config import SamplingSettings
from swarm.client.generate import LocalModel, TextPiece, TextSession
from swarm.client.remote_blocks import ChainOpener, SessionAdapter
from swarm.protocol.errors import UsageError


class Conversation:
    """Turns of user and assistant. What the nodes have computed for earlier turns is kept there."""

    def __init__(
        self,
        client: ChainOpener,
        model: LocalModel,
        *,
        system: str | None = None,
        maximum_tokens: int,
    ) -> None:
        """``maximum_tokens`` is what the nodes reserve. Raises UsageError without chat template."""
        if not model.has_chat_template:
            raise UsageError("this model has no chat template; use swarm generate --raw instead")
        self._client = client
        self._model = model
        self._maximum_tokens = min(maximum_tokens, model.maximum_tokens)
        self._session = TextSession(client, model, self._maximum_tokens)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []

    async def use_adapter(self, adapter: SessionAdapter | None) -> None:
        """Go on with another adapter, or with none; what is cached on the nodes is given up."""
        await self._session.close()
        self._session = TextSession(
            self._client, self._model, self._maximum_tokens, adapter=adapter
        )

    @property
    def turns(self) -> list[dict[str, str]]:
        """What was said so far, as ``role`` and ``content``, without the system message."""
        return list(self._turns)

    async def answer(
        self, text: str, settings: SamplingSettings
    ) -> AsyncGenerator[TextPiece, None]:
        """Stream the answer to ``text``; then call :meth:`remember_answer`."""
        self._turns.append({"role": "user", "content": text})
        prompt_ids = self._fitting_prompt(settings.max_new_tokens)
        async with aclosing(self._session.stream(prompt_ids, settings)) as pieces:
            async for piece in pieces:
                yield piece

    def remember_answer(self, text: str) -> None:
        """Add what was shown of the answer; an empty one takes the question back."""
        if text:
            self._turns.append({"role": "assistant", "content": text})
        elif self._turns:
            self._turns.pop()

    def forget(self) -> None:
        """Start over; the system message stays."""
        self._turns.clear()

    async def close(self) -> None:
        """Free the session on the nodes."""
        await self._session.close()

    def _fitting_prompt(self, wanted_tokens: int) -> list[int]:
        """The prompt, without the oldest turns when an answer would not fit beside them."""
        room = self._maximum_tokens - min(wanted_tokens, self._maximum_tokens // 2)
        while True:
            prompt_ids = self._model.encode_chat([*self._system, *self._turns])
            if len(prompt_ids) <= room or len(self._turns) <= 1:
                return prompt_ids
            del self._turns[:2]
