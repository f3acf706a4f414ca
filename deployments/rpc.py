"""Calls between processes over a connection of their own: Ray says who is where, and nothing of it is on the way.

A call takes Python values and returns one, or yields several as they come. All calls to a process share one connection;
what is said in one turn of the event loop goes together. Both ends prove that they know the server's token
(`deployments.rpc_connection`), as what follows are pickles. A connection ends with the process at its other end at
once, and with a machine that is lost within seconds; whoever waits there hears `ConnectionLost`.

Knows nothing of deployments, and no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from deployments import rpc_connection
from deployments.rpc_connection import Connection, ConnectionLost
from lorauter.errors import LorauterError
from lorauter.pickled import PickledError

logger = logging.getLogger("lorauter.rpc")

_CALL, _CANCEL, _ITEM, _RESULT, _END, _ERROR, _NAME = range(7)

Within = Callable[[str, Mapping[str, str]], AbstractContextManager[object]]


class Address(NamedTuple):
    """Where a server listens, and what proves to it that one may call: not to be logged."""

    host: str
    port: int
    token: bytes


class RpcServer:
    """Answers calls.

    Args:
        handlers: by name, coroutine functions, whose result is the answer, and asynchronous generators, each of whose
            items is sent as it comes. Cancelled when the caller cancels, or is gone.
        within: is entered around each call, with its handler's name and what its caller says of it.
    """

    def __init__(self, handlers: Mapping[str, Callable[..., Any]], within: Within = lambda *_: nullcontext()) -> None:
        self._handlers = handlers
        self._within = within
        self._token = secrets.token_bytes(32)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._callers: dict[Connection, dict[int, asyncio.Task[None]]] = {}

    async def start(self, host: str) -> Address:
        """Listen on a free port of a host."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return Address(host, port, self._token)

    @property
    def ongoing(self) -> int:
        """Calls in progress."""
        return len(self._tasks)

    @property
    def ongoing_by(self) -> dict[str, int]:
        """The same by the names of those who have called."""
        counts: Counter[str] = Counter()
        for connection, running in self._callers.items():
            counts[connection.name] += len(running)
        return dict(+counts)

    async def drained(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()

    def close(self) -> None:
        """Listen no more; calls in progress are cancelled."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._callers):
            connection.close()

    def _accept(self) -> Connection:
        running: dict[int, asyncio.Task[None]] = {}

        def received(messages: Sequence[Any]) -> None:
            for message in messages:
                if message[0] == _CALL:
                    _, number, method, args, context = message
                    task = asyncio.get_running_loop().create_task(
                        self._answer(connection, number, method, args, context)
                    )
                    running[number] = task
                    self._tasks.add(task)
                    self._idle.clear()
                    task.add_done_callback(partial(ended, number))
                elif message[0] == _NAME:
                    connection.name = message[2]
                elif message[1] in running:
                    running[message[1]].cancel()

        def ended(number: int, task: asyncio.Task[None]) -> None:
            del running[number]
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

        def lost() -> None:
            self._callers.pop(connection, None)
            for task in list(running.values()):
                task.cancel()

        def unsendable(number: int, error: Exception) -> Any:
            return _ERROR, number, PickledError.of(error)

        connection = Connection(b"server", self._token, received, unsendable, lost)
        self._callers[connection] = running
        return connection

    async def _answer(
        self, connection: Connection, number: int, method: str, args: Sequence[Any], context: Mapping[str, str]
    ) -> None:
        try:
            with self._within(method, context):
                answer = self._handlers[method](*args)
                if isinstance(answer, AsyncGenerator):
                    try:
                        async for item in answer:
                            connection.send((_ITEM, number, item))
                            if connection.behind:
                                await connection.writable()
                    finally:
                        await answer.aclose()
                    connection.send((_END, number))
                else:
                    connection.send((_RESULT, number, await answer))
        except asyncio.CancelledError:
            connection.send((_ERROR, number, ConnectionLost("the call was cancelled by its server")))
            raise
        except Exception as error:
            if not isinstance(error, LorauterError):
                logger.exception("%s failed", method)
            connection.send((_ERROR, number, PickledError.of(error)))


class RpcClient:
    """Calls one server, over one connection, which is made with the first call, and anew after it was lost.

    Args:
        address: the server's.
        ended: is told of each call that has ended, however it did.
        lost: is told that the connection is lost, or cannot be made.
        name: by which the server counts the calls that come from here.
    """

    def __init__(
        self,
        address: Address,
        ended: Callable[[], object] = lambda: None,
        lost: Callable[[], object] = lambda: None,
        name: str = "",
    ) -> None:
        self._name = name
        self._address = address
        self._ended = ended
        self._told_lost = lost
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unsent: list[Any] = []
        self._calls: dict[int, RpcCall] = {}
        self._last = 0
        self._closed = False

    def call(self, method: str, *args: Any, context: Mapping[str, str] | None = None) -> RpcCall:
        """Call: await it for its result, or iterate over its items."""
        self._last += 1
        number = self._last
        call = self._calls[number] = RpcCall(lambda: self._cancel(number))
        self._send((_CALL, number, method, args, context or {}))
        return call

    @property
    def ongoing(self) -> int:
        """Calls in progress."""
        return len(self._calls)

    async def connect(self) -> None:
        """Have a connection before the first call. Raises ConnectionLost."""
        if self._connection is None:
            await asyncio.wait([self._being_made()])
        if self._connection is None:
            raise self._loss()

    def close(self) -> None:
        """End; calls in progress are lost."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.close()
        self._lost()

    def _cancel(self, number: int) -> None:
        if number in self._calls:
            self._failed(number, ConnectionLost("the call was cancelled"))
            self._send((_CANCEL, number))

    def _send(self, message: Any) -> None:
        if self._connection is not None:
            self._connection.send(message)
        elif self._closed:
            self._lost()
        else:
            self._unsent.append(message)
            self._being_made()

    def _being_made(self) -> asyncio.Task[None]:
        """Who makes the connection."""
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
        return self._connecting

    async def _connect(self) -> None:
        host, port, token = self._address
        connection = Connection(b"client", token, self._received, self._failed, self._lost)
        try:
            async with asyncio.timeout(rpc_connection.GREETING_S):
                await asyncio.get_running_loop().create_connection(lambda: connection, host, port)
                await connection.greeted
        except (OSError, ConnectionLost):  # a TimeoutError is the first
            connection.close()
            self._connecting = None
            self._lost()
            return
        except asyncio.CancelledError:  # closed while it was made
            connection.close()
            raise
        self._connecting, self._connection = None, connection
        unsent, self._unsent = self._unsent, []
        for message in ((_NAME, 0, self._name), *unsent):
            connection.send(message)

    def _failed(self, number: int, error: Exception) -> None:
        """A call cannot be told to the server."""
        if (call := self._calls.pop(number, None)) is not None:
            self._ended()
            call.told(_ERROR, error)

    def _received(self, messages: Sequence[Any]) -> None:
        for message in messages:
            kind, number = message[:2]
            call = self._calls.get(number)
            if call is None:  # it was cancelled
                continue
            if kind != _ITEM:
                del self._calls[number]
                self._ended()
            call.told(kind, message[2] if kind != _END else None)

    def _lost(self) -> None:
        self._connection = None
        self._unsent.clear()
        calls, self._calls = self._calls, {}
        if not self._closed:
            self._told_lost()
        for call in calls.values():
            self._ended()
            call.told(_ERROR, self._loss())

    def _loss(self) -> ConnectionLost:
        return ConnectionLost(f"the connection to {self._address.host}:{self._address.port} is lost")


class RpcCall:
    """A call in progress: await it for its result, or iterate over its items. Raises what the server raised, or
    ConnectionLost."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._told: deque[tuple[int, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def cancel(self) -> None:
        """Have the server stop; nothing more comes. Harmless once the call has ended."""
        self._cancel()

    def told(self, kind: int, value: Any) -> None:
        """The client's: what the server said."""
        self._told.append((kind, value))
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _hear(self) -> None:
        """Wait to be woken."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._waiter = None

    async def has_said(self, within: float) -> bool:
        """Whether the server has said something that was not taken yet, once it has, or so many seconds have passed."""
        if not self._told:
            timer = asyncio.get_running_loop().call_later(within, self._wake)
            try:
                await self._hear()
            finally:
                timer.cancel()
        return bool(self._told)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._result().__await__()

    async def _result(self) -> Any:
        return (await self._next())[1]

    def __aiter__(self) -> RpcCall:
        return self

    async def __anext__(self) -> Any:
        kind, value = await self._next()
        if kind == _END:
            raise StopAsyncIteration
        return value

    async def _next(self) -> tuple[int, Any]:
        if not self._told:
            await self._hear()
        kind, value = self._told.popleft()
        if kind == _ERROR:
            raise value.raised() if isinstance(value, PickledError) else value
        return kind, value
