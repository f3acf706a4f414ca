"""What pages of other sites make a browser send to a service that asks for no keys."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fake_service import CHAT, COMPLETIONS, ROUTE, FakeService, chat, refused, text
from starlette.requests import Request

from deployments.access import Access
from deployments.api import build_api
from deployments.browsers import check_no_other_site
from deployments.config import AccessSettings, ApiSettings
from lorauter.errors import PermissionDenied
from lorauter.keys import hash_key

BODIES = [(CHAT, chat()), (COMPLETIONS, text()), (ROUTE, {"input": "hi"})]
LOCAL = "http://127.0.0.1:8000"


def ask(
    headers: dict[str, str],
    *,
    url: str = LOCAL,
    method: str = "POST",
    path: str = CHAT,
    body: Any = None,
    **access: Any,
) -> tuple[httpx.Response, FakeService]:
    service = FakeService()

    async def talk() -> httpx.Response:
        app = build_api(service, ApiSettings(), Access(AccessSettings(**access)))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            content = None if method == "GET" else json.dumps(chat() if body is None else body).encode()
            return await client.request(method, path, headers=headers, content=content)

    return asyncio.run(talk()), service


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize(
    "kind",
    [
        None,
        "",
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "text/plain; application/json",
        "application/jsonp",
        "text/json",
    ],
)
def test_json_is_taken_as_json_alone(path: str, body: Any, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response, service = ask(headers, path=path, body=body)
    assert "Content-Type: application/json" in refused(response, 415)["message"]
    assert service.calls == service.routed == []


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_in_its_spellings(kind: str) -> None:
    assert ask({"Content-Type": kind})[0].status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://evil.example:8000",
        "null",
        "file://",
        "http://127.0.0.1.evil.example",
        "http://[::",
        "http://localhost.evil.example",
        "chrome-extension://abc",
        "http://evil.example@x",
        "",
    ],
)
def test_a_page_of_another_site_is_refused(origin: str) -> None:
    response, service = ask({**JSON, "Origin": origin})
    assert "access.trusted_hosts" in refused(response, 403, "permission_denied")["message"]
    assert service.calls == []


@pytest.mark.parametrize("origin", [LOCAL, "http://localhost:3000", "http://[::1]:1", "http://app.localhost"])
def test_a_page_of_this_machine_may_ask(origin: str) -> None:
    assert ask({**JSON, "Origin": origin})[0].status_code == 200


def test_a_page_of_the_services_own_site_may_ask() -> None:
    assert ask({**JSON, "Origin": "https://lorauter.team"}, url="http://lorauter.team")[0].status_code == 200
    assert ask({**JSON, "Origin": "https://other.team"}, url="http://lorauter.team")[0].status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"]
)
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/tasks")])
def test_a_name_that_was_made_to_mean_this_machine_is_refused(host: str, method: str, path: str) -> None:
    response, _ = ask({**JSON, "Host": host, "Origin": f"http://{host}"}, method=method, path=path)
    assert "access.trusted_hosts" in refused(response, 403, "permission_denied")["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "127.1.2.3", "a.localhost", "10.0.0.7:8000"]
)
def test_names_of_this_machine(host: str) -> None:
    assert ask({**JSON, "Host": host})[0].status_code == 200


def test_trusted_hosts() -> None:
    trusted = ("Api.team.example",)
    headers = {**JSON, "Host": "api.team.example", "Origin": "https://api.team.example"}
    assert ask(headers, trusted_hosts=trusted)[0].status_code == 200
    assert ask({**JSON, "Origin": "https://api.team.example"}, trusted_hosts=trusted)[0].status_code == 200
    assert ask({**headers, "Origin": "https://www.team.example"}, trusted_hosts=trusted)[0].status_code == 403


def test_a_name_that_others_reach_it_by_is_taken() -> None:
    assert ask(JSON, url="http://serve.default.svc:8000")[0].status_code == 200


def test_with_keys_a_page_needs_one_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", json.dumps([{"name": "one", "sha256": hash_key("k")}]))
    headers = {**JSON, "Host": "any.example", "Origin": "https://other.example"}
    assert ask(headers, keys_env="KEYS")[0].status_code == 401
    assert ask({**headers, "Authorization": "Bearer k"}, keys_env="KEYS")[0].status_code == 200


@pytest.mark.parametrize("server", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "127.0.0.9"])
def test_it_is_the_address_that_a_request_came_to_that_counts(server: str) -> None:
    for headers, said in (({}, True), ({"host": "localhost"}, True), ({"host": "evil.example"}, False)):
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        request = Request({"type": "http", "headers": raw, "server": (server, 8000)})
        if said:
            check_no_other_site(request, ())
        else:
            with pytest.raises(PermissionDenied, match=r"'evil\.example'.*localhost"):
                check_no_other_site(request, ())
        check_no_other_site(Request({"type": "http", "headers": raw, "server": ("10.0.0.7", 8000)}), ())
        check_no_other_site(Request({"type": "http", "headers": raw, "server": None}), ())
