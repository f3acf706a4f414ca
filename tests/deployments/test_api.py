"""The HTTP API in process, over a service that is a few lines long."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette

from deployments.access import Access
from deployments.api import build_api
from deployments.calls import Admitted, CatalogDescription, GenerateCall, Prompt
from deployments.config import AccessSettings, ApiSettings
from deployments.limits import TokenBuckets
from lorauter.engine.types import Chunk, SamplingParams
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
from lorauter.keys import hash_key
from lorauter.routing import AdapterWeight, RoutingDecision, RoutingOptions, TaskScore, check_text

CHAT, COMPLETIONS, ROUTE = "/v1/chat/completions", "/v1/completions", "/v1/route"
DECISION = RoutingDecision(
    "v1",
    (TaskScore("sums", 0.91239, 0.8), TaskScore("poems", 0.5, 0.2)),
    (AdapterWeight("adder", 0.75), AdapterWeight("poet", 0.25)),
    0.64,
)
BY_HAND = {"catalog_version": None, "tasks": [], "confidence": None}
SECRET = "the secret in the prompt"


@dataclass
class FakeService:
    """Says "Hello" in three tokens, and keeps what it was asked.

    Attributes:
        route_error: raised by `route`, `describe` and `check_ready`.
        load_error: raised by `check_load`.
        first_error: raised by `generate` at once.
        late_error: raised by `generate` after its first chunk.
        pause: awaited by `generate` after its first chunk.
    """

    route_error: Exception | None = None
    load_error: Exception | None = None
    first_error: Exception | None = None
    late_error: Exception | None = None
    pause: Callable[[], Awaitable[object]] | None = None
    routed: list[tuple[list[str], RoutingOptions]] = field(default_factory=list)
    calls: list[GenerateCall] = field(default_factory=list)
    running: int = 0

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        for i, text in enumerate(texts):
            check_text(text, param=f"input[{i}]")
        await self.check_ready()
        self.routed.append((list(texts), options))
        return [DECISION] * len(texts)

    def check_load(self) -> None:
        if self.load_error:
            raise self.load_error

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        self.calls.append(call)
        self.running += 1
        try:
            if self.first_error:
                raise self.first_error
            yield Admitted(7)
            yield Chunk("Hé", (1,))
            if self.pause:
                await self.pause()
            if self.late_error:
                raise self.late_error
            yield Chunk("", (2,))
            yield Chunk("llo", (3,), "stop")
        finally:
            self.running -= 1

    async def describe(self) -> CatalogDescription:
        await self.check_ready()
        return CatalogDescription("v1", [{"id": "sums", "object": "task"}], ["adder", "poet"])

    async def check_ready(self) -> None:
        if self.route_error:
            raise self.route_error


def transport(app: Starlette) -> httpx.ASGITransport:
    return httpx.ASGITransport(app, raise_app_exceptions=False)


def send(service: FakeService, method: str, path: str, settings: dict[str, Any] | None = None, **content: Any) -> Any:
    """One request; `content` is httpx's."""

    async def talk() -> httpx.Response:
        app = build_api(service, ApiSettings(**(settings or {})))
        async with httpx.AsyncClient(transport=transport(app), base_url="http://lorauter") as client:
            return await client.request(method, path, **content)

    return asyncio.run(talk())


def post(service: FakeService, path: str, body: Any, **settings: Any) -> Any:
    """POST a JSON value, or raw bytes, or an async iterator of bytes."""
    if not hasattr(body, "__aiter__") and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return send(service, "POST", path, settings, content=body)


def chat(model: str = "lorauter", text: Any = "hi", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **options}


def text(model: str = "lorauter", prompt: Any = "hi", **options: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, **options}


BOTH = pytest.mark.parametrize(("path", "body"), [(CHAT, chat), (COMPLETIONS, text)], ids=["chat", "text"])


