"""The published description of the API, as OpenAPI 3.1: from the same models that check bodies."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from swarm.client.gateway.bodies import ChatBody, TextBody
from swarm.protocol.version import software_version

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_COUNT = {"type": "integer", "minimum": 0}


def document(models: list[str]) -> dict[str, Any]:
    """The whole description of a gateway that serves ``models``."""
    _, bodies = models_json_schema(
        [(ChatBody, "validation"), (TextBody, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    for name in ("ChatBody", "TextBody"):
        bodies["$defs"][name]["properties"]["model"] = {"enum": models}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Swarm gateway",
            "version": software_version(),
            "description": "OpenAI's API in front of a swarm of volunteers.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/v1/models": {"get": _operation("List the models", "listModels", "ModelList")},
            "/v1/models/{model}": {
                "get": {
                    **_operation("Show one model", "getModel", "Model", 404),
                    "parameters": [
                        {
                            "name": "model",
                            "in": "path",
                            "required": True,
                            "schema": {"enum": models},
                        }
                    ],
                }
            },
            "/v1/chat/completions": {
                "post": _completion("Answer a conversation", "createChat", "Chat")
            },
            "/v1/completions": {"post": _completion("Continue a text", "createText", "Text")},
            "/healthz": {"get": _state("Whether the process lives", "health", 200)},
            "/readyz": {"get": _state("Whether it can answer", "ready", 200, 503)},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {**bodies["$defs"], **_replies()},
        },
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _failures(*statuses: int) -> dict[str, Any]:
    texts = {
        400: "A field is wrong",
        401: "No valid API key",
        403: "Not by this name, or not for this key: its policy or account does not allow it",
        404: "No such model",
        408: "The body came too slowly",
        413: "The body is too large",
        415: "No JSON",
        429: "Too much for this key, see Retry-After; or its account has nothing left",
        500: "A bug of the gateway",
        503: "The swarm or the gateway cannot serve this now; see Retry-After",
        504: "The answer took too long",
    }
    return {str(status): _json(_ref("Failure"), texts[status]) for status in statuses}


def _operation(summary: str, name: str, schema: str, *statuses: int) -> dict[str, Any]:
    return {
        "summary": summary,
        "operationId": name,
        "security": [{"key": []}, {}],
        "responses": {
            "200": _json(_ref(schema), "Done"),
            **_failures(*sorted({401, 403, 500, *statuses})),
        },
    }


def _completion(summary: str, name: str, kind: str) -> dict[str, Any]:
    operation = _operation(summary, name, f"{kind}Reply", 400, 404, 408, 413, 415, 429, 503, 504)
    operation["responses"]["200"]["description"] = "Done; chunks as OpenAI streams them if asked"
    operation["responses"]["200"]["content"]["text/event-stream"] = {}
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": _ref(f"{kind}Body")}},
    }
    return operation


def _state(summary: str, name: str, *statuses: int) -> dict[str, Any]:
    schema = {"type": "object", "required": ["status"], "properties": {"status": _TEXT}}
    return {
        "summary": summary,
        "operationId": name,
        "responses": {str(status): _json(schema, "The state in a word") for status in statuses},
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*properties], "properties": properties}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _replies() -> dict[str, Any]:
    nothing = {"type": "null"}
    hop = _object(name=_TEXT, peer_id=_TEXT, first_block=_COUNT, end_block=_COUNT)
    served = _object(
        index=_COUNT, chain=_list(hop), time_to_first_token_s=_NUMBER, tokens_per_s=_NUMBER
    )
    head = {
        "id": _TEXT,
        "created": _COUNT,
        "model": _TEXT,
        "system_fingerprint": _TEXT,
        "usage": _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT),
        "swarm": _list(served),
    }
    choice = {
        "index": _COUNT,
        "logprobs": {"anyOf": [{"type": "object"}, nothing]},
        "finish_reason": {"enum": ["stop", "length"]},
    }
    message = _object(role={"const": "assistant"}, content=_TEXT, refusal=nothing)
    model = _object(
        id=_TEXT,
        object={"const": "model"},
        created=_COUNT,
        owned_by=_TEXT,
        swarm=_object(
            revision=_TEXT,
            number_of_blocks=_COUNT,
            context_tokens=_COUNT,
            nodes=_COUNT,
            available={"type": "boolean"},
        ),
    )
    text_or_null = {"anyOf": [_TEXT, nothing]}
    return {
        "ChatReply": _object(
            object={"const": "chat.completion"},
            choices=_list(_object(message=message, **choice)),
            **head,
        ),
        "TextReply": _object(
            object={"const": "text_completion"},
            choices=_list(_object(text=_TEXT, **choice)),
            **head,
        ),
        "Model": model,
        "ModelList": _object(object={"const": "list"}, data=_list(_ref("Model"))),
        "Failure": _object(
            error=_object(message=_TEXT, type=_TEXT, param=text_or_null, code=text_or_null)
        ),
    }
