"""What clients may ask, as OpenAI names it: checked whole before anything is done.

pydantic reads the bytes; its errors name the field and never repeat its content. Fields that would
change the answer and are not supported are refused; fields that would not are ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator

from swarm.client.config import SamplingSettings
from swarm.client.constraints import ANY_OBJECT
from swarm.client.gateway.errors import ApiError
from swarm.client.gateway.settings import GatewaySettings

MAXIMUM_MESSAGES = 4096
MAXIMUM_STOPS = 4
MAXIMUM_STOP_CHARACTERS = 256
MAXIMUM_SCHEMA_CHARACTERS = 64 * 1024
MAXIMUM_PROMPT_TOKENS = 1 << 20
UNSUPPORTED = (
    "audio",
    "function_call",
    "functions",
    "prediction",
    "suffix",
    "tool_choice",
    "tools",
    "web_search_options",
)
"""Known to OpenAI's API, and refused: an answer without them would not be what was asked for."""

TEXT_COMPLETION_TOKENS = 16
"""OpenAI's default for ``/v1/completions``."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class TextPart(_Body):
    """Part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAXIMUM_MESSAGES)]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Body):
    """How to stream."""

    include_usage: bool | None = None
    include_chain: bool | None = Field(
        None, description="Tell in `swarm` of a chunk when other nodes serve the answer."
    )


class JsonSchema(_Body):
    """The schema of an answer; what llguidance supports of JSON Schema."""

    name: str | None = Field(None, max_length=64)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """`text`, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(_Body):
    """What both kinds of completion have in common."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: StrictInt | None = Field(None, ge=0, le=1 << 31, description="Not of OpenAI's API.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Not of OpenAI's API."
    )
    n: StrictInt | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[str, Field(max_length=MAXIMUM_STOP_CHARACTERS)]
        | Annotated[
            list[Annotated[str, Field(max_length=MAXIMUM_STOP_CHARACTERS)]],
            Field(max_length=MAXIMUM_STOPS),
        ]
        | None
    ) = None
    max_tokens: StrictInt | None = Field(None, ge=1, le=1 << 31)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        dict[
            Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
        ]
        | None
    ) = None
    seed: StrictInt | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, max_length=1024)

    @field_validator("logit_bias")
    @classmethod
    def _bounded(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and len(value) > 1024:
            raise ValueError("at most 1024 tokens")
        return value

    def sampling(
        self, settings: GatewaySettings, *, new_tokens: int | None, top_logprobs: int | None
    ) -> SamplingSettings:
        """For the SDK; ``new_tokens`` is None where the body names no limit."""
        if new_tokens is not None and new_tokens > settings.maximum_new_tokens:
            raise ApiError(
                400,
                f"at most {settings.maximum_new_tokens} tokens per answer",
                code="invalid_value",
                param="max_tokens",
            )
        if self.n is not None and self.n > settings.maximum_choices:
            raise ApiError(
                400, f"n is at most {settings.maximum_choices}", code="invalid_value", param="n"
            )
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return SamplingSettings(
            max_new_tokens=new_tokens or settings.default_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            # OpenAI allows 0: of the nucleus only the likeliest token is left.
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-9),
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=None if self.seed is None else self.seed % (1 << 63),
            stop=tuple(stop for stop in stops if stop),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(k), v) for k, v in (self.logit_bias or {}).items()),
            top_logprobs=top_logprobs,
            json_schema=_schema(self.response_format),
        )

    @property
    def choices(self) -> int:
        return self.n or 1


class ChatBody(Sampling):
    """`POST /v1/chat/completions`"""

    messages: list[Message] = Field(min_length=1, max_length=MAXIMUM_MESSAGES)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=1 << 31)
    logprobs: bool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)

    def settings(self, gateway: GatewaySettings) -> SamplingSettings:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                400, "top_logprobs needs logprobs", code="invalid_value", param="top_logprobs"
            )
        return self.sampling(
            gateway,
            new_tokens=self.max_completion_tokens or self.max_tokens,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class TextBody(Sampling):
    """`POST /v1/completions`"""

    prompt: (
        str
        | Annotated[list[StrictInt], Field(min_length=1, max_length=MAXIMUM_PROMPT_TOKENS)]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
    )
    logprobs: StrictInt | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    def settings(self, gateway: GatewaySettings) -> SamplingSettings:
        return self.sampling(
            gateway,
            new_tokens=self.max_tokens or TEXT_COMPLETION_TOKENS,
            top_logprobs=self.logprobs,
        )


Body = TypeVar("Body", bound=Sampling)


def read_body(kind: type[Body], content: bytes) -> Body:
    """Any bytes give a body or an :class:`ApiError` that says which field is wrong."""
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        raise _explained(error) from None
    for name in UNSUPPORTED:
        if (body.model_extra or {}).get(name):
            raise ApiError(
                400, f"{name} is not supported here", code="unsupported_parameter", param=name
            )
    return body


def _explained(error: ValidationError) -> ApiError:
    # Neither the input nor its context: they may be somebody's words.
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is no valid JSON in UTF-8", code="invalid_json")
    field = ".".join(str(part) for part in first["loc"] if not _is_branch(part))[:100]
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
    return ApiError(400, f"{field or 'body'}: {first['msg']}"[:300], code=code, param=field or None)


def _is_branch(part: object) -> bool:
    """Whether pydantic, and not the body, named this: a branch of a union."""
    return isinstance(part, str) and any(sign in part for sign in "[]()-,'")


def _schema(form: ResponseFormat | None) -> str | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return ANY_OBJECT
    schema = form.json_schema.schema_ if form.json_schema is not None else None
    if schema is None:
        raise ApiError(
            400,
            "json_schema needs a schema",
            code="missing_required_parameter",
            param="response_format.json_schema",
        )
    text = json.dumps(schema)
    if len(text) > MAXIMUM_SCHEMA_CHARACTERS:
        raise ApiError(
            400,
            f"a schema has at most {MAXIMUM_SCHEMA_CHARACTERS} characters",
            code="invalid_value",
            param="response_format.json_schema",
        )
    return text
