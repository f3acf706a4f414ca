"""What the HTTP API takes, for people and machines: OpenAPI's document, a page, and the table in `docs/api.md`.

All are made of the table of options. `python -m deployments.openapi` writes the table into the documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import lorauter
from deployments.anthropic_types import CountTokensBody, MessagesBody
from deployments.openai_types import ChatBody, CompletionBody
from deployments.options import rows_of, table
from deployments.responses_types import ResponsesBody
from deployments.rights import ROLES
from deployments.text_types import (
    CompositionBody,
    DetokenizeBody,
    EmbeddingsBody,
    LoadAdapterBody,
    RouteBody,
    TokenizeBody,
    UnloadAdapterBody,
)

ENDPOINTS: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountTokensBody,
    "/v1/embeddings": EmbeddingsBody,
    "/v1/route": RouteBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/load_lora_adapter": LoadAdapterBody,
    "/v1/unload_lora_adapter": UnloadAdapterBody,
    "/v1/compositions": CompositionBody,
}
"""What endpoints take whose options are in the table; `docs/publishing.md` has those of the rest of the admin API."""

DOCS = Path(__file__).parents[1] / "docs" / "api.md"
_BEGIN, _END = "<!-- options: python -m deployments.openapi -->\n", "<!-- end -->\n"


def with_table(text: str) -> str:
    """The documentation with the table as it is now."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    names = {path.removeprefix("/v1/"): kind for path, kind in ENDPOINTS.items()}
    return f"{before}{_BEGIN}{table(names)}{_END}{after}"


@cache
def document() -> dict[str, Any]:
    """OpenAPI's document."""
    of, schemas = models_json_schema(
        [(kind, "validation") for kind in ENDPOINTS.values()], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), roles in ROLES.items():
        names = re.findall(r"\{(\w+)\}", path)
        operation: dict[str, Any] = {
            "summary": f"For keys of the role {' or '.join(roles)}" if roles else "Needs no key",
            "responses": {"200": {"description": "The answer"}, "default": {"$ref": "#/components/responses/error"}},
            "security": [{"key": []}, {"x-api-key": []}] if roles else [],
            "parameters": [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names],
        }
        if path in ENDPOINTS and method == "POST":
            schema = of[ENDPOINTS[path], "validation"]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths.setdefault(path, {})[method.lower()] = operation
    error = {"type": "object", "properties": {name: {} for name in ("message", "type", "param", "code")}}
    told = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lorauter", "version": lorauter.__version__},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "responses": {"error": {"description": "An error", "content": {"application/json": {"schema": told}}}},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


@cache
def page() -> str:
    """The table as a page of its own, which loads nothing."""
    body = [f"<h1>lorauter {lorauter.__version__}</h1><p><a href=openapi.json>openapi.json</a></p>"]
    for path, kind in ENDPOINTS.items():
        body.append(f"<h2>POST {path}</h2><table border=1><tr><th>option<th>takes<th>neutral<th>goes to<th>")
        for row in rows_of(kind):
            cells = (row.name, row.takes, ", ".join(map(repr, row.neutral)), row.goes, row.says)
            body.append("<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells))
        body.append("</table>")
    return f"<!doctype html><meta charset=utf-8><title>lorauter</title>{''.join(body)}"


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text()))
