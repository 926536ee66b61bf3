"""Errors as OpenAI's clients know them. The tree of our own errors meets HTTP only here."""

from __future__ import annotations

from typing import Any

from swarm.protocol.errors import (
    AllowanceRefused,
    NoRouteError,
    PolicyUnmet,
    RemoteError,
    SwarmError,
    UsageError,
)

BUSY_RETRY_S = 5
USED_UP = "insufficient_quota"
"""OpenAI's word, as type and code, for an account that has nothing left."""
USED_UP_RETRY_S = 600


class ApiError(Exception):
    """A request that gets no answer, and why: status, type, code and a text without its content."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        allow: str = "",
    ) -> None:
        """``allow`` names the methods that a path takes."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.allow = allow

    @property
    def kind(self) -> str:
        """OpenAI's ``type``."""
        match self.status:
            case 401:
                return "authentication_error"
            case 403:
                return "permission_error"
            case 404:
                return "not_found_error"
            case 429:
                return USED_UP if self.code == USED_UP else "rate_limit_error"
            case status if status >= 500:
                return "server_error"
        return "invalid_request_error"

    def to_json(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.allow:
            return {"Allow": self.allow}
        if self.retry_after_s is None:
            return {}
        # OpenAI's clients try again at once unless they are told not to.
        advice = {"x-should-retry": "false"} if self.code == USED_UP else {}
        return {"Retry-After": str(max(1, round(self.retry_after_s))), **advice}


def from_swarm(error: SwarmError) -> ApiError:
    """What the caller of the API is told. Texts of ours name blocks and limits, never content."""
    match error:
        case UsageError():
            return ApiError(400, _one_line(error), code="invalid_value")
        case AllowanceRefused():
            if error.is_used_up:
                text = "the account of this key has used up what the operator grants it"
                return ApiError(429, text, code=USED_UP, retry_after_s=USED_UP_RETRY_S)
            text = "the operator does not accept the account of this key"
            return ApiError(403, text, code="account_refused")
        case PolicyUnmet(is_final=True):
            return ApiError(403, _one_line(error), code="policy_unmet")
        case PolicyUnmet():
            retry_s = error.retry_after_ms / 1000 or BUSY_RETRY_S
            text = f"nobody that the policy allows can serve this now: {_one_line(error)}"
            return ApiError(503, text, code="policy_unmet", retry_after_s=retry_s)
        case NoRouteError():
            retry_s = error.retry_after_ms / 1000 or BUSY_RETRY_S
            text = f"the swarm cannot serve this now: {_one_line(error)}"
            return ApiError(503, text, code="swarm_unavailable", retry_after_s=retry_s)
        case RemoteError():
            retry_s = error.retry_after_ms / 1000 or BUSY_RETRY_S
            return ApiError(
                503, "a node refused; try again", code="node_refused", retry_after_s=retry_s
            )
    return ApiError(
        503, "the swarm did not answer; try again", code="swarm_unavailable", retry_after_s=1
    )


def internal_error() -> ApiError:
    """For a bug of ours: the log has it, the caller does not."""
    return ApiError(500, "the gateway failed; this is a bug of the gateway", code="internal_error")


def _one_line(error: SwarmError) -> str:
    return " ".join(str(error).split())[:500]
