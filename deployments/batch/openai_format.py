"""OpenAI's batch files: a row's request, and the line of the output that answers it. Knows no Ray and no files."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from deployments.openai_answers import CHAT, TEXT, usage
from deployments.openai_types import ROUTED_MODEL, ChatBody, CompletionBody
from deployments.options import parse_body
from lorauter.errors import InvalidRequest
from lorauter.routing import RoutingDecision

_BODIES: Mapping[str, type[ChatBody | CompletionBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}


def is_request(values: Mapping[str, Any]) -> bool:
    """Whether a row is a request of OpenAI's format: `{"custom_id", "method", "url", "body"}`."""
    return all(name in values for name in ("custom_id", "method", "url", "body"))


def read_body(values: Mapping[str, Any]) -> ChatBody | CompletionBody:
    """The request of such a row, as the HTTP API takes it; `stream` is of no use in a file. Raises InvalidRequest."""
    method, url = values["method"], values["url"]
    if method != "POST" or not isinstance(url, str) or url not in _BODIES:
        raise InvalidRequest(
            f"got method {method!r} and url {url!r}, needed POST and one of {', '.join(_BODIES)}", param="url"
        )
    body = values["body"]
    try:
        text = body if isinstance(body, str | bytes) else json.dumps(body, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"body: it is no JSON: {error}", param="body") from error
    try:
        return parse_body(_BODIES[url], text)
    except InvalidRequest as error:
        raise InvalidRequest(f"body: {error}", param=error.param) from error


def output_line(
    row: tuple[int, Mapping[str, Any]],
    decision: RoutingDecision | Exception,
    result: Mapping[str, Any],
    error: tuple[int, dict[str, Any]] | None,
    *,
    plain: bool,
) -> dict[str, Any]:
    """A line of the output.

    Args:
        row: its number, which stands for the `custom_id` that a row of another format has not, and its columns.
        decision: where it went.
        result: the columns that were added.
        error: of a row that was not answered, status and body.
        plain: whether rows of other formats are texts that are continued, and no chats.
    """
    number, values = row
    key = uuid.uuid4().hex
    if error is None:
        assert isinstance(decision, RoutingDecision)
        asked = values["body"] if is_request(values) else None
        shape = TEXT if (plain if asked is None else _BODIES[values["url"]] is CompletionBody) else CHAT
        body = {
            **shape.head(_model(asked), stream=False),
            "choices": [shape.choice(0, result["answer"], result["finish_reason"])],
            "usage": usage(result["prompt_tokens"], result["completion_tokens"]),
            "lorauter": decision.to_json(),
        }
    status, body = (200, body) if error is None else error
    return {
        "id": f"batch_req_{key}",
        "custom_id": values.get("custom_id", f"row-{number}"),
        "response": {"status_code": status, "request_id": key, "body": body},
        "error": None,
    }


def _model(body: Any) -> str:
    """The model that a request named: it was read before, so that its shape is known."""
    asked = json.loads(body) if isinstance(body, str | bytes) else body
    return ROUTED_MODEL if asked is None else str(asked["model"])
