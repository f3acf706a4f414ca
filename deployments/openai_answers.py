"""Answers and errors in OpenAI's shape, as the HTTP API sends and a batch job writes them. Knows no HTTP and no Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from deployments.answers import Opening, Piece
from deployments.encoded import encoded, event, new_id
from deployments.told import Audience, told
from lorauter.errors import (
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    CatalogError,
    CatalogVersionNotFound,
    CompositionNotFound,
    Conflict,
    ContextLengthExceeded,
    InvalidRequest,
    LorauterError,
    Overloaded,
    PermissionDenied,
    RateLimited,
    ReadOnlyStore,
    ServiceUnavailable,
    StoreError,
    TaskError,
    TaskNotFound,
    Unauthenticated,
)
from lorauter.tools.types import CallPiece

logger = logging.getLogger("lorauter.api")

Calls = Sequence[CallPiece]

_MARK = new_id()  # in a text's place, where all else is encoded once
_UNKNOWN = "internal error; the server's log says more"

# (status, type, code) of each error that may reach a client; the first class that fits counts.
_STATUS: list[tuple[type[LorauterError], int, str, str | None]] = [
    (ContextLengthExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    (InvalidRequest, 400, "invalid_request_error", None),
    (TaskNotFound, 404, "invalid_request_error", "task_not_found"),
    (TaskError, 400, "invalid_request_error", None),
    (AdapterNotFound, 404, "invalid_request_error", "model_not_found"),
    (AdapterRejected, 422, "invalid_request_error", "adapter_rejected"),
    (AdapterUnavailable, 503, "service_unavailable", "adapter_unavailable"),
    (CompositionNotFound, 404, "invalid_request_error", "composition_not_found"),
    (Conflict, 409, "conflict_error", "conflict"),
    (Unauthenticated, 401, "invalid_request_error", "invalid_api_key"),
    (PermissionDenied, 403, "permission_error", "permission_denied"),
    (RateLimited, 429, "rate_limit_error", "rate_limit_exceeded"),
    (Overloaded, 429, "rate_limit_error", "overloaded"),
    (ReadOnlyStore, 409, "conflict_error", "read_only_store"),
    (StoreError, 503, "service_unavailable", "store_unavailable"),
    (CatalogVersionNotFound, 404, "invalid_request_error", "catalog_version_not_found"),
    (CatalogError, 503, "service_unavailable", "catalog_unavailable"),
    (ServiceUnavailable, 503, "service_unavailable", "service_unavailable"),
]


@dataclass(frozen=True)
class Shape:
    """What differs between the answers of OpenAI's older endpoints.

    Attributes:
        called: why an answer ended that has called something.
    """

    prompt: str
    prefix: str
    whole: str
    piece: str
    body: Callable[[str, Calls], dict[str, Any]]
    delta: Callable[[str, Calls], dict[str, Any]]
    first: dict[str, Any]
    called: str = "tool_calls"
    ping: bytes = b": ping\n\n"

    def named(self, option: str) -> str:
        """What its clients call an option."""
        return self.prompt if option == "prompt" else option

    def open(self, opening: Opening) -> OpenAIWriter:
        """What writes the answers to a request."""
        return OpenAIWriter(self, opening)

    def choice(
        self, index: int, text: str, finish_reason: str | None, calls: Calls = (), **beside: Any
    ) -> dict[str, Any]:
        """A choice of a whole answer."""
        return {"index": index, **self.body(text, calls), "finish_reason": finish_reason, "logprobs": None, **beside}

    def head(self, model: str, *, stream: bool) -> dict[str, Any]:
        """What an answer, or each of its events, begins with."""
        return {
            "id": f"{self.prefix}-{new_id()}",
            "object": self.piece if stream else self.whole,
            "created": int(time.time()),
            "model": model,
        }


def _message(text: str, calls: Calls) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
    return {"message": message}


def _call(call: CallPiece) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _delta(text: str, calls: Calls) -> dict[str, Any]:
    delta: dict[str, Any] = {"content": text} if text else {}
    if calls:
        delta["tool_calls"] = [
            {"index": call.index, **({"function": {"arguments": call.arguments}} if call.id is None else _call(call))}
            for call in calls
        ]
    return {"delta": delta}


def _function_message(text: str, calls: Calls) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    for call in calls[:1]:
        message |= {"content": text or None, "function_call": _call(call)["function"]}
    return {"message": message}


def _function_delta(text: str, calls: Calls) -> dict[str, Any]:
    delta: dict[str, Any] = {"content": text} if text else {}
    if calls:
        name = {} if calls[0].name is None else {"name": calls[0].name}
        delta["function_call"] = {**name, "arguments": "".join(call.arguments for call in calls)}
    return {"delta": delta}


CHAT = Shape(
    "messages",
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    _message,
    _delta,
    {"delta": {"role": "assistant", "content": ""}},
)
FUNCTIONS = replace(CHAT, body=_function_message, delta=_function_delta, called="function_call")
"""Of chats with `functions`, which are tools by an older name, of which one is called."""
TEXT = Shape(
    "prompt",
    "cmpl",
    "text_completion",
    "text_completion",
    lambda text, _: {"text": text},
    lambda text, _: {"text": text},
    {"text": ""},
)


class EventEncoder:
    """A choice's server-sent events. What all its pieces have in common is encoded once.

    Args:
        head: the fields that every event has.
        shape: the endpoint's.
        index: the choice's.
    """

    def __init__(self, head: Mapping[str, Any], shape: Shape, index: int = 0) -> None:
        self._head = head
        self._shape = shape
        self._index = index

    @cached_property
    def _around(self) -> tuple[bytes, bytes]:
        """What is before and after a text in an event that has nothing else."""
        before, after = self._piece(_MARK, None).split(encoded(_MARK))
        return before, after

    def first(self, within: Mapping[str, Any], **beside: Any) -> bytes:
        """The event that goes before the answer's pieces, with what goes beside its text, and beside the choices."""
        return event({**self._head, **self._choice(self._shape.first, None, within), **beside})

    def piece(
        self,
        text: str,
        finish_reason: str | None,
        within: Mapping[str, Any] | None = None,
        calls: Calls = (),
        **beside: Any,
    ) -> bytes:
        """The event of a piece of the answer.

        Args:
            text: the piece.
            finish_reason: why it is the last.
            within: what goes beside it in the choice.
            calls: pieces of calls.
            beside: what goes beside the choices.
        """
        if text and finish_reason is None and not beside and not within and not calls:
            before, after = self._around
            return before + encoded(text) + after
        return self._piece(text, finish_reason, within or {}, calls, **beside)

    def _piece(
        self,
        text: str,
        finish_reason: str | None,
        within: Mapping[str, Any] = MappingProxyType({}),
        calls: Calls = (),
        **beside: Any,
    ) -> bytes:
        return event({**self._head, **self._choice(self._shape.delta(text, calls), finish_reason, within), **beside})

    def _choice(
        self, content: dict[str, Any], finish_reason: str | None, within: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        choice = {"index": self._index, **content, "finish_reason": finish_reason, "logprobs": None, **within}
        return {"choices": [choice]}


LAST_EVENT = b"data: [DONE]\n\n"


class OpenAIWriter:
    """Writes the answers to a request.

    Args:
        shape: the endpoint's.
        opening: what is known of them.
    """

    def __init__(self, shape: Shape, opening: Opening) -> None:
        body = opening.body
        self._shape = shape
        self._opening = opening
        self._head = {**shape.head(body.model, stream=body.stream), "system_fingerprint": opening.fingerprint}
        self._encoders = [EventEncoder(self._head, shape, place) for place in range(opening.choices)]
        options = body.stream_options
        self._with_usage = options is not None and options.include_usage
        self._continuous = options is not None and self._with_usage and options.continuous_usage_stats

    def whole(self, pieces: Sequence[Piece], tokens: int) -> dict[str, Any]:
        """The body of an answer that is whole. Choices of several prompts have each their prompt's decision."""
        several = len(self._opening.decisions) > 1
        choices: list[dict[str, Any]] = []
        beside: dict[str, Any] = {}
        for place, piece in enumerate(pieces):
            own = {"lorauter": self._opening.decision(place)} if several else {}
            reason = self._reason(piece)
            within, of_all = self._of_prompt(place)
            within = {**within, **piece.within, **own}
            choices.append(self._shape.choice(place, piece.text, reason, piece.calls, **within))
            beside = {**of_all, **piece.beside, **beside}
        answer = {**self._head, "choices": choices, "usage": self._usage(tokens), **beside}
        return answer if several else {**answer, "lorauter": self._opening.decision(0)}

    def first(self) -> bytes:
        """Of each choice the role, its decision, and its prompt's tokens."""
        said = b""
        for place, encoder in enumerate(self._encoders):
            within, beside = self._of_prompt(place)
            said += encoder.first(within, lorauter=self._opening.decision(place), **beside, **self._so_far(0))
        return said

    def piece(self, choice: int, piece: Piece, tokens: int) -> bytes:
        """The text, then pieces of calls, then the reason by itself; what goes beside them, with the first."""
        encoder, said = self._encoders[choice], b""
        within, beside = piece.within, piece.beside
        if piece.text or ((within or beside) and not piece.calls):
            said = encoder.piece(piece.text, None, within, **beside, **self._so_far(tokens))
            within, beside = {}, {}
        for call in piece.calls:  # clients look at the first of an event alone
            said += encoder.piece("", None, within, (call,), **beside, **self._so_far(tokens))
            within, beside = {}, {}
        if piece.finish_reason:
            said += encoder.piece("", self._reason(piece), **piece.ending, **self._so_far(tokens))
        return said

    def end(self, tokens: int) -> bytes:
        """The usage, if it is wanted, and `[DONE]`."""
        usage = event({**self._head, "choices": [], "usage": self._usage(tokens)}) if self._with_usage else b""
        return usage + LAST_EVENT

    def error(self, _: int, body: Mapping[str, Any]) -> bytes:
        """The error, and `[DONE]`."""
        return event(body) + LAST_EVENT

    def _reason(self, piece: Piece) -> str | None:
        """Why a choice ended. Where the tool was named, a call is no reason to OpenAI."""
        if piece.finish_reason != "tool_calls":
            return piece.finish_reason
        return "stop" if self._opening.body.names_a_tool else self._shape.called

    def _of_prompt(self, choice: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is told of a choice's prompt, within the choice and beside all."""
        if not self._opening.prompts:
            return {}, {}
        told = {"prompt_token_ids": self._opening.prompts[choice // (self._opening.body.n or 1)]}
        return ({}, told) if self._shape.prompt == "messages" else (told, {})

    def _usage(self, tokens: int) -> dict[str, Any]:
        return usage(self._opening.prompt_tokens, tokens, cached_tokens=self._opening.cached_tokens)

    def _so_far(self, tokens: int) -> dict[str, Any]:
        return {"usage": self._usage(tokens)} if self._continuous else {}


def usage(prompt_tokens: int, completion_tokens: int, *, cached_tokens: int = 0) -> dict[str, Any]:
    """What an answer took, and how much of its prompt was found computed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def error_answer(error: Exception, audience: Audience) -> tuple[int, dict[str, Any]]:
    """Status and body of an error for whoever reads it; what is not ours is logged and told to nobody."""
    for kind, status, type_, code in _STATUS:
        if isinstance(error, kind):
            message, param = told(error, audience), getattr(error, "param", None)
            return status, error_object(message, type_, param, code)
    logger.error("request failed", exc_info=error)
    message = told(error, audience) if isinstance(error, LorauterError) and audience != "limited" else _UNKNOWN
    return 500, error_object(message, "server_error")


def error_object(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
