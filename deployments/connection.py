"""A client's connection, within bounds that uvicorn leaves open: who does not go on is waited for no more.

A request has to come within a minute, and a second for each kilobyte of it; of an answer something has to be taken in a
minute; a head is not collected without end. What asks for another protocol (`Upgrade`, which Java's client sends with
each first request) is answered in this one. What is said in one turn of the loop leaves together: the head of an answer
with its body, the last piece of a stream with its end. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from deployments.encoded import encoded
from deployments.openai_answers import error_object

PATIENCE_S = 60.0
_FAREWELL_S = 2.0  # for which a client that has its last answer may go on sending
_SLOWEST = 1000.0  # bytes of a request in a second, beyond that
_HEAD = 64 << 10  # bytes of a request that are no body, beside those that come with its beginning or its body's end
_PIECES = 32  # of what is said in one turn of the loop, after which it is written
_OTHER_PROTOCOL = (b"upgrade", b"connection", b"http2-settings")

LEAVING = "lorauter.leaving"
"""In a request's scope: what is called, of all who have put something there, once its client has left before the end of
its answer."""
HEADERS = "lorauter.headers"
"""In a request's scope: headers that its answer has beside its own, as names and values."""


class Connection(HttpToolsProtocol):
    """Where a request or an answer is between a client and the app."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        gathered: Any = _Gathered(transport, self.loop, self._parts)
        self._refused_at: float | None = None
        super().connection_made(gathered)
        self._leaving: set[Callable[[], None]] = set()  # of the answer that is being made
        self._in_request, self._head = False, 0
        self._asks_for_other = False
        self._answering: RequestResponseCycle | None = None
        self._full_since = 0.0
        self._begin()

    def _begin(self) -> None:
        """From here on the next request is waited for."""
        self._since, self._got = self.loop.time(), 0

    def check(self) -> None:
        """Close it if its client has been waited for too long."""
        waited = self.loop.time() - self._since
        if self._refused_at is not None:
            if self.loop.time() - self._refused_at > _FAREWELL_S:
                self.transport.abort()
        elif self.flow.write_paused:
            if self.loop.time() - self._full_since > PATIENCE_S:
                self.transport.abort()
        elif self._is_asked_for_more and waited > PATIENCE_S + self._got / _SLOWEST:
            if self._got:
                self._refuse(408, f"the request did not come within {waited:.0f} s; send it faster")
            else:
                self.transport.close()

    @property
    def _is_asked_for_more(self) -> bool:
        """Whether it is the client's turn: there is no request yet, or a part of one that is being read."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or (cycle.more_body and not self.flow.read_paused)

    def data_received(self, data: bytes) -> None:
        if self._refused_at is not None:
            return
        self._got += len(data)
        self._head += len(data)  # what turns out to be something else sets it back
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(400, "the request is not HTTP as it has to be")
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        else:
            if self._in_request and self._head > _HEAD:
                self._refuse(431, f"the request's head is larger than {_HEAD} bytes; send fewer or shorter headers")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_request, self._head = True, 0

    def on_headers_complete(self) -> None:
        # The parser takes what asks for another protocol for a request without a body.
        self._asks_for_other = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if not self._asks_for_other:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_request = False
        if not self._asks_for_other:
            super().on_message_complete()

    def _stay(self, rest: bytes) -> None:
        """Read a request again, without what asks for another protocol in its head, and go on with the rest."""
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        head = [b"%s: %s\r\n" % header for header in self.headers if header[0] not in _OTHER_PROTOCOL]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join([line, *head, b"\r\n", rest]))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        scope: Scope = cycle.scope  # type: ignore[assignment]  # which ASGI lets servers add to
        scope[LEAVING] = self._leaving = set()
        scope[HEADERS] = cycle.default_headers = [*cycle.default_headers]
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self._begin()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._full_since = self.loop.time()
        super().pause_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_answer()
        super().connection_lost(exc)

    def _end_answer(self) -> None:
        """Nobody listens to the answer that is being made; it may not be the last request's."""
        if self._answering is None:
            return
        self._answering.disconnected = True
        self._answering.message_event.set()
        if not self._answering.response_complete:
            for leave in list(self._leaving):
                leave()

    def _refuse(self, status: int, message: str) -> None:
        """The last that is said here, in OpenAI's shape, unless an answer has begun."""
        if self._answering is None or self._answering.response_complete or not self._answering.response_started:
            body = encoded(error_object(message))
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
            self._in_request = True  # whatever it sends
        self.transport.close()

    def _parts(self) -> bool:
        """Part from a client that is still sending, if it is: it would lose what was said to it if the connection were
        closed at once."""
        if not self._in_request or self._refused_at is not None:
            return False
        self._refused_at = self.loop.time()
        self.transport.write_eof()
        self._end_answer()
        return True


class _Gathered:
    """A transport that writes once a turn of its loop, a system call that may wake somebody; else it is the same."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, parts: Callable[[], bool]
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._parts = parts  # says whether the end is put off
        self._unsent: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(data)
        if len(self._unsent) >= _PIECES:  # who writes without end is to hear of a client that does not read
            self._flush()

    def _flush(self) -> None:
        pieces, self._unsent = self._unsent, []
        if pieces and not self._transport.is_closing():
            self._transport.write(b"".join(pieces))

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        if not self._parts():
            self._transport.close()
