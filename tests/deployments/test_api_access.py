"""Keys, roles and limits at the HTTP API in process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fake_service import BOTH, CHAT, COMPLETIONS, DECISION, ROUTE, FakeService, chat, refused, text, transport

from deployments.access import Access
from deployments.api import build_api
from deployments.calls import Admitted, GenerateCall, Refused, Taken, Want
from deployments.config import AccessSettings, ApiSettings
from deployments.limits import TokenBuckets
from lorauter.engine.types import Chunk
from lorauter.errors import (
    AdapterNotFound,
    Overloaded,
    ServiceUnavailable,
)
from lorauter.keys import hash_key
from lorauter.routing import RoutingDecision, RoutingOptions

KEYS = [
    {"name": "poets", "sha256": hash_key("lr-poets"), "adapters": ["poe*"], "tokens_per_minute": 400},
    {"name": "operator", "sha256": hash_key("lr-operator"), "roles": ["admin"]},
    {"name": "few", "sha256": hash_key("lr-few"), "requests_per_minute": 1},
]


class Limits:
    """The buckets, in this process."""

    def __init__(self) -> None:
        self._buckets = TokenBuckets()

    async def take(self, wants: Sequence[Want]) -> Taken | Refused:
        await asyncio.sleep(0)
        return self._buckets.take(wants)

    async def settle(self, want: Want) -> None:
        self._buckets.settle(want)


@pytest.fixture
def secured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`secured(service, method, path, key, body)`: a request to a service with KEYS."""
    monkeypatch.setenv("KEYS", json.dumps(KEYS))
    limits = Limits()
    access = Access(AccessSettings(keys_env="KEYS"), limits)

    def ask(service: FakeService, method: str, path: str, key: str | None, body: Any = None, **options: Any) -> Any:
        async def talk() -> httpx.Response:
            app = build_api(service, ApiSettings(), access, **options)
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(
                transport=transport(app), base_url="http://lorauter", headers=headers
            ) as client:
                return await client.request(method, path, **({} if body is None else {"json": body}))

        return asyncio.run(talk())

    ask.limits = limits  # type: ignore[attr-defined]
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


@pytest.mark.parametrize("body", [{"input": 7}, {}, {"input": []}, {"input": " "}])
def test_a_request_that_is_wrong_is_one_of_the_keys_too(secured: Any, body: Any) -> None:
    refused(secured(FakeService(), "POST", ROUTE, "lr-few", body), 400)
    for again in (body, {"input": "hi"}):
        refused(secured(FakeService(), "POST", ROUTE, "lr-few", again), 429, "rate_limit_exceeded")


def test_who_is_refused_his_tokens_is_routed_no_more(secured: Any) -> None:
    service = FakeService()
    for _ in range(5):
        secured(service, "POST", ROUTE, "lr-poets", {"input": ["x" * 1000] * 2})
    assert len(service.routed) == 2  # the first is answered, and the second is begun before it is refused


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
    assert [call.tenant for call in service.calls] == ["poets"] * 2  # what is computed for one key helps no other


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


