"""What a client may keep waiting, and how much it may send, by a real server and raw connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from local_s3 import free_port
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

import deployments.connection
import deployments.listener
from deployments.connection import _PIECES, _Gathered
from deployments.listener import Listener


class App:
    """Tells what it was sent; at `/endless` it talks until its client has left, at `/whole` it waits for that."""

    def __init__(self) -> None:
        self.begun, self.left = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if request.url.path == "/early":
            await JSONResponse({}, 413)(scope, receive, send)
            return
        try:
            body = await request.body()
            self.begun.set()
            if request.url.path == "/endless":
                await StreamingResponse(self._endless())(scope, receive, send)
            elif request.url.path == "/whole":
                await asyncio.sleep(60)
            told = {"path": request.url.path, "length": len(body), "upgrade": request.headers.get("upgrade")}
            await JSONResponse(told)(scope, receive, send)
        except (asyncio.CancelledError, ClientDisconnect):
            self.left.set()
            raise

    async def _endless(self) -> Any:
        while True:
            yield b"x" * 65536
            await asyncio.sleep(0)


Talk = Callable[[App, Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]], Awaitable[None]]


def run(scenario: Talk) -> None:
    async def whole() -> None:
        app, port = App(), free_port()
        listener = Listener(app, f"127.0.0.1:{port}")
        listener.start()
        await asyncio.sleep(0.05)
        writers = []

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            return reader, writer

        await scenario(app, connect)
        for writer in writers:
            writer.close()
        await asyncio.wait_for(listener.end(), 5)

    asyncio.run(whole())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.connection, "PATIENCE_S", 0.3)
    monkeypatch.setattr(deployments.listener, "_LOOK_S", 0.05)


def answers(said: bytes) -> list[tuple[int, Any]]:
    """The answers that were read, each with its status."""
    found = []
    while said:
        head, _, said = said.partition(b"\r\n\r\n")
        [length] = [int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
        found.append((int(head[9:12]), json.loads(said[:length])))
        said = said[length:]
    return found


HEAD = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"\r\n", 408),
        (HEAD, 408),
        (HEAD + b"Content-Length: 9\r\n\r\nabc", 408),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", 408),
        (HEAD + b"Content-Length: 3\r\n\r\nabc\r\n", 200),  # and a part of another
    ],
)
@pytest.mark.usefixtures("hasty")
def test_a_client_that_does_not_go_on_is_waited_for_no_more(sent: bytes, status: int | None) -> None:
    async def scenario(app: App, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(sent)
        said = answers(await asyncio.wait_for(reader.read(), 5))
        assert [status for status, _ in said][:1] == ([] if status is None else [status])
        if status == 408:
            assert "send it faster" in said[0][1]["error"]["message"]

    run(scenario)


@pytest.mark.usefixtures("hasty")
def test_a_request_that_comes_drop_by_drop_is_waited_for_no_more_and_one_that_merely_takes_long_is() -> None:
    async def scenario(app: App, connect: Any) -> None:
        (slow, to_slow), (steady, to_steady) = await connect(), await connect()
        to_slow.write(HEAD + b"X-A: ")
        to_steady.write(HEAD + b"Content-Length: 40000\r\n\r\n")
        refusal = asyncio.ensure_future(slow.read())
        for _ in range(20):
            await asyncio.sleep(0.05)
            if not refusal.done():
                to_slow.write(b"a")
            to_steady.write(b"x" * 2000)
        assert answers(await asyncio.wait_for(refusal, 5))[0][0] == 408
        assert b'"length":40000' in await asyncio.wait_for(steady.readuntil(b"}"), 5)

    run(scenario)


@pytest.mark.usefixtures("hasty")
def test_who_does_not_take_its_answer_is_waited_for_no_more() -> None:
    async def scenario(app: App, connect: Any) -> None:
        _, writer = await connect()
        writer.write(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")  # and nobody reads beyond the buffers
        await asyncio.wait_for(app.left.wait(), 10)

    run(scenario)


@pytest.mark.usefixtures("hasty")
def test_nobody_is_hurried_whose_answer_takes_its_time() -> None:
    async def scenario(app: App, connect: Any) -> None:
        _, writer = await connect()
        writer.write(b"GET /whole HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await app.begun.wait()
        await asyncio.sleep(1)
        assert not app.left.is_set()
        writer.close()

    run(scenario)


@pytest.mark.parametrize(
    ("begin", "more", "status"),
    [
        (HEAD + b"X-A: ", b"a" * 50_000, 431),
        (HEAD, b"X-A: %s\r\n" % (b"a" * 1000) * 50, 431),
        (b"GET /", b"a" * 50_000, 431),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", b"X-A: %s\r\n" % (b"a" * 1000) * 50, 431),
        (HEAD + b"Content-Length: 1000000\r\n\r\n", b"a" * 50_000, 200),
    ],
)
def test_a_head_is_not_collected_without_end(begin: bytes, more: bytes, status: int) -> None:
    async def scenario(app: App, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(begin)
        line = asyncio.ensure_future(reader.readline())
        for _ in range(20):
            await asyncio.sleep(0.01)
            if not line.done():
                writer.write(more)
        assert int((await asyncio.wait_for(line, 5))[9:12]) == status

    run(scenario)


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_who_is_still_sending_has_its_answer(connection: bytes) -> None:
    async def scenario(app: App, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(b"POST /early HTTP/1.1\r\nHost: localhost\r\nConnection: %s\r\n" % connection)
        writer.write(b"Content-Length: 8000000\r\n\r\n")
        for _ in range(80):
            writer.write(b"x" * 100_000)
            await writer.drain()
        line = await asyncio.wait_for(reader.readline(), 5)
        assert line.startswith(b"HTTP/1.1 413")

    run(scenario)


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("chunked", [False, True])
def test_what_asks_for_another_protocol_is_answered_in_this_one(protocol: bytes, chunked: bool) -> None:
    """Java's client asks for HTTP/2 with each first request, bodies included."""

    async def scenario(app: App, connect: Any) -> None:
        reader, writer = await connect()
        other = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAEAAEAA\r\n" % protocol
        body = b"Content-Length: 4\r\n\r\nbody"
        if chunked:
            body = b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
        sent = HEAD + other + body
        for start in range(0, len(sent), 50):
            writer.write(sent[start : start + 50])
            await asyncio.sleep(0.005)
        writer.write(b"GET /next HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        first, second = answers(await asyncio.wait_for(reader.read(), 5))
        assert first == (200, {"path": "/echo", "length": 4, "upgrade": None})
        assert second == (200, {"path": "/next", "length": 0, "upgrade": None})

    run(scenario)


@pytest.mark.parametrize(
    "sent", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", HEAD + b"Content-Length: -1\r\n\r\n"]
)
def test_what_is_not_http_is_told_in_the_shape_of_other_errors(sent: bytes) -> None:
    async def scenario(app: App, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(sent)
        [(status, body)] = answers(await asyncio.wait_for(reader.read(), 5))
        assert status == 400 and set(body["error"]) == {"message", "type", "param", "code"}

    run(scenario)


def test_garbage_behind_a_stream_is_not_answered_inside_it() -> None:
    async def scenario(app: App, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"hello\r\n\r\n")
        assert b"HTTP" not in await asyncio.wait_for(reader.read(), 5)
        await asyncio.wait_for(app.left.wait(), 5)

    run(scenario)


def test_nobody_works_for_a_client_that_has_left_another_request_behind() -> None:
    async def scenario(app: App, connect: Any) -> None:
        reader, writer = await connect()
        writer.write(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await asyncio.wait_for(app.left.wait(), 5)

    run(scenario)


class Wire:
    """A transport that notes what was written, and that it was closed."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.written.append(b"closed")

    def is_closing(self) -> bool:
        return self.written[-1:] == [b"closed"]


def test_what_is_said_in_one_turn_of_the_loop_is_written_together() -> None:
    async def whole() -> None:
        wire: Any = Wire()
        gathered = _Gathered(wire, asyncio.get_running_loop(), lambda: False)
        gathered.write(b"head ")
        gathered.write(b"body")
        assert not wire.written
        await asyncio.sleep(0)
        for _ in range(_PIECES):  # nobody who never waits is to fill the memory
            gathered.write(b"x")
        gathered.write(b"end")
        gathered.close()
        gathered.write(b"more")
        await asyncio.sleep(0)
        assert wire.written == [b"head body", b"x" * _PIECES, b"end", b"closed"] and gathered.is_closing()

    asyncio.run(whole())


def test_what_is_said_to_a_client_that_has_left_is_lost_without_a_word() -> None:
    """On the loop that Serve's replicas run on, whose transports refuse what comes after their end."""

    async def whole() -> None:
        wrong: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))

        class Server(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.gathered = _Gathered(transport, asyncio.get_running_loop(), lambda: False)  # type: ignore[arg-type]

            def connection_lost(self, exc: Exception | None) -> None:
                for _ in range(_PIECES + 1):
                    self.gathered.write(b"x")
                ended.set()

        ended, port = asyncio.Event(), free_port()
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", port)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 5)
        await asyncio.sleep(0)
        assert not wrong
        server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(whole())
