"""Answers in the shape of OpenAI's Responses API: items, and the events of which each says where in them it belongs.

Knows no HTTP. What a stream's events add up to is by construction what a whole answer is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.answers import Opening, Piece
from deployments.encoded import event, new_id
from deployments.responses_types import ResponsesBody, named


class ResponsesShape:
    """How answers to a request look.

    Args:
        body: what was asked.
    """

    ping = b": ping\n\n"
    named = staticmethod(named)

    def __init__(self, body: ResponsesBody) -> None:
        self._body = body

    def open(self, opening: Opening) -> ResponsesWriter:
        """What writes the answer."""
        return ResponsesWriter(self._body, opening)


class ResponsesWriter:
    """Writes the answer to a request.

    Args:
        body: what was asked.
        opening: what is known of the answer.
    """

    def __init__(self, body: ResponsesBody, opening: Opening) -> None:
        self._opening = opening
        self._numbers = 0
        self._length = 0  # characters of text
        self._logprobs: list[Mapping[str, Any]] = []  # of tokens whose text has not come; of a call's there are none
        self._output: list[dict[str, Any]] = []
        self._reason: str | None = None
        self._response: dict[str, Any] = {
            "id": _id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            **_asked(body),
            "previous_response_id": None,
            "store": False,
            "background": False,
            "truncation": "disabled",
            "output": [],
            "usage": None,
            "lorauter": opening.decision(0),
        }

    def whole(self, pieces: Sequence[Piece], tokens: int) -> dict[str, Any]:
        """The response."""
        self.piece(0, pieces[0], tokens)
        self._finish()
        return self._ended(tokens)

    def first(self) -> bytes:
        """That there is a response, and that it is being made."""
        response = {"response": self._response}
        return self._event("response.created", response) + self._event("response.in_progress", response)

    def piece(self, _: int, piece: Piece, __: int) -> bytes:
        """A piece of the last item, or of a next one."""
        said = b""
        if told := piece.within.get("logprobs"):
            self._logprobs += told["content"]
        for part in piece.parts(self._length):
            logprobs, self._logprobs = self._logprobs, []
            if isinstance(part, str):
                said += self._message(part, logprobs)
                continue
            if part.id is not None:
                call = {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": ""}
                said += self._close() + self._add(call, "fc")
            if part.arguments:
                self._output[-1]["arguments"] += part.arguments
                said += self._of_last("response.function_call_arguments.delta", delta=part.arguments)
        self._length += len(piece.text)
        self._reason = piece.finish_reason
        return said

    def end(self, tokens: int) -> bytes:
        """The end of the last item, and the response."""
        said = self._finish()
        response = self._ended(tokens)
        return said + self._event(f"response.{response['status']}", {"response": response})

    def error(self, status: int, body: Mapping[str, Any]) -> bytes:
        """The error, and the response that failed of it."""
        error = body["error"]
        code = "server_error" if status >= 500 else "rate_limit_exceeded" if status == 429 else "invalid_prompt"
        told = {"code": error["code"] or code, "message": error["message"], "param": error["param"]}
        if self._output:
            self._output[-1]["status"] = "incomplete"
        failed = {"status": "failed", "output": self._output, "error": {"code": code, "message": error["message"]}}
        response = {"response": {**self._response, **failed}}
        return self._event("error", told) + self._event("response.failed", response)

    def _message(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> bytes:
        said = b""
        if not self._output or self._output[-1]["type"] != "message":
            said = self._close() + self._add({"type": "message", "role": "assistant", "content": []}, "msg")
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            said += self._of_last("response.content_part.added", content_index=0, part=part)
            self._output[-1]["content"].append(part)
        part = self._output[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        return said + self._of_last("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _add(self, item: dict[str, Any], kind: str) -> bytes:
        item = {"id": _id(kind), "status": "in_progress", **item}
        self._output.append(item)
        return self._event("response.output_item.added", {"output_index": len(self._output) - 1, "item": item})

    def _close(self) -> bytes:
        """The end of the last item, if there is one."""
        if not self._output:
            return b""
        item = self._output[-1]
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        if item["type"] == "message":
            [part] = item["content"]
            text = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
            said = self._of_last("response.output_text.done", **text)
            said += self._of_last("response.content_part.done", content_index=0, part=part)
        else:
            called = {"name": item["name"], "arguments": item["arguments"]}
            said = self._of_last("response.function_call_arguments.done", **called)
        return said + self._event("response.output_item.done", {"output_index": len(self._output) - 1, "item": item})

    def _finish(self) -> bytes:
        """The end of the output: an answer that says nothing is an empty message."""
        said = b""
        if not self._output or (self._logprobs and self._output[-1]["type"] == "message"):
            said = self._message("", self._logprobs)
        return said + self._close()

    def _ended(self, tokens: int) -> dict[str, Any]:
        cut = self._reason == "length"
        return {
            **self._response,
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": self._opening.prompt_tokens,
                "input_tokens_details": {"cached_tokens": self._opening.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self._opening.prompt_tokens + tokens,
            },
        }

    def _of_last(self, kind: str, **content: Any) -> bytes:
        """An event of the last item."""
        return self._event(kind, {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, **content})

    def _event(self, kind: str, content: Mapping[str, Any]) -> bytes:
        told = {"type": kind, "sequence_number": self._numbers, **content}
        self._numbers += 1
        return event(told, kind)


def _id(kind: str) -> str:
    return f"{kind}_{new_id()}"


def _asked(body: ResponsesBody) -> dict[str, Any]:
    """The options that a response repeats."""
    text, choice = body.text, body.tool_choice
    return {
        "model": body.model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs,
        "reasoning": {"effort": None, "summary": None},
        "text": {"format": text.format.told() if text and text.format else {"type": "text"}},
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "user": body.user,
    }
