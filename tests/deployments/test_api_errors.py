"""What the HTTP API refuses, and how it tells of what went wrong."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_service import BOTH, CHAT, COMPLETIONS, ROUTE, SECRET, FakeService, chat, events, post, refused, send, text

from lorauter.errors import (
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    CatalogError,
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    ObjectNotFound,
    Overloaded,
    ServiceUnavailable,
    StoreUnavailable,
)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


BAD: list[tuple[str, Any, str | None, str]] = [  # path, body, param, and a part of the message
    (CHAT, chat(surprise=1), "surprise", "unknown option surprise"),
    (CHAT, chat(tools=[{"type": "function"}]), "tools.0.function", "option tools.0.function: Field required"),
    (CHAT, chat(lorauter={"topk": 1}), "lorauter.topk", "unknown option lorauter.topk"),
    (COMPLETIONS, text(suffix="x"), "suffix", "option suffix: is not supported"),
    (ROUTE, {"input": "a", "adapters": {}}, "adapters", "unknown option adapters"),
    (CHAT, {"messages": chat()["messages"]}, "model", "model: Field required"),
    (CHAT, {"model": "lorauter", "temperature": 1}, "messages", "messages: Field required"),
    (COMPLETIONS, {"model": "lorauter"}, "prompt", "prompt: Field required"),
    (ROUTE, {}, "input", "input: Field required"),
    (CHAT, chat(model=5), "model", "(got 5)"),
    (CHAT, chat(max_tokens="5"), "max_tokens", '(got "5")'),
    (CHAT, chat(n=129), "n", "less than or equal to 128"),
    (CHAT, chat(n=True), "n", "valid integer (got true)"),
    (CHAT, chat(temperature=float("nan")), "temperature", "(got NaN)"),
    (CHAT, chat(stop=[""]), "stop", "empty"),
    (COMPLETIONS, text(stop=""), "stop", "empty"),
    (CHAT, chat(stop=5), "stop", "option stop: Input should be a text, or a list of at most 16 texts (got 5)"),
    (COMPLETIONS, text(prompt=[1, "a"]), "prompt", "a list of token ids"),
    (COMPLETIONS, text(prompt=[[-1]]), "prompt", "a list of token ids"),
    (COMPLETIONS, text(prompt=[]), "prompt", "empty"),
    (COMPLETIONS, text(prompt=["a", " "]), "prompt", "empty"),
    (COMPLETIONS, text(prompt=["a"] * 257), "prompt", "at most 256"),
    (CHAT, chat(text=""), "messages", "empty"),
    (CHAT, chat(text=" \n\t\u2003"), "messages", "empty"),
    (CHAT, chat(text=[]), "messages", "empty"),
    (CHAT, {"model": "lorauter", "messages": []}, "messages", "at least 1"),
    (CHAT, {"model": "lorauter", **message("assistant", "hi")}, "messages", "no user message"),
    (CHAT, {"model": "lorauter", **message("tool", "hi")}, "messages.0", "tool_call_id"),
    (CHAT, {"model": "lorauter", **message("robot", "hi")}, "messages.0.role", "'user'"),
    (COMPLETIONS, text(prompt=""), "prompt", "empty"),
    (COMPLETIONS, text(prompt=[" "]), "prompt", "empty"),
    (ROUTE, {"input": []}, "input", "empty"),
    (ROUTE, {"input": ["a", " "]}, "input[1]", "empty"),
    (CHAT, chat("base", lorauter={"adapters": {"poet": 1}}), "lorauter.adapters", "with model 'lorauter'"),
    (CHAT, chat("poet", lorauter={"adapters": {}}), "lorauter.adapters", "with model 'lorauter'"),
    (CHAT, chat(lorauter={"adapters": {"a": 1, "b": 1, "c": 0}}), "lorauter.adapters", "at most 2"),
    *[
        (COMPLETIONS, json.dumps(text(lorauter={"adapters": {"poet": 12345}})).replace("12345", number).encode(), *told)
        for number in ("NaN", "Infinity", "-Infinity", "1e999")
        for told in [("lorauter.adapters.poet", "finite")]
    ],
    (CHAT, b"", None, "Invalid JSON"),
    (CHAT, b"{", None, "Invalid JSON"),
    (CHAT, b"[1, 2]", None, "object"),
    (CHAT, b"null", None, "object"),
    (CHAT, json.dumps(chat()).encode() + b"}", None, "Invalid JSON"),
    (CHAT, json.dumps(chat()).replace("hi", "\xff").encode("latin-1"), None, "Invalid JSON"),
    (CHAT, json.dumps(chat()).replace("hi", "\\ud800").encode(), None, "Invalid JSON"),
    (CHAT, b"[" * 100_000, None, "Invalid JSON"),
    (CHAT, b'{"metadata": ' + b'{"a": ' * 100_000, None, "Invalid JSON"),
]


@pytest.mark.parametrize(("path", "body", "param", "part"), BAD)
def test_bad_input_is_a_400_that_names_the_option(path: str, body: Any, param: str | None, part: str) -> None:
    service = FakeService()
    error = refused(post(service, path, body, max_adapters=2), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert part in error["message"]
    assert service.calls == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"model": "lorauter", "prompt": SECRET}),
        (CHAT, message("user", SECRET)),
        (CHAT, chat(text=[{"type": "text", "text": SECRET, "style": "bold"}])),
        (CHAT, chat(text={"type": "text", "text": SECRET})),
        (COMPLETIONS, {"prompt": SECRET}),
        (COMPLETIONS, text(prompt=[SECRET, 5])),
        (COMPLETIONS, chat(text=SECRET)),
        (ROUTE, {"input": SECRET, "top_k": 0}),
        (CHAT, json.dumps(SECRET).encode()),
        (CHAT, json.dumps(chat(text=SECRET)).encode()[:-1]),
        (CHAT, chat(model="x", temperature=SECRET * 100)),
        (CHAT, chat(**{"x" * 500 + SECRET: 1})),
    ],
)
def test_an_error_does_not_repeat_the_prompt(path: str, body: Any) -> None:
    assert SECRET not in refused(post(FakeService(), path, body), 400)["message"]


def test_a_body_that_is_wrong_everywhere_is_refused_at_once() -> None:
    body = b'{"model": "lorauter", "messages": [' + b"1," * 500_000 + b"1]}"
    started = time.perf_counter()
    refused(post(FakeService(), CHAT, body), 400)
    assert time.perf_counter() - started < 3


def test_the_bodys_limit() -> None:
    body = json.dumps(chat()).encode()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 20

    async def pieces() -> AsyncIterator[bytes]:
        for i in range(0, len(body), 7):
            yield body[i : i + 7]

    service = FakeService()
    for content in (body, pieces()):
        assert post(service, CHAT, content, max_body_bytes=len(body)).status_code == 200
    for content in (body, pieces(), endless()):
        error = refused(post(service, CHAT, content, max_body_bytes=len(body) - 1), 413)
        assert error["type"] == "invalid_request_error"
        assert f"{len(body) - 1} bytes" in error["message"]
    assert len(service.calls) == 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/images/generations", 404),
        ("GET", CHAT, 405),
        ("GET", ROUTE, 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/adder", 405),
    ],
)
def test_unknown_paths_and_wrong_methods(method: str, path: str, status: int) -> None:
    response = send(FakeService(), method, path)
    assert refused(response, status)["type"] == "invalid_request_error"
    assert (status == 405) == ("allow" in response.headers)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models/nowhere", None),
        ("/v1/models/Adder", None),
        (CHAT, chat("a/../b")),
        (CHAT, chat("")),
        (CHAT, chat("x" * 10_000)),
        ("/v1/models/" + "x" * 10_000, None),
        (CHAT, chat(lorauter={"adapters": {"x" * 10_000: 1}})),
        (COMPLETIONS, text("adder\r\nx-injected: 1")),
        (CHAT, chat(lorauter={"adapters": {"bad name": 1}})),
    ],
)
def test_a_model_that_cannot_be_is_a_404(path: str, body: Any) -> None:
    service = FakeService()
    response = send(service, "GET", path) if body is None else post(service, path, body)
    assert refused(response, 404, "model_not_found")["type"] == "invalid_request_error"
    assert service.calls == []


ERRORS: list[tuple[Exception, int, str, str | None]] = [
    (ContextLengthExceeded(5000, 2048), 400, "invalid_request_error", "context_length_exceeded"),
    (InvalidRequest("no good", param="seed"), 400, "invalid_request_error", None),
    (AdapterNotFound("not there", adapter="poet"), 404, "invalid_request_error", "model_not_found"),
    (AdapterRejected("has NaNs", adapter="poet"), 422, "invalid_request_error", "adapter_rejected"),
    (AdapterUnavailable("store down", adapter="poet"), 503, "service_unavailable", "adapter_unavailable"),
    (Overloaded("full", retry_after_s=2.2), 429, "rate_limit_error", "overloaded"),
    (StoreUnavailable("down", uri="s3://b"), 503, "service_unavailable", "store_unavailable"),
    (ObjectNotFound("s3://b/k"), 503, "service_unavailable", "store_unavailable"),
    (CatalogError("gone", uri="s3://b"), 503, "service_unavailable", "catalog_unavailable"),
    (ServiceUnavailable("restarting"), 503, "service_unavailable", "service_unavailable"),
    (ConfigError("wrong setting"), 500, "server_error", None),
]


def without_uri(error: Exception) -> str:
    return str(error).replace("s3://b/k", "(withheld)").replace("s3://b", "(withheld)")


IDS = [type(error).__name__ for error, *_ in ERRORS]


@pytest.mark.parametrize(("error", "status", "kind", "code"), ERRORS, ids=IDS)
@pytest.mark.parametrize(("where", "stream"), [("route", False), ("first", False), ("first", True)])
def test_an_error_before_the_first_token_has_its_own_status(
    error: Exception, status: int, kind: str, code: str | None, where: str, stream: bool
) -> None:
    service = FakeService(**{f"{where}_error": error})
    for path, body in ((CHAT, chat(stream=stream)), (COMPLETIONS, text(stream=stream))):
        response = post(service, path, body)
        told = refused(response, status, code)
        assert told["message"] == without_uri(error)
        assert (told["type"], told["param"]) == (kind, getattr(error, "param", None))
        assert ("retry-after" in response.headers) == (status == 429)
    assert service.running == 0


@pytest.mark.parametrize(("error", "status", "kind", "code"), ERRORS, ids=IDS)
def test_the_other_endpoints_tell_of_errors_likewise(
    error: Exception, status: int, kind: str, code: str | None
) -> None:
    service = FakeService(route_error=error)
    for path in ("/v1/models", "/v1/models/poet", "/v1/tasks"):
        assert refused(send(service, "GET", path), status, code)["type"] == kind
    assert refused(post(service, ROUTE, {"input": "a"}), status, code)["message"] == without_uri(error)
    assert send(service, "GET", "/v1/models/base").status_code == 200


@BOTH
def test_where_the_replicas_are_full_nothing_is_routed(path: str, body: Any) -> None:
    service = FakeService(load_error=Overloaded("full", retry_after_s=2))
    response = post(service, path, body())
    refused(response, 429, "overloaded")
    assert response.headers["retry-after"] == "2"
    assert (service.routed, service.calls) == ([], [])
    assert post(service, ROUTE, {"input": "a"}).status_code == 200


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.4, "1"), (1.0, "1"), (1.2, "2"), (2.5, "3")])
def test_retry_after_is_whole_seconds_and_not_too_early(seconds: float, header: str) -> None:
    service = FakeService(first_error=Overloaded("full", retry_after_s=seconds))
    assert post(service, CHAT, chat()).headers["retry-after"] == header


@BOTH
@pytest.mark.parametrize("where", ["route", "first", "late"])
def test_what_is_not_ours_is_logged_and_not_told(
    path: str, body: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = FakeService(**{f"{where}_error": KeyError("/secret/path")})
    error = refused(post(service, path, body()), 500)
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
    assert "/secret/path" in caplog.text
    assert service.running == 0


@BOTH
@pytest.mark.parametrize("error", [AdapterRejected("has NaNs", adapter="poet"), RuntimeError("/secret/path")])
def test_an_error_on_the_way_ends_the_stream(path: str, body: Any, error: Exception) -> None:
    service = FakeService(late_error=error)
    response = post(service, path, body(stream=True, stream_options={"include_usage": True}))
    assert response.status_code == 200
    first, second, last, done = events(response)
    assert done == "[DONE]"
    assert "lorauter" in first
    assert second["choices"][0]["finish_reason"] is None
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in last["error"]["message"]
    assert service.running == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chat(text="x" * 11), "messages"),
        (CHAT, {"model": "base", "messages": [{"role": "user", "content": "x" * 6}] * 2}, "messages"),
        (COMPLETIONS, text(prompt="x" * 11), "prompt"),
        (ROUTE, {"input": ["x", "x" * 11]}, "input"),
    ],
)
def test_a_prompt_too_long_is_refused_before_anything_is_done(path: str, body: Any, param: str) -> None:
    service = FakeService()
    error = refused(post(service, path, body, max_prompt_chars=10), 400)
    assert error["param"] == param
    assert "at most 10" in error["message"]
    assert service.calls == service.routed == []
