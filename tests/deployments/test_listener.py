"""HTTP answered without a proxy, by a real server and real clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from local_s3 import free_port
from ray.serve.context import _get_serve_request_context
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

import deployments.listener
from deployments.listener import Listener
from lorauter.errors import ConfigError


class App:
    """Answers by the path, and notes what becomes of it."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if request.url.path == "/echo":
            body = await request.body()
            id = _get_serve_request_context().request_id
            await JSONResponse({"id": id, "length": len(body)})(scope, receive, send)
            return
        await request.body()
        self.begun.set()
        try:
            if request.url.path == "/stream":
                await StreamingResponse(self._stream())(scope, receive, send)
            else:
                await self.go_on.wait()
                await JSONResponse({})(scope, receive, send)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _stream(self) -> Any:
        yield b"first"
        await self.go_on.wait()
        yield b"last"


def run(scenario: Callable[[App, Listener, httpx.AsyncClient], Awaitable[None]]) -> None:
    async def whole() -> None:
        app, address = App(), f"127.0.0.1:{free_port()}"
        listener = Listener(app, address)
        listener.start()
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=20) as client:
            while True:
                try:
                    await client.get("/echo")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.01)
            await scenario(app, listener, client)
        app.go_on.set()
        await listener.end()

    asyncio.run(whole())


def test_a_request_has_an_id_its_clients_or_one_of_its_own() -> None:
    async def scenario(app: App, listener: Listener, client: httpx.AsyncClient) -> None:
        given = await client.post("/echo", content=b"x" * 300_000, headers={"X-Request-ID": "mine"})
        assert given.json() == {"id": "mine", "length": 300_000} and given.headers["x-request-id"] == "mine"
        made = [await client.get("/echo") for _ in range(2)]
        ids = [answer.headers["x-request-id"] for answer in made]
        assert ids == [answer.json()["id"] for answer in made] and len({*ids, "", "mine"}) == 4

    run(scenario)


@pytest.mark.parametrize("path", ["/whole", "/stream"])
def test_nobody_works_for_a_client_that_has_left(path: str) -> None:
    async def scenario(app: App, listener: Listener, client: httpx.AsyncClient) -> None:
        asking = asyncio.ensure_future(client.post(path, content=b"x"))
        await app.begun.wait()
        await asyncio.sleep(0.05)
        assert not app.cancelled.is_set()
        asking.cancel()
        await asyncio.wait_for(app.cancelled.wait(), 5)

    run(scenario)


def test_a_listener_that_is_to_go_ends_with_its_last_answer() -> None:
    async def scenario(app: App, listener: Listener, client: httpx.AsyncClient) -> None:
        listener.check()
        asking = asyncio.ensure_future(client.get("/stream"))
        await app.begun.wait()
        ending = asyncio.ensure_future(listener.end())
        await asyncio.sleep(0.3)
        assert not ending.done()
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient(base_url=client.base_url) as other:
                await other.get("/echo")
        app.go_on.set()
        assert (await asking).content == b"firstlast"
        await asyncio.wait_for(ending, 5)
        with pytest.raises(RuntimeError, match="ended"):
            listener.check()

    run(scenario)


def test_what_is_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.listener, "_MOST", 1)

    async def scenario(app: App, listener: Listener, client: httpx.AsyncClient) -> None:
        asking = asyncio.ensure_future(client.get("/whole"))
        await app.begun.wait()
        refused = await client.get("/echo")
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert "in progress" in refused.json()["error"]["message"]
        app.go_on.set()
        await asking
        assert (await client.get("/echo")).status_code == 200

    run(scenario)


def test_several_listen_at_one_address_and_a_strangers_port_is_none() -> None:
    async def whole() -> None:
        address = f"127.0.0.1:{free_port()}"
        first, second = (Listener(App(), address) for _ in range(2))
        for listener in (first, second):
            listener.start()
        await asyncio.sleep(0.05)
        await first.end()
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            for _ in range(5):
                assert (await client.get("/echo")).status_code == 200
        await second.end()

    asyncio.run(whole())
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"cannot listen at .*use"):
        Listener(App(), f"127.0.0.1:{taken.getsockname()[1]}")
    for address in ("8000", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:8000/a"):
        with pytest.raises(ConfigError, match=r"api.listen|cannot listen"):
            Listener(App(), address)


def test_a_stream_that_is_left_ends_whichever_request_of_its_connection_it_is() -> None:
    async def scenario(app: App, listener: Listener, client: httpx.AsyncClient) -> None:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        for path in (b"/echo", b"/stream", b"/echo"):  # the last one waits for its turn
            writer.write(b"GET %s HTTP/1.1\r\nHost: me\r\n\r\n" % path)
        await app.begun.wait()
        await reader.readuntil(b"first")
        writer.close()
        await asyncio.wait_for(app.cancelled.wait(), 5)

    run(scenario)
