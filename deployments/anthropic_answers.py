"""Answers and errors in the shape of Anthropic's Messages API: blocks, and the events of which each is one's.

Knows no HTTP. What a stream's events add up to is by construction what a whole answer is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from deployments.answers import Opening, Piece
from deployments.anthropic_types import named
from deployments.encoded import event, new_id

_PATHS = ("/v1/messages", "/v1/messages/count_tokens")
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class MessagesShape:
    """How answers look."""

    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    named = staticmethod(named)

    def open(self, opening: Opening) -> MessagesWriter:
        """What writes the answer to a request."""
        return MessagesWriter(opening)


class MessagesWriter:
    """Writes the answer to a request.

    Args:
        opening: what is known of the answer.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._content: list[dict[str, Any]] = []
        self._arguments = ""  # of the last call
        self._length = 0  # characters of text
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._message: dict[str, Any] = {
            "id": f"msg_{new_id()}",
            "type": "message",
            "role": "assistant",
            "model": opening.body.model,
        }

    def whole(self, pieces: Sequence[Piece], tokens: int) -> dict[str, Any]:
        """The message."""
        self.piece(0, pieces[0], tokens)
        self._finish()
        return self._told(tokens)

    def first(self) -> bytes:
        """That there is a message."""
        return _event("message_start", message=self._told(0)) + MessagesShape.ping

    def piece(self, _: int, piece: Piece, __: int) -> bytes:
        """A piece of the last block, or of a next one."""
        said = b""
        for part in piece.parts(self._length):
            if isinstance(part, str):
                if not self._content or self._content[-1]["type"] != "text":
                    said += self._add({"type": "text", "text": ""})
                self._content[-1]["text"] += part
                said += self._delta({"type": "text_delta", "text": part})
                continue
            if part.id is not None:
                said += self._add({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
            if part.arguments:
                self._arguments += part.arguments
                said += self._delta({"type": "input_json_delta", "partial_json": part.arguments})
        self._length += len(piece.text)
        if piece.finish_reason:
            stopped = piece.stop_string is not None and piece.finish_reason == "stop"
            self._stop["stop_reason"] = "stop_sequence" if stopped else _REASONS[piece.finish_reason]
            self._stop["stop_sequence"] = piece.stop_string
        return said

    def end(self, tokens: int) -> bytes:
        """The end of the last block, why it is the end, and the end."""
        return (
            self._finish()
            + _event("message_delta", delta=self._stop, usage=self._usage(tokens))
            + _event("message_stop")
        )

    def error(self, status: int, body: Mapping[str, Any]) -> bytes:
        """The error."""
        return _event(**error_body(status, body))

    def _add(self, block: dict[str, Any]) -> bytes:
        said = self._close()
        self._content.append(block)
        return said + _event("content_block_start", index=len(self._content) - 1, content_block=block)

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self._content) - 1, delta=delta)

    def _close(self) -> bytes:
        """The end of the last block, if there is one."""
        if not self._content:
            return b""
        if self._content[-1]["type"] == "tool_use":
            self._content[-1]["input"] = _object(self._arguments)
            self._arguments = ""
        return _event("content_block_stop", index=len(self._content) - 1)

    def _finish(self) -> bytes:
        """The end of the content: an answer that says nothing is an empty text."""
        said = b"" if self._content else self._add({"type": "text", "text": ""})
        return said + self._close()

    def _told(self, tokens: int) -> dict[str, Any]:
        return {
            **self._message,
            "content": self._content,
            **self._stop,
            "usage": self._usage(tokens),
            "lorauter": self._opening.decision(0),
        }

    def _usage(self, tokens: int) -> dict[str, Any]:
        return {
            "input_tokens": self._opening.prompt_tokens - self._opening.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._opening.cached_tokens,
            "output_tokens": tokens,
        }


def speaks_anthropic(path: str) -> bool:
    """Whether a path is of this API."""
    return path.rstrip("/").endswith(_PATHS)


def error_body(status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of an error, from OpenAI's."""
    error = body["error"]
    kind = "api_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    if error["code"] == "overloaded":
        kind = "overloaded_error"
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}


def _event(type: str, **content: Any) -> bytes:
    return event({"type": type, **content}, type)


def _object(arguments: str) -> dict[str, Any]:
    """A call's arguments; what there is of them, where the answer was cut."""
    try:
        made = from_json(arguments or "{}", allow_partial=True, allow_inf_nan=False)
    except ValueError:
        return {}
    return made if isinstance(made, dict) else {}
