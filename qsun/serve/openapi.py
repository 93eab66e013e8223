"""The OpenAPI description of the router, made from what its requests are checked against."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.json_schema import models_json_schema

from qsun import __version__
from qsun.serve.requests import ChatRequest, CompletionRequest

REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    400: "the request is wrong; the message names every field",
    401: "no valid key",
    403: "administration is off",
    404: "no such task, path or worker",
    405: "another method",
    408: "the request did not come to an end",
    409: "a worker of that name is there already",
    413: "too many bytes",
    429: "no room now; Retry-After says when to ask again",
    503: "workers are missing or failed",
}


class AddWorker(BaseModel):
    """`POST /admin/workers`. A decode worker takes all tasks."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    role: Literal["prefill", "decode"]
    url: Annotated[str, StringConstraints(pattern=r"^http://[A-Za-z0-9.\[\]:-]+/?$")]
    tasks: list[str] = Field(default_factory=list)


def openapi(title: str, tasks: list[str]) -> dict[str, Any]:
    """The document, for a bundle's name and tasks."""
    models = (CompletionRequest, ChatRequest, AddWorker)
    _, schemas = models_json_schema([(one, "validation") for one in models], ref_template=REFERENCE)
    names = f"Tasks: {', '.join(sorted(tasks))}."
    return {
        "openapi": "3.1.0",
        "info": {"title": f"qsun: {title}", "version": __version__, "description": names},
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
        "paths": {
            "/v1/completions": _post("Complete a prompt", "CompletionRequest"),
            "/v1/chat/completions": _post("Answer a chat", "ChatRequest"),
            "/v1/models": _get("The tasks, each with the digest of its bundle"),
            "/v1/models/{task}": _get("One task, with the digest of its bundle", "task"),
            "/health": _get("Whether the router runs"),
            "/ready": _get("Whether every task can be answered"),
            "/metrics": _get("Metrics for Prometheus"),
            "/openapi.json": _get("This document"),
            "/admin/workers": {
                **_get("The workers"),
                **_post("Add a worker", "AddWorker", status=201),
            },
            "/admin/workers/{name}/drain": {
                "post": _operation("Give a worker nothing new", 200)
                | {"parameters": [_in_path("name")]}
            },
        },
    }


def _get(summary: str, parameter: str | None = None) -> dict[str, Any]:
    parameters = [_in_path(parameter)] if parameter else []
    return {"get": _operation(summary, 200) | {"parameters": parameters}}


def _post(summary: str, schema: str, status: int = 200) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=schema)}}}
    return {
        "post": _operation(summary, status)
        | {"requestBody": {"required": True, "content": content}}
    }


def _operation(summary: str, status: int) -> dict[str, Any]:
    answers = {str(code): {"description": text} for code, text in _ERRORS.items()}
    return {"summary": summary, "responses": {str(status): {"description": "done"}, **answers}}


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
