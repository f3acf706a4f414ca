"""HTTP answered by the ingress's replicas themselves, all of a machine at one address, without a proxy on the way.

The kernel spreads connections over those who listen. What Serve's proxy does for a request else is done here: its id,
its trace, a bound to how many are in progress, and an end to the work for a client that has left. A listener that is to
go takes no new connections, closes idle ones, and ends with its last answer.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import uvicorn
from ray.serve.context import _set_request_context
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments import tracing
from deployments.bodies import Json
from deployments.connection import HEADERS, LEAVING, Connection
from deployments.encoded import new_id
from deployments.observe import REQUEST_ID
from deployments.openai_answers import error_answer
from deployments.streams import CANCELS
from lorauter.errors import ConfigError, Overloaded

_MOST = 2000  # requests in progress
_RETRY_AFTER_S = 1
_BACKLOG = 2048
_LOOK_S = 5.0  # between two looks for clients that are waited for
_ID = REQUEST_ID.encode()
_TRACE = (b"traceparent", b"tracestate")


class Listener:
    """Listens from `start` on.

    Args:
        app: answers the requests.
        address: `HOST:PORT`; others of this user may listen there too.
    """

    def __init__(self, app: ASGIApp, address: str) -> None:
        self._socket = _bound(address)
        self._server = uvicorn.Server(
            uvicorn.Config(
                Front(app),
                http=Connection,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="critical",
                backlog=_BACKLOG,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen."""
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        looking = asyncio.create_task(self._look())
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            looking.cancel()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for connection in [*self._server.server_state.connections]:
                if isinstance(connection, Connection):
                    connection.check()

    def check(self) -> None:
        """Raise RuntimeError if it listens no more."""
        if self._serving is not None and self._serving.done():
            raise RuntimeError("the listener has ended")

    async def end(self) -> None:
        """Take no new connections, and wait for the last answer's end."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


class Front:
    """An ASGI application for requests that come from clients directly."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._ongoing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(_ID) or new_id().encode()
        _set_request_context(request_id=request_id.decode("latin-1"))
        scope[HEADERS].append((_ID, request_id))
        if self._ongoing >= _MOST:
            refusal = Overloaded(f"{_MOST} requests are in progress; try again later", retry_after_s=_RETRY_AFTER_S)
            status, body = error_answer(refusal, "unlimited")
            await Json(body, status, {"Retry-After": str(_RETRY_AFTER_S)})(scope, receive, send)
            return
        task = asyncio.current_task()
        assert task is not None
        left = False

        def leave() -> None:
            nonlocal left
            left = True
            task.cancel()

        leaving: set[Callable[[], None]] = scope[LEAVING]
        leaving.add(leave)
        self._ongoing += 1
        scope[CANCELS] = True
        try:
            carrier = {key.decode(): headers[key].decode("latin-1") for key in _TRACE if key in headers}
            with tracing.continued(carrier), tracing.span("request"):
                await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not left:
                raise
        finally:
            self._ongoing -= 1
            leaving.discard(leave)


def _bound(address: str) -> socket.socket:
    """A socket at an address. Raises ConfigError."""
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
        if host is None or port is None or parts.path:
            raise ValueError("needed is HOST:PORT")
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind((host, port))
        except OSError:
            bound.close()
            raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot listen at {address!r}: {error}", setting="api.listen") from error
    return bound
