"""Who a request is from, and whether it may be answered now."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from swarm.client.gateway.errors import BUSY_RETRY_S, ApiError
from swarm.client.gateway.keys import ApiKey, KeyFile, Payer
from swarm.client.gateway.limits import KeyLimits, Usage, Usages
from swarm.client.gateway.metrics import GatewayMetrics
from swarm.client.gateway.settings import GatewaySettings
from swarm.client.gateway.turns import TooManyWaiting, Turns
from swarm.protocol.policy import Policy

BEARER = "Bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a key, or an address where no keys are needed. Never logged with what is asked."""

    key_id: str
    limits: KeyLimits
    policy: Policy | None = None
    """Which nodes may see what it asks, beside the gateway's own policy; None: no further rule."""
    payer: Payer | None = None
    """The account that pays; None: the gateway's own."""


class Admission:
    """Keys, limits and turns of one gateway."""

    def __init__(
        self, settings: GatewaySettings, keys: KeyFile, turns: Turns, metrics: GatewayMetrics
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._turns = turns
        self._metrics = metrics
        self._usages = Usages()

    @property
    def needs_keys(self) -> bool:
        """Without keys a gateway serves this computer, or everybody when told so."""
        if self._settings.without_keys:
            return False
        return not self._settings.is_loopback or bool(self._keys.all())

    def identify(self, authorization: str | None, remote: str) -> Caller:
        """Raises ApiError 401 for missing, wrong and revoked keys."""
        if not self.needs_keys:
            return Caller(f"address {remote}", self._limits(None))
        if authorization is None or not authorization.startswith(BEARER):
            raise ApiError(
                401,
                "no API key; send it as Authorization: Bearer KEY",
                code="missing_api_key",
            )
        key = self._keys.find(authorization.removeprefix(BEARER).strip(), time.monotonic())
        if key is None:
            raise ApiError(401, "wrong or revoked API key", code="invalid_api_key")
        return Caller(key.key_id, self._limits(key), key.session_policy, key.payer)

    def count_request(self, caller: Caller) -> None:
        """Before the body is read. Raises ApiError 429."""
        now_s = time.monotonic()
        usage = self._usage(caller, now_s)
        if wait_s := usage.requests.wait_s(now_s):
            self._refuse("requests", "too many requests per minute", wait_s)
        usage.requests.take(now_s, 1)

    @asynccontextmanager
    async def admitted(
        self, caller: Caller, *, prompt_tokens: int, answers: int
    ) -> AsyncIterator[Usage]:
        """Hold room for the answers. Raises ApiError 429 and 503."""
        now_s = time.monotonic()
        usage = self._usage(caller, now_s)
        if wait_s := usage.tokens.wait_s(now_s, prompt_tokens):
            self._refuse("tokens", "too many tokens per minute", wait_s)
        if usage.answers + answers > caller.limits.answers:
            text = f"at most {caller.limits.answers} answers at a time"
            self._refuse("answers", text, BUSY_RETRY_S)
        usage.answers += answers
        try:
            async with self._turns.turn(caller.key_id, answers):
                usage.tokens.take(time.monotonic(), prompt_tokens)
                yield usage
        except TooManyWaiting:
            self._metrics.limited("queue")
            raise ApiError(
                503, "too many requests wait", code="overloaded", retry_after_s=BUSY_RETRY_S
            ) from None
        finally:
            usage.answers -= answers

    def headers(self, caller: Caller) -> dict[str, str]:
        """How much is left, as OpenAI tells it."""
        usage = self._usage(caller, time.monotonic())
        return {
            "x-ratelimit-limit-requests": str(caller.limits.requests_per_minute),
            "x-ratelimit-limit-tokens": str(caller.limits.tokens_per_minute),
            "x-ratelimit-remaining-requests": str(max(0, int(usage.requests.level))),
            "x-ratelimit-remaining-tokens": str(max(0, int(usage.tokens.level))),
        }

    def _usage(self, caller: Caller, now_s: float) -> Usage:
        return self._usages.of(caller.key_id, caller.limits, now_s)

    def _limits(self, key: ApiKey | None) -> KeyLimits:
        settings = self._settings
        return KeyLimits(
            (key and key.requests_per_minute) or settings.key_requests_per_minute,
            (key and key.tokens_per_minute) or settings.key_tokens_per_minute,
            (key and key.answers) or settings.key_answers,
        )

    def _refuse(self, limit: str, text: str, retry_after_s: float) -> None:
        self._metrics.limited(limit)
        raise ApiError(429, text, code="rate_limit_exceeded", retry_after_s=retry_after_s)