@pytest.mark.parametrize("where", ["routing", "generating"])
def test_who_leaves_before_the_first_token_pays_for_the_prompt_alone(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(FakeService):
        async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
            await asyncio.sleep(10)
            yield Admitted(1)

        async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
            await asyncio.sleep(10)
            return []

    monkeypatch.setenv("KEYS", json.dumps(KEYS))
    access = Access(AccessSettings(keys_env="KEYS"), Limits())

    async def ask(service: FakeService, timeout_s: float, body: Any) -> int:
        headers = {"Authorization": "Bearer lr-poets"}
        app = build_api(service, ApiSettings(), access)
        async with httpx.AsyncClient(transport=transport(app), base_url="http://lorauter", headers=headers) as client:
            return (await asyncio.wait_for(client.post(CHAT, json=body), timeout_s)).status_code

    async def talk() -> list[int]:
        model = "poet" if where == "generating" else "lorauter"
        for _ in range(2):
            with pytest.raises(TimeoutError):  # of 400 tokens a minute, 390 are reserved each time
                await ask(Slow(), 0.1, chat(model, max_tokens=390))
        with pytest.raises(TimeoutError):
            await ask(Slow(), 0.1, chat(model, text="x" * 400, max_tokens=1))
        return [await ask(FakeService(), 10, chat("poet", max_tokens=n)) for n in (320, 280)]

    assert asyncio.run(talk()) == [429, 200]


def test_no_more_is_reserved_than_the_context_holds(secured: Any) -> None:
    """A key of 400 tokens a minute and a context of 300; each request takes 10."""
    for max_tokens in (10**9, 290, 10**6):
        for prompt in ("hi", "x" * 100_000):
            body = chat("poet", text=prompt, max_tokens=max_tokens)
            assert secured(FakeService(), "POST", CHAT, "lr-poets", body, max_model_len=300).status_code == 200

    class Dies(FakeService):
        async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
            raise asyncio.CancelledError
            yield

    with pytest.raises(asyncio.CancelledError):
        secured(Dies(), "POST", CHAT, "lr-poets", chat("poet", text="x" * 100_000), max_model_len=300)
    waits = secured(FakeService(), "POST", CHAT, "lr-poets", chat("poet", max_tokens=300), max_model_len=300)
    refused(waits, 429, "rate_limit_exceeded")
    assert int(waits.headers["retry-after"]) <= 60


def test_a_request_that_is_routed_anew_keeps_its_reservation(secured: Any) -> None:
    """While one is routed anew, another of the same key cannot take the tokens that it reserved."""
    others: list[Taken | Refused] = []

    class Anew(FakeService):
        async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
            if not self.calls:
                self.calls.append(call)
                raise AdapterNotFound("gone", adapter="poet")
            others.append(await limits.take([Want("poets tokens", 200, 400)]))
            async for item in super().generate(call):
                yield item

        async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
            return [replace(DECISION, adapters=())]

    limits = secured.limits
    assert secured(Anew(), "POST", CHAT, "lr-poets", chat(max_tokens=300)).status_code == 200
    assert isinstance(others[0], Refused)
    assert isinstance(asyncio.run(limits.take([Want("poets tokens", 385, 400)])), Taken)  # it was settled in the end


def test_routing_alone_is_charged(secured: Any) -> None:
    """About a token for four characters, of 400 a minute."""
    texts = ["x" * 100] * 7
    assert secured(FakeService(), "POST", ROUTE, "lr-poets", {"input": texts}).status_code == 200
    assert (
        secured(
            FakeService(route_error=ServiceUnavailable("x")), "POST", ROUTE, "lr-poets", {"input": texts}
        ).status_code
        == 503
    )
    assert secured(FakeService(), "POST", ROUTE, "lr-poets", {"input": texts}).status_code == 200
    refused(secured(FakeService(), "POST", ROUTE, "lr-poets", {"input": texts}), 429, "rate_limit_exceeded")
    assert secured(FakeService(), "POST", ROUTE, "lr-few", {"input": ["x" * 1000] * 256}).status_code == 200


def test_what_is_left_of_a_keys_limits_is_told(secured: Any) -> None:
    answered = secured(FakeService(), "POST", CHAT, "lr-poets", chat("poet", max_tokens=100)).headers
    assert answered["x-ratelimit-limit-tokens"] == "400"
    assert 295 <= int(answered["x-ratelimit-remaining-tokens"]) <= 300
    assert 14 < float(answered["x-ratelimit-reset-tokens"].removesuffix("s")) < 16
    assert "x-ratelimit-limit-requests" not in answered
    first, *refused_ones = [secured(FakeService(), "GET", "/v1/models", "lr-few") for _ in range(3)]
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("1", "0")
    for response in refused_ones:
        assert response.status_code == 429
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert "retry-after" in response.headers
    failed = secured(FakeService(), "POST", CHAT, "lr-poets", chat("nowhere", max_tokens=100))
    assert (failed.status_code, failed.headers["x-ratelimit-limit-tokens"]) == (404, "400")
    unlimited = secured(FakeService(), "GET", "/v1/models", "lr-operator").headers
    assert not any(name.startswith("x-ratelimit") for name in unlimited)