def events(response: httpx.Response) -> list[Any]:
    """A stream's events, decoded; `[DONE]` stays a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, end = response.text.split("\n\n")
    assert end == ""
    assert all(piece.startswith("data: ") and "\n" not in piece for piece in pieces)
    data = [piece.removeprefix("data: ") for piece in pieces]
    return [piece if piece == "[DONE]" else json.loads(piece) for piece in data]


def refused(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The error of a response in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1000
    return error


# Answers


@pytest.mark.parametrize(
    ("path", "body", "prefix", "kind", "content"),
    [
        (CHAT, chat, "chatcmpl", "chat.completion", {"message": {"role": "assistant", "content": "Héllo"}}),
        (COMPLETIONS, text, "cmpl", "text_completion", {"text": "Héllo"}),
    ],
)
def test_an_answer(path: str, body: Any, prefix: str, kind: str, content: dict[str, Any]) -> None:
    response = post(FakeService(), path, body())
    answer = response.json()
    assert re.fullmatch(rf"{prefix}-[0-9a-f]{{32}}", answer.pop("id"))
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer == {
        "object": kind,
        "model": "lorauter",
        "choices": [{"index": 0, **content, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        "lorauter": {
            "catalog_version": "v1",
            "tasks": [
                {"name": "sums", "score": 0.91239, "probability": 0.8},
                {"name": "poems", "score": 0.5, "probability": 0.2},
            ],
            "adapters": [{"name": "adder", "weight": 0.75}, {"name": "poet", "weight": 0.25}],
            "confidence": 0.64,
        },
    }
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-lorauter-tasks"] == "sums=0.9124,poems=0.5000"
    assert response.headers["x-lorauter-adapters"] == "adder=0.7500,poet=0.2500"


@pytest.mark.parametrize("with_usage", [None, False, True])
@pytest.mark.parametrize(
    ("path", "body", "prefix", "kind", "contents"),
    [
        (
            *(CHAT, chat, "chatcmpl", "chat.completion.chunk"),
            [
                {"delta": {"role": "assistant", "content": ""}},
                {"delta": {"content": "Hé"}},
                {"delta": {"content": "llo"}},
            ],
        ),
        (COMPLETIONS, text, "cmpl", "text_completion", [{"text": ""}, {"text": "Hé"}, {"text": "llo"}]),
    ],
    ids=["chat", "text"],
)
def test_a_stream(path: str, body: Any, prefix: str, kind: str, contents: list[Any], with_usage: bool | None) -> None:
    options = {} if with_usage is None else {"stream_options": {"include_usage": with_usage}}
    response = post(FakeService(), path, body(stream=True, **options))
    *pieces, done = events(response)
    assert done == "[DONE]"
    assert {(piece["object"], piece["model"]) for piece in pieces} == {(kind, "lorauter")}
    assert len({(piece["id"], piece["created"]) for piece in pieces}) == 1
    assert re.fullmatch(rf"{prefix}-[0-9a-f]{{32}}", pieces[0]["id"])
    assert pieces[0]["lorauter"] == DECISION.to_json()
    assert response.headers["x-lorauter-adapters"] == "adder=0.7500,poet=0.2500"
    if with_usage:
        last = pieces.pop()
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert not any("usage" in piece for piece in pieces)
    assert [piece["choices"] for piece in pieces] == [
        [{"index": 0, **content, "finish_reason": reason, "logprobs": None}]
        for content, reason in zip(contents, [None, None, "stop"], strict=True)
    ]


def test_a_chat_piece_without_text_has_an_empty_delta() -> None:
    class Silent(FakeService):
        async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
            yield Admitted(1)
            yield Chunk("", (1,), "length")

    _, last, _ = events(post(Silent(), CHAT, chat(stream=True)))
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length", "logprobs": None}]


@BOTH
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "lorauter", "adapters"),
    [
        ("base", {}, []),
        ("poet", {}, [("poet", 1.0)]),
        ("lorauter", {"adapters": {"poet": 0.5, "adder": -2}}, [("poet", 0.5), ("adder", -2.0)]),
        ("lorauter", {"adapters": {"poet": 0, "adder": 1}}, [("adder", 1.0)]),
        ("lorauter", {"adapters": {"poet": -0.0}}, []),
        ("lorauter", {"adapters": {}}, []),
    ],
)
def test_adapters_by_name_or_by_hand_are_not_routed(
    path: str, body: Any, stream: bool, model: str, lorauter: dict[str, Any], adapters: list[Any]
) -> None:
    service = FakeService()
    response = post(service, path, body(model, lorauter=lorauter, stream=stream))
    answer = events(response)[0] if stream else response.json()
    assert answer["model"] == model
    assert answer["lorauter"] == {**BY_HAND, "adapters": [{"name": n, "weight": w} for n, w in adapters]}
    assert response.headers["x-lorauter-tasks"] == ""
    assert response.headers["x-lorauter-adapters"] == ",".join(f"{n}={w:.4f}" for n, w in adapters)
    assert service.routed == []
    assert list(service.calls[0].adapters) == adapters


def test_what_is_routed_goes_to_the_engine_under_the_decision() -> None:
    service = FakeService()
    options = {"top_k": 2, "temperature": 0.5, "exclude_tasks": ["a"], "exclude_adapters": ["b"], "allow_adapters": []}
    post(service, CHAT, chat(lorauter=options, temperature=0, max_tokens=5, top_p=0.5, stop="x", seed=3))
    [(texts, taken)] = service.routed
    assert texts == ["hi"]
    assert json.loads(taken.model_dump_json(include=set(options))) == options
    assert service.calls == [
        GenerateCall(
            Prompt(messages=({"role": "user", "content": "hi"},)),
            (("adder", 0.75), ("poet", 0.25)),
            SamplingParams(max_tokens=5, temperature=0, top_p=0.5, stop=("x",), seed=3),
        )
    ]


@pytest.mark.parametrize(
    ("route_on", "routed"), [("last_user_message", "two words"), ("conversation", "Be kind.\none\nyes\ntwo words\nso")]
)
def test_the_text_of_a_chat_that_is_routed(route_on: str, routed: str) -> None:
    turns = [
        ("developer", "Be kind."),
        ("user", "one"),
        ("assistant", "yes"),
        ("user", [{"type": "text", "text": "two "}, {"type": "text", "text": "words"}]),
        ("assistant", "so"),
    ]
    service = FakeService()
    body = {"model": "lorauter", "messages": [{"role": role, "content": content} for role, content in turns]}
    assert post(service, CHAT, body, route_on=route_on).status_code == 200
    assert service.routed[0][0] == [routed]
    contents = ["Be kind.", "one", "yes", "two words", "so"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert service.calls[0].prompt == Prompt(
        messages=tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=True))
    )


@BOTH
def test_defaults_come_from_the_settings(path: str, body: Any) -> None:
    service = FakeService()
    post(service, path, body(), default_max_tokens=11, default_temperature=0.7)
    post(service, path, body())
    assert [call.sampling for call in service.calls] == [
        SamplingParams(max_tokens=11, temperature=0.7),
        SamplingParams(max_tokens=256, temperature=0.0),
    ]


def test_a_plain_prompt_is_routed_as_it_is() -> None:
    service = FakeService()
    post(service, COMPLETIONS, text(prompt=[" two words\n"], max_tokens=1))
    assert service.routed[0][0] == [" two words\n"]
    assert service.calls[0].prompt == Prompt(text=" two words\n")


@pytest.mark.parametrize("given", ["one", ["one"], ["one", "two"]])
def test_route(given: str | list[str]) -> None:
    service = FakeService()
    answer = post(service, ROUTE, {"input": given, "top_k": 1, "exclude_tasks": ["x"]}).json()
    texts = [given] if isinstance(given, str) else given
    assert answer == {"object": "list", "data": [{"index": i, **DECISION.to_json()} for i in range(len(texts))]}
    assert answer["data"][0]["confidence"] == 0.64
    assert [task["probability"] for task in answer["data"][0]["tasks"]] == [0.8, 0.2]
    [(routed, options)] = service.routed
    assert (routed, options.top_k, options.exclude_tasks) == (texts, 1, {"x"})
    assert service.calls == []


def test_models_tasks_and_health() -> None:
    def get(path: str) -> Any:
        response = send(FakeService(), "GET", path)
        assert response.status_code == 200
        return response.json()

    row = {"object": "model", "created": 0, "owned_by": "lorauter"}
    own = [{"id": name, **row} for name in ("lorauter", "base")]
    adapters = [{"id": name, **row, "parent": "base"} for name in ("adder", "poet")]
    assert get("/v1/models") == {"object": "list", "data": own + adapters}
    assert [get(f"/v1/models/{model['id']}") for model in own + adapters] == own + adapters
    assert get("/v1/tasks") == {"object": "list", "catalog_version": "v1", "data": [{"id": "sums", "object": "task"}]}
    assert get("/healthz") == {"status": "ok"}


def test_a_catalog_that_is_refused_is_told_of() -> None:
    class Refusing(FakeService):
        async def describe(self) -> CatalogDescription:
            return CatalogDescription("v1", [], [], ("v2", "is damaged"))

    told = send(Refusing(), "GET", "/v1/tasks").json()
    assert (told["catalog_version"], told["refused"]) == ("v1", {"version": "v2", "reason": "is damaged"})


# Adapters that were removed since the catalog was made


@dataclass
class Forgetful(FakeService):
    """Lacks some adapters that its catalog has; routes to those that are not excluded."""

    gone: frozenset[str] = frozenset()

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        [decision] = await super().route(texts, options)
        return [replace(decision, adapters=tuple(a for a in decision.adapters if options.allows(a.name)))]

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        for name, _ in call.adapters:
            if name in self.gone:
                raise AdapterNotFound("not found", adapter=name)
        async for item in super().generate(call):
            yield item


@BOTH
@pytest.mark.parametrize(("gone", "left"), [({"adder"}, ["poet"]), ({"poet"}, ["adder"]), ({"adder", "poet"}, [])])
def test_a_routed_request_goes_on_without_an_adapter_that_is_gone(
    path: str, body: Any, gone: set[str], left: list[str]
) -> None:
    service = Forgetful(gone=frozenset(gone))
    response = post(service, path, body(lorauter={"exclude_adapters": ["other"]}))
    assert response.status_code == 200
    assert [adapter["name"] for adapter in response.json()["lorauter"]["adapters"]] == left
    assert service.routed[-1][1].exclude_adapters == gone | {"other"}


@BOTH
def test_who_names_an_adapter_that_is_gone_is_told(path: str, body: Any) -> None:
    service = Forgetful(gone=frozenset({"adder"}))
    for asked in (body(model="adder"), body(lorauter={"adapters": {"adder": 1.0}})):
        assert refused(post(service, path, asked), 404, "model_not_found")
    assert service.routed == []


# Errors


def message(role: str, content: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


BAD: list[tuple[str, Any, str | None, str]] = [  # path, body, param, and a part of the message
    (CHAT, chat(surprise=1), "surprise", "unknown option surprise"),
    (CHAT, chat(tools=[]), "tools", "unknown option tools"),
    (CHAT, chat(lorauter={"topk": 1}), "lorauter.topk", "unknown option lorauter.topk"),
    (COMPLETIONS, text(suffix="x"), "suffix", "unknown option suffix"),
    (ROUTE, {"input": "a", "adapters": {}}, "adapters", "unknown option adapters"),
    (CHAT, {"messages": chat()["messages"]}, "model", "model: Field required"),
    (CHAT, {"model": "lorauter", "temperature": 1}, "messages", "messages: Field required"),
    (COMPLETIONS, {"model": "lorauter"}, "prompt", "prompt: Field required"),
    (ROUTE, {}, "input", "input: Field required"),
    (CHAT, chat(model=5), "model", "(got 5)"),
    (CHAT, chat(max_tokens="5"), "max_tokens", '(got "5")'),
    (CHAT, chat(n=2), "n", "should be 1 (got 2)"),
    (CHAT, chat(temperature=float("nan")), "temperature", "(got NaN)"),
    (CHAT, chat(stop=[""]), "stop", "empty"),
    (COMPLETIONS, text(stop=""), "stop", "empty"),
    (CHAT, chat(stop=5), "stop.str", "option stop"),
    (CHAT, chat(text=""), "messages", "empty"),
    (CHAT, chat(text=" \n\t\u2003"), "messages", "empty"),
    (CHAT, chat(text=[]), "messages", "empty"),
    (CHAT, chat("base", text=" "), "messages", "empty"),
    (CHAT, {"model": "lorauter", "messages": []}, "messages", "at least 1"),
    (CHAT, {"model": "lorauter", **message("assistant", "hi")}, "messages", "no user message"),
    (CHAT, {"model": "lorauter", **message("tool", "hi")}, "messages.0.role", "'user'"),
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
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
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
        assert told["message"] == str(error)
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
    assert refused(post(service, ROUTE, {"input": "a"}), status, code)["message"] == str(error)
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
    first, second, last = events(response)
    assert "lorauter" in first
    assert second["choices"][0]["finish_reason"] is None
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in last["error"]["message"]
    assert service.running == 0


# Clients that leave, and the start


@pytest.mark.parametrize("spec", ["2.0", "2.4"])  # how servers tell of it: by a message, or where they send
@pytest.mark.parametrize("when", ["at the first event", "while sending", "while waiting"])
@BOTH
def test_a_client_that_leaves_ends_its_call(path: str, body: Any, when: str, spec: str) -> None:
    async def leave() -> int:
        gone, waiting = asyncio.Event(), asyncio.Event()

        async def pause() -> None:
            waiting.set()
            if when == "while waiting":
                await asyncio.Event().wait()

        requests = [{"type": "http.request", "body": json.dumps(body(stream=True)).encode(), "more_body": False}]
        service = FakeService(pause=pause)
        sent = 0

        async def receive() -> dict[str, Any]:
            if requests:
                return requests.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def give(_: Any) -> None:
            nonlocal sent
            sent += 1
            if sent == {"at the first event": 2, "while sending": 3, "while waiting": -1}[when]:
                gone.set()
                if spec == "2.4":
                    raise OSError("the client is gone")
                await asyncio.Event().wait()

        scope = {"type": "http", "asgi": {"spec_version": spec}, "method": "POST", "path": path}
        app = build_api(service, ApiSettings())
        task = asyncio.create_task(app({**scope, "headers": [], "query_string": b""}, receive, give))  # type: ignore[arg-type]
        if when == "while waiting":
            await waiting.wait()
            gone.set()
            if spec == "2.4":
                task.cancel()  # as Serve does
        await asyncio.wait([task], timeout=5)
        assert task.done()
        if not task.cancelled():
            task.exception()
        assert service.calls
        return service.running

    assert asyncio.run(leave()) == 0


def test_the_api_starts_only_when_the_service_is_ready() -> None:
    async def start(service: FakeService) -> None:
        app = build_api(service, ApiSettings())
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(start(FakeService()))
    with pytest.raises(CatalogError):
        asyncio.run(start(FakeService(route_error=CatalogError("another encoder", uri="v1"))))


# The official client


def with_openai(service: FakeService, use: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def talk() -> Any:
        app = build_api(service, ApiSettings(max_body_bytes=1000))
        http = httpx.AsyncClient(transport=transport(app))
        url = "http://lorauter/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, http_client=http) as client:
            return await use(client)

    return asyncio.run(talk())


MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


def test_openai_chat_and_completion() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        extra = {"lorauter": {"top_k": 1}}
        answer = await client.chat.completions.create(
            model="lorauter", messages=MESSAGES, max_completion_tokens=9, extra_body=extra
        )
        assert answer.choices[0].message.content == "Héllo"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == 10
        assert answer.model_extra is not None
        assert answer.model_extra["lorauter"]["adapters"][0] == {"name": "adder", "weight": 0.75}
        plain = await client.completions.create(model="poet", prompt="hi", stop=["."], seed=1)
        assert plain.choices[0].text == "Héllo"
        raw = await client.chat.completions.with_raw_response.create(model="poet", messages=MESSAGES)
        assert raw.headers["x-lorauter-adapters"] == "poet=1.0000"

    service = FakeService()
    with_openai(service, use)
    assert service.routed[0][1].top_k == 1
    assert [call.sampling.max_tokens for call in service.calls] == [9, 256, 256]


def test_openai_streams() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="lorauter", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        pieces = [piece async for piece in stream]
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "Héllo"
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.completion_tokens == 3
        texts = await client.completions.create(model="base", prompt="hi", stream=True)
        assert "".join([piece.choices[0].text async for piece in texts]) == "Héllo"

    with_openai(FakeService(), use)


def test_openai_models() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == ["lorauter", "base", "adder", "poet"]
        adapter = await client.models.retrieve("adder")
        assert (adapter.id, adapter.model_extra) == ("adder", {"parent": "base"})
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nowhere")

    with_openai(FakeService(), use)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ContextLengthExceeded(5000, 2048), openai.BadRequestError),
        (AdapterNotFound("not there", adapter="poet"), openai.NotFoundError),
        (AdapterRejected("has NaNs", adapter="poet"), openai.UnprocessableEntityError),
        (Overloaded("full", retry_after_s=1), openai.RateLimitError),
        (AdapterUnavailable("store down", adapter="poet"), openai.InternalServerError),
        (RuntimeError("?"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_openai_error_classes(error: Exception, kind: type[openai.APIStatusError], stream: bool) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model="poet", messages=MESSAGES, stream=stream)
        assert type(caught.value) is kind
        assert isinstance(caught.value.body, dict)
        assert set(caught.value.body) == {"message", "type", "param", "code"}

    with_openai(FakeService(first_error=error), use)


def test_openai_sees_a_stream_break_and_a_body_too_large() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="poet", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="store down"):
            async for _ in stream:
                pass
        large: list[Any] = [{"role": "user", "content": "x" * 1000}]
        with pytest.raises(openai.APIStatusError, match="1000 bytes") as caught:
            await client.chat.completions.create(model="poet", messages=large)
        assert caught.value.status_code == 413

    with_openai(FakeService(late_error=AdapterUnavailable("store down", adapter="poet")), use)


def test_routing_takes_so_many_texts_at_once() -> None:
    for n, status in ((3, 200), (4, 400)):
        assert post(FakeService(), "/v1/route", {"input": ["x"] * n}, max_inputs=3).status_code == status


# Access


KEYS = [
    {"name": "poets", "sha256": hash_key("lr-poets"), "adapters": ["poe*"], "tokens_per_minute": 400},
    {"name": "operator", "sha256": hash_key("lr-operator"), "roles": ["admin"]},
    {"name": "few", "sha256": hash_key("lr-few"), "requests_per_minute": 1},
]


class LocalLimits:
    """One process's buckets."""

    def __init__(self) -> None:
        self._buckets = TokenBuckets()

    async def take(self, name: str, amount: float, per_minute: int) -> float:
        return self._buckets.take(name, amount, per_minute)

    async def settle(self, name: str, amount: float, per_minute: int) -> None:
        self._buckets.settle(name, amount, per_minute)


