"""The HTTP API in process: answers, routing, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from fake_service import (
    BOTH,
    BY_HAND,
    CHAT,
    COMPLETIONS,
    DECISION,
    ROUTE,
    VERSIONS,
    FakeService,
    chat,
    events,
    post,
    refused,
    send,
    text,
)

from deployments.api import build_api
from deployments.calls import Admitted, CatalogDescription, GenerateCall, Prompt
from deployments.config import ApiSettings
from lorauter.engine.types import Chunk, SamplingParams
from lorauter.errors import AdapterError, AdapterNotFound, AdapterRejected, AdapterUnavailable, CatalogError
from lorauter.routing import AdapterWeight, LeftOut, RoutingDecision, RoutingOptions

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 0},
}


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
    assert re.fullmatch(r"fp_[0-9a-f]{12}", answer.pop("system_fingerprint"))
    assert answer == {
        "object": kind,
        "model": "lorauter",
        "choices": [{"index": 0, **content, "finish_reason": "stop", "logprobs": None}],
        "usage": USAGE,
        "lorauter": {
            "catalog_version": "v1",
            "tasks": [
                {"name": "sums", "score": 0.91239, "probability": 0.8},
                {"name": "poems", "score": 0.5, "probability": 0.2},
            ],
            "adapters": [
                {"name": "adder", "version": "a1", "weight": 0.75},
                {"name": "poet", "version": "p1", "weight": 0.25},
            ],
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
                {"delta": {}},
            ],
        ),
        (COMPLETIONS, text, "cmpl", "text_completion", [{"text": ""}, {"text": "Hé"}, {"text": "llo"}, {"text": ""}]),
    ],
    ids=["chat", "text"],
)
def test_a_stream(path: str, body: Any, prefix: str, kind: str, contents: list[Any], with_usage: bool | None) -> None:
    options = {} if with_usage is None else {"stream_options": {"include_usage": with_usage}}
    response = post(FakeService(), path, body(stream=True, **options))
    *pieces, done = events(response)
    assert done == "[DONE]"
    assert {(piece["object"], piece["model"]) for piece in pieces} == {(kind, "lorauter")}
    assert len({(piece["id"], piece["created"], piece["system_fingerprint"]) for piece in pieces}) == 1
    assert re.fullmatch(rf"{prefix}-[0-9a-f]{{32}}", pieces[0]["id"])
    assert pieces[0]["lorauter"] == DECISION.to_json()
    assert response.headers["x-lorauter-adapters"] == "adder=0.7500,poet=0.2500"
    if with_usage:
        last = pieces.pop()
        assert last["choices"] == []
        assert last["usage"] == USAGE
    assert not any("usage" in piece for piece in pieces)
    assert [piece["choices"] for piece in pieces] == [
        [{"index": 0, **content, "finish_reason": reason, "logprobs": None}]
        for content, reason in zip(contents, [None, None, None, "stop"], strict=True)
    ]


def test_a_stream_says_together_what_is_known_at_the_same_time() -> None:
    sent: list[str] = []

    async def run() -> None:
        app = build_api(FakeService(), ApiSettings())
        body = json.dumps(chat(stream=True, stream_options={"include_usage": True})).encode()

        left = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if not left:
                await asyncio.sleep(60)  # the client stays
            return left.pop()

        async def send(message: Any) -> None:
            if message.get("body"):
                sent.append(message["body"].decode())

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": [
            (b"content-type", b"application/json"), (b"host", b"localhost"),
        ]}  # fmt: skip
        await app(scope, receive, send)

    asyncio.run(run())
    assert [piece.count("data: ") for piece in sent] == [2, 4], sent  # role, first token; last, end, usage, [DONE]


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
    mixture = [AdapterWeight(name, VERSIONS[name], weight) for name, weight in adapters]
    told = [{"name": name, "version": VERSIONS[name], "weight": weight} for name, weight in adapters]
    assert answer["lorauter"] == {**BY_HAND, "adapters": told}
    assert response.headers["x-lorauter-tasks"] == ""
    assert response.headers["x-lorauter-adapters"] == ",".join(f"{n}={w:.4f}" for n, w in adapters)
    assert service.routed == []
    assert list(service.calls[0].adapters) == mixture
    assert not service.calls[0].routed


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
            DECISION.adapters,
            SamplingParams(max_tokens=5, temperature=0, top_p=0.5, stop=("x",), seed=3),
            routed=True,
            whole=True,
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

    listed = get("/v1/models")
    assert [(row["id"], row["parent"], row["root"]) for row in listed["data"]] == [
        ("lorauter", None, "base"),
        ("base", None, "default"),
        ("adder", "base", "adder"),
        ("poet", "base", "poet"),
    ]
    for row in listed["data"]:
        assert (row["object"], row["owned_by"], row["max_model_len"]) == ("model", "lorauter", 2048)
        assert abs(row["created"] - time.time()) < 60
        assert {**get(f"/v1/models/{row['id']}"), "created": 0} == {**row, "created": 0}
    assert get("/v1/tasks") == {
        "object": "list",
        "catalog_version": "v1",
        "data": [{"id": "sums", "object": "task"}],
        "first_id": "sums",
        "last_id": "sums",
        "has_more": False,
        "total": 1,
    }
    assert get("/healthz") == {"status": "ok"}


def test_a_catalog_that_is_refused_is_told_of() -> None:
    class Refusing(FakeService):
        async def describe(self) -> CatalogDescription:
            return CatalogDescription("v1", [], [], ("v2", "is damaged"))

    told = send(Refusing(), "GET", "/v1/tasks").json()
    assert (told["catalog_version"], told["refused"]) == ("v1", {"version": "v2", "reason": "is damaged"})


def test_routing_takes_so_many_texts_at_once() -> None:
    for n, status in ((3, 200), (4, 400)):
        service = FakeService()
        assert post(service, "/v1/route", {"input": ["x"] * n, "top_k": 2}, max_inputs=3).status_code == status
        if status == 200:  # whoever keeps what options come to keeps no texts with them
            assert {options: 1 for _, options in service.routed} == {RoutingOptions(top_k=2): 1}


@dataclass
class Forgetful(FakeService):
    """Lacks some adapters that its catalog has; routes to those that are not excluded."""

    gone: frozenset[str] = frozenset()

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        [decision] = await super().route(texts, options)
        return [replace(decision, adapters=tuple(a for a in decision.adapters if options.allows(a.name)))]

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        gone = tuple(LeftOut(*adapter.key, "not_found") for adapter in call.adapters if adapter.name in self.gone)
        if gone and (not call.routed or len(gone) == len(call.adapters)):
            raise AdapterNotFound("not found", adapter=gone[0].name)
        async for item in super().generate(call):
            yield Admitted(item.prompt_tokens, gone) if isinstance(item, Admitted) else item


@BOTH
@pytest.mark.parametrize(("gone", "left"), [({"adder"}, ["poet"]), ({"poet"}, ["adder"]), ({"adder", "poet"}, [])])
def test_a_routed_request_goes_on_without_an_adapter_that_is_gone(
    path: str, body: Any, gone: set[str], left: list[str]
) -> None:
    service = Forgetful(gone=frozenset(gone))
    response = post(service, path, body(lorauter={"exclude_adapters": ["other"]}))
    assert response.status_code == 200
    decision = response.json()["lorauter"]
    assert [(adapter["name"], adapter["weight"]) for adapter in decision["adapters"]] == [(name, 1.0) for name in left]
    assert {(row["name"], row["cause"]) for row in decision["left_out"]} == {(name, "not_found") for name in gone}
    assert response.headers["x-lorauter-adapters"] == "".join(f"{name}=1.0000" for name in left)
    assert service.routed[-1][1].exclude_adapters == {"other"} | (set() if left else gone)


@dataclass
class Broken(FakeService):
    """Routes to the first of its adapters that is not excluded; none of them can be had."""

    error: type[AdapterError] = AdapterRejected
    pool: tuple[str, ...] = ("a", "b", "c", "d", "e")

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        [decision] = await super().route(texts, options)
        left = [AdapterWeight(name, "1", 1.0) for name in self.pool if options.allows(name)]
        return [replace(decision, adapters=tuple(left[:1]))]

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        if call.adapters:
            raise self.error("no good", adapter=call.adapters[0].name)
        async for item in super().generate(call):
            yield item


@BOTH
def test_where_nothing_is_left_the_request_is_routed_anew_and_in_the_end_the_base_model_answers(
    path: str, body: Any
) -> None:
    service = Broken()
    response = post(service, path, body())
    assert response.status_code == 200
    decision = response.json()["lorauter"]
    assert decision["adapters"] == []
    assert decision["left_out"] == [{"name": name, "version": "1", "cause": "rejected"} for name in "abc"]
    assert len(service.routed) == 4


@BOTH
def test_what_may_be_back_soon_is_not_replaced_by_the_base_model(path: str, body: Any) -> None:
    service = Broken(error=AdapterUnavailable)
    refused(post(service, path, body()), 503, "adapter_unavailable")
    assert len(service.routed) == 3


@BOTH
def test_names_that_the_catalog_does_not_know_reach_nobody(path: str, body: Any) -> None:
    service = FakeService()
    for asked in (body(model="made-up"), body(lorauter={"adapters": {"adder": 0.5, "made-up": 0.5}})):
        assert "made-up" in refused(post(service, path, asked), 404, "model_not_found")["message"]
    assert service.calls == service.routed == []


@BOTH
def test_who_names_an_adapter_that_is_gone_is_told(path: str, body: Any) -> None:
    service = Forgetful(gone=frozenset({"adder"}))
    for asked in (body(model="adder"), body(lorauter={"adapters": {"adder": 1.0}})):
        assert refused(post(service, path, asked), 404, "model_not_found")
    assert service.routed == []


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
        headers = [(b"content-type", b"application/json")]
        app = build_api(service, ApiSettings())
        task = asyncio.create_task(app({**scope, "headers": headers, "query_string": b""}, receive, give))  # type: ignore[arg-type]
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


class Timed(FakeService):
    """Tells what the steps took, and where the adapters were."""

    async def route(self, texts: Any, options: Any) -> list[RoutingDecision]:
        decisions = await super().route(texts, options)
        return [replace(decision, seconds={"embed": 0.25, "retrieve": 0.125}) for decision in decisions]

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        self.calls.append(call)
        tiers = (("adder", "device"), ("poet", "store")) if call.tells_tiers else ()
        yield Admitted(7, tiers=tiers, fetched_s=0.5, waited_s=0.75)
        yield Chunk("a", (1,))
        await asyncio.sleep(0.01)
        yield Chunk("b", (2, 3), "stop")


STEPS = {"embed_s": 0.25, "retrieve_s": 0.125, "adapters_s": 0.5, "queue_s": 0.75}


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_tells_its_timings_and_tiers_if_it_is_asked_to(path: str, body: Any, stream: bool) -> None:
    def ask(**lorauter: Any) -> list[Any]:
        answer = post(Timed(), path, body(lorauter=lorauter, stream=stream))
        told = events(answer)[:-1] if stream else [answer.json()]
        return [event["lorauter"] for event in told if "lorauter" in event]

    [plain] = ask()
    assert "timings" not in plain
    assert not any("tier" in adapter for adapter in plain["adapters"])
    told = ask(timings=True)
    first, last = told[0], told[-1]
    assert {adapter["name"]: adapter["tier"] for adapter in first["adapters"]} == {"adder": "device", "poet": "store"}
    timings = last["timings"]
    assert {name: timings[name] for name in STEPS} == STEPS
    assert abs(timings["first_token_s"]) < 10  # nobody notes here when the request came
    assert 0 < timings["tokens_per_second"] <= 200
    if stream:
        assert first["timings"]["tokens_per_second"] is None, "there is one piece so far"


def test_steps_that_were_not_made_have_no_time() -> None:
    timings = post(Timed(), CHAT, chat("base", lorauter={"timings": True})).json()["lorauter"]["timings"]
    assert (timings["embed_s"], timings["retrieve_s"], timings["queue_s"]) == (None, None, 0.75)
