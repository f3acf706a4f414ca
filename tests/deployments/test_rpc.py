"""Calls over a connection of their own, between real sockets."""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import uvloop

import deployments.rpc_connection
from deployments.rpc import Address, RpcClient, RpcServer
from deployments.rpc_connection import ConnectionLost
from lorauter.errors import InvalidRequest, Overloaded

HOST = "127.0.0.1"


class Target:
    """What the handlers note."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.contexts: list[Mapping[str, str]] = []

    async def echo(self, *values: Any) -> Any:
        return values

    async def fail(self, error: Exception) -> None:
        raise error

    async def count(self, to: int, error: Exception | None = None) -> AsyncGenerator[int]:
        try:
            for number in range(to):
                yield number
                await asyncio.sleep(0)
            if error is not None:
                raise error
        finally:
            self.closed.set()

    async def forever(self) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def odd(self) -> Any:
        return lambda: None  # no pickle

    async def odd_items(self) -> AsyncGenerator[Any]:
        yield 1
        yield lambda: None

    async def gives_up(self) -> None:
        raise asyncio.CancelledError

    @contextmanager
    def within(self, method: str, context: Mapping[str, str]) -> Any:
        assert hasattr(self, method) or method == "blocks" or " " in method
        self.contexts.append(context)
        yield

    def server(self) -> RpcServer:
        methods = (
            self.echo, self.fail, self.count, self.forever, self.odd, self.odd_items, self.gives_up,
        )  # fmt: skip
        return RpcServer({method.__name__: method for method in methods}, self.within)


def run(scenario: Callable[[Target, RpcServer, RpcClient], Awaitable[None]]) -> None:
    async def whole() -> None:
        target = Target()
        server = target.server()
        client = RpcClient(await server.start(HOST))
        try:
            async with asyncio.timeout(20):
                await scenario(target, server, client)
        finally:
            client.close()
            server.close()
            await asyncio.sleep(0.01)

    for loop in (asyncio.new_event_loop, uvloop.new_event_loop):  # Serve's replicas run on the second
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(whole())


def test_results_items_and_errors_come_as_they_are() -> None:
    async def scenario(target: Target, server: RpcServer, client: RpcClient) -> None:
        rows = np.arange(6, dtype=np.float32).reshape(2, 3)
        text, got = await client.call("echo", "ä" * 100_000, rows)
        assert text == "ä" * 100_000 and np.array_equal(got, rows) and got.dtype == rows.dtype
        assert [item async for item in client.call("count", 100)] == list(range(100))
        with pytest.raises(InvalidRequest, match="no") as caught:
            await client.call("fail", InvalidRequest("no", param="x"))
        assert caught.value.param == "x"
        heard = []
        with pytest.raises(Overloaded) as refused:
            async for item in client.call("count", 3, Overloaded("full", retry_after_s=2, replica="r")):
                heard.append(item)  # noqa: PERF401
        assert heard == [0, 1, 2] and refused.value.replica == "r"
        assert server.ongoing == 0 and client.ongoing == 0

    run(scenario)


def test_calls_side_by_side_do_not_mix_and_their_context_goes_along() -> None:
    async def scenario(target: Target, server: RpcServer, client: RpcClient) -> None:
        async def one(number: int) -> None:
            context = {"request-id": str(number)}
            assert await client.call("echo", number, context=context) == (number,)
            assert [item async for item in client.call("count", number)] == list(range(number))

        await asyncio.gather(*map(one, range(100)))
        assert {context["request-id"] for context in target.contexts if context} == {str(n) for n in range(100)}
        assert len(server._callers) == 1

    run(scenario)


def test_a_cancelled_call_is_cancelled_there() -> None:
    async def scenario(target: Target, server: RpcServer, client: RpcClient) -> None:
        waiting = asyncio.ensure_future(client.call("forever")._result())
        await asyncio.sleep(0.05)
        assert server.ongoing == 1
        waiting.cancel()
        await target.cancelled.wait()
        stream = client.call("count", 10**9)
        assert await anext(stream) == 0
        stream.cancel()
        await target.closed.wait()
        await server.drained()
        with pytest.raises(ConnectionLost, match="cancelled"):
            while True:
                await anext(stream)
        stream.cancel()
        assert client.ongoing == 0

    run(scenario)


def test_who_waits_hears_that_the_server_is_gone_and_the_next_call_connects_anew() -> None:
    async def scenario(target: Target, server: RpcServer, client: RpcClient) -> None:
        ended: list[int] = []
        client._ended = lambda: ended.append(1)
        waiting = asyncio.ensure_future(client.call("forever")._result())
        stream = client.call("count", 10**9)
        await anext(stream)
        for connection in list(server._callers):
            connection.close()
        with pytest.raises(ConnectionLost):
            await waiting
        with pytest.raises(ConnectionLost):
            while True:
                await anext(stream)
        await server.drained()
        assert target.cancelled.is_set(), "nobody waits for it any more"
        assert len(ended) == 2
        assert await client.call("echo", 1) == (1,)
        server.close()
        await asyncio.sleep(0.01)
        for _ in range(2):
            with pytest.raises(ConnectionLost):
                await client.call("echo", 1)
        client.close()
        with pytest.raises(ConnectionLost):
            await client.call("echo", 1)

    run(scenario)


def test_what_is_no_pickle_is_an_error_of_its_own_call_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(target: Target, server: RpcServer, client: RpcClient) -> None:
        odd, good = client.call("odd"), client.call("echo", 1)
        assert await good == (1,)
        with pytest.raises(Exception, match=r"pickle|local object"):
            await odd
        items = client.call("odd_items")
        assert await anext(items) == 1
        with pytest.raises(Exception, match=r"pickle|local object"):
            await anext(items)
        with pytest.raises(Exception, match=r"pickle|local object"):
            await client.call("echo", lambda: None)
        with pytest.raises(KeyError):
            await client.call("no such method")
        with pytest.raises(ConnectionLost, match="cancelled"):
            await client.call("gives_up")
        assert await client.call("echo", 2) == (2,), "the connection has survived all that"
        assert len(server._callers) == 1

    with caplog.at_level(logging.CRITICAL, "lorauter.rpc"):
        run(scenario)


class Bomb:
    """A pickle that is seen to be read."""

    read = False

    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    Bomb.read = True


@pytest.mark.parametrize("token", [b"\0" * 32, b""])
def test_without_the_token_nothing_is_read(token: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(target: Target, server: RpcServer, client: RpcClient) -> None:
        stranger = RpcClient(client._address._replace(token=token))
        with pytest.raises(ConnectionLost):
            await stranger.call("echo", Bomb())
        bomb = pickle.dumps([Bomb()])
        for said in (bomb, len(bomb).to_bytes(8, "little") + bomb, b"x" * 10_000, b"GET / HTTP/1.1\r\n\r\n" * 10):
            reader, writer = await asyncio.open_connection(HOST, client._address.port)
            writer.write(deployments.rpc_connection._MAGIC + b"n" * 32 + b"p" * 32 + said)
            heard = await reader.read()
            assert len(heard) <= 16 + 32 + 32 + 15, "a greeting, a proof that this token is known, and the end"
            writer.close()
        assert not Bomb.read and not target.contexts

    run(scenario)


def test_a_proof_is_of_no_use_to_whoever_gives_it_back(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(target: Target, server: RpcServer, client: RpcClient) -> None:
        reader, writer = await asyncio.open_connection(HOST, client._address.port)
        greeting = await reader.readexactly(len(deployments.rpc_connection._MAGIC) + 32)
        writer.write(greeting)
        writer.write(await reader.readexactly(32))
        assert await reader.read() == b""
        writer.close()

    run(scenario)


def test_an_impostor_is_told_nothing() -> None:
    async def whole() -> None:
        heard = bytearray()

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(deployments.rpc_connection._MAGIC + b"n" * 32 + b"p" * 32)
            heard.extend(await reader.read())
            writer.close()

        listening = await asyncio.start_server(impostor, HOST, 0)
        client = RpcClient(Address(HOST, listening.sockets[0].getsockname()[1], b"t" * 32))
        with pytest.raises(ConnectionLost):
            await client.call("echo", "a secret")
        await asyncio.sleep(0.05)
        assert b"secret" not in heard and len(heard) > 0
        client.close()
        listening.close()

    asyncio.run(whole())


def test_nothing_is_read_by_who_was_closed_while_it_waited_for_the_proof() -> None:
    async def whole() -> None:
        came, hung_up = asyncio.Event(), asyncio.Event()

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(1)
            came.set()
            bomb = pickle.dumps([Bomb()])
            while not reader.at_eof():
                writer.write(len(bomb).to_bytes(8, "little") + bomb)
                await reader.read(1000)
            hung_up.set()
            writer.close()

        listening = await asyncio.start_server(impostor, HOST, 0)
        client = RpcClient(Address(HOST, listening.sockets[0].getsockname()[1], b"t" * 32))
        call = client.call("echo")
        await came.wait()
        client.close()
        with pytest.raises(ConnectionLost):
            await call
        await asyncio.wait_for(hung_up.wait(), 2)
        assert not Bomb.read
        listening.close()

    asyncio.run(whole())


def test_who_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.rpc_connection, "GREETING_S", 0.1)

    async def scenario(target: Target, server: RpcServer, client: RpcClient) -> None:
        reader, writer = await asyncio.open_connection(HOST, client._address.port)
        await asyncio.wait_for(reader.read(), 5)
        writer.close()
        with socket.create_server((HOST, 0)) as silent:
            mute = RpcClient(Address(HOST, silent.getsockname()[1], b""))
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(mute.call("echo")._result(), 5)

    run(scenario)


def test_who_reads_slowly_slows_down_its_own_stream() -> None:
    async def scenario(target: Target, server: RpcServer, client: RpcClient) -> None:
        stream = client.call("count", 3)
        assert await anext(stream) == 0
        assert client._connection is not None and client._connection._transport is not None
        client._connection._transport.pause_reading()
        made = 0

        async def blocks() -> AsyncGenerator[bytes]:
            nonlocal made
            while True:
                made += 1
                yield bytes(1 << 20)  # and never waits for anything

        server._handlers = {**server._handlers, "blocks": blocks}
        flood = client.call("blocks")
        await asyncio.sleep(0.3)
        assert 0 < made < 100
        client._connection._transport.resume_reading()
        for _ in range(made + 5):
            await anext(flood)
        flood.cancel()

    run(scenario)