@pytest.fixture
def secured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`secured(service, method, path, key, body)`: a request to a service with KEYS."""
    monkeypatch.setenv("KEYS", json.dumps(KEYS))
    access = Access(AccessSettings(keys_env="KEYS"), LocalLimits())

    def ask(service: FakeService, method: str, path: str, key: str | None, body: Any = None) -> Any:
        async def talk() -> httpx.Response:
            app = build_api(service, ApiSettings(), access)
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(
                transport=transport(app), base_url="http://lorauter", headers=headers
            ) as client:
                return await client.request(method, path, **({} if body is None else {"json": body}))

        return asyncio.run(talk())

    return ask


ENDPOINTS = [
    ("POST", CHAT, chat()),
    ("POST", COMPLETIONS, text()),
    ("POST", ROUTE, {"input": "hi"}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/poet", None),
    ("GET", "/v1/tasks", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ENDPOINTS)
def test_every_endpoint_wants_a_key(secured: Any, method: str, path: str, body: Any) -> None:
    service = FakeService()
    for key in (None, "lr-wrong"):
        response = secured(service, method, path, key, body)
        refused(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert service.calls == service.routed == []
    response = secured(service, method, path, "lr-operator", body)
    if method == "POST":
        refused(response, 403, "permission_denied")
    else:
        assert response.status_code == 200
    assert secured(service, "GET", "/healthz", None).status_code == 200


def test_a_key_is_asked_for_before_the_body_is_read(secured: Any) -> None:
    refused(secured(FakeService(), "POST", CHAT, None, {"model": "x" * (2 << 20)}), 401, "invalid_api_key")


def test_a_request_too_many_is_told_when_to_come_again(secured: Any) -> None:
    assert secured(FakeService(), "GET", "/v1/models", "lr-few").status_code == 200
    response = secured(FakeService(), "GET", "/v1/models", "lr-few")
    refused(response, 429, "rate_limit_exceeded")
    assert 55 <= int(response.headers["retry-after"]) <= 60


def test_routing_is_kept_to_the_keys_adapters(secured: Any) -> None:
    service = FakeService()
    secured(service, "POST", ROUTE, "lr-poets", {"input": "hi", "allow_adapters": ["adder", "poet"], "top_k": 2})
    secured(service, "POST", ROUTE, "lr-few", {"input": "hi"})
    [(_, scoped), (_, free)] = service.routed
    assert [scoped.allows(name) for name in ("adder", "poet", "poem")] == [False, True, False]
    assert scoped.top_k == 2
    assert free.allows("adder")


def test_an_adapter_that_slips_through_the_router_is_not_served(secured: Any) -> None:
    service = FakeService()  # its decision names "adder"
    refused(secured(service, "POST", CHAT, "lr-poets", chat()), 500)
    assert service.calls == []


@BOTH
def test_anothers_adapter_is_as_one_that_is_not_there(secured: Any, path: str, body: Any) -> None:
    service = FakeService()
    messages = [
        refused(secured(service, "POST", path, "lr-poets", body(**asked)), 404, "model_not_found")["message"]
        for asked in (
            {"model": "adder"},
            {"model": "nobody"},
            {"lorauter": {"adapters": {"poet": 1, "adder": 1}}},
            {"lorauter": {"adapters": {"adder": 0}}},
        )
    ]
    assert service.calls == []
    assert len({message.replace("nobody", "adder") for message in messages}) == 1
    assert secured(service, "POST", path, "lr-poets", body(model="poet")).status_code == 200
    assert secured(service, "POST", path, "lr-poets", body(model="base")).status_code == 200


def test_lists_hold_what_the_key_may_use(secured: Any) -> None:
    rows = secured(FakeService(), "GET", "/v1/models", "lr-poets").json()["data"]
    assert [row["id"] for row in rows] == ["lorauter", "base", "poet"]
    assert secured(FakeService(), "GET", "/v1/models/poet", "lr-poets").status_code == 200
    hidden = secured(FakeService(), "GET", "/v1/models/adder", "lr-poets")
    missing = secured(FakeService(), "GET", "/v1/models/addex", "lr-poets")
    assert hidden.text.replace("adder", "addex") == missing.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_settled_with_what_it_took(secured: Any, stream: bool) -> None:
    """400 tokens a minute; each request reserves 256, and takes 10."""
    service = FakeService()
    for _ in range(10):
        assert secured(service, "POST", CHAT, "lr-poets", chat("poet", stream=stream)).status_code == 200
    response = secured(service, "POST", CHAT, "lr-poets", chat("poet", max_tokens=400))
    refused(response, 429, "rate_limit_exceeded")
    assert len(service.calls) == 10


@pytest.mark.parametrize(
    ("service", "body"),
    [
        (FakeService(first_error=Overloaded("full", retry_after_s=1)), chat("poet")),
        (FakeService(route_error=ServiceUnavailable("down")), chat()),
        (FakeService(), chat("adder")),
    ],
)
def test_what_fails_gives_its_tokens_back(secured: Any, service: FakeService, body: Any) -> None:
    for _ in range(5):
        assert secured(service, "POST", CHAT, "lr-poets", body).status_code in (404, 429, 503)
        assert "rate_limit_exceeded" not in secured(service, "POST", CHAT, "lr-poets", body).text
    assert secured(FakeService(), "POST", CHAT, "lr-poets", chat("poet", max_tokens=390)).status_code == 200


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


def test_who_leaves_before_the_first_token_pays_what_was_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakeService):
        async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
            await asyncio.sleep(10)
            yield Admitted(1)

    monkeypatch.setenv("KEYS", json.dumps(KEYS))
    access = Access(AccessSettings(keys_env="KEYS"), LocalLimits())

    async def ask(service: FakeService, timeout_s: float) -> int:
        headers = {"Authorization": "Bearer lr-poets"}
        app = build_api(service, ApiSettings(), access)
        async with httpx.AsyncClient(transport=transport(app), base_url="http://lorauter", headers=headers) as client:
            asked = client.post(CHAT, json=chat("poet", max_tokens=390))
            return (await asyncio.wait_for(asked, timeout_s)).status_code

    async def talk() -> int:
        with pytest.raises(TimeoutError):
            await ask(Slow(), 0.1)
        return await ask(FakeService(), 10)

    assert asyncio.run(talk()) == 429
