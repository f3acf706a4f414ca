"""Answers as they come, as server-sent events. Knows nothing of what is in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.merged import Merged

CANCELS = "lorauter.cancels"
"""In the scope of a request whose answer is cancelled once its client has left: then nobody else has to look."""
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Server-sent events. However the response ends, what they are made of is closed.

    Where none comes for `ping_s` seconds, `ping` is sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        source: Merged[Any],
        headers: dict[str, str],
        ping_s: float | None,
        ping: bytes,
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={**_UNBUFFERED, **headers})
        self._source = source
        self._ping_s = ping_s
        self._ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope.get(CANCELS):
                await self.stream_response(send)
            else:
                await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass  # the status is sent, and nobody is there
        finally:
            await self._source.aclose()

    async def stream_response(self, send: Send) -> None:
        loop, ping_s = asyncio.get_running_loop(), self._ping_s
        last = loop.time()
        looking: asyncio.TimerHandle | None = None
        pinging: asyncio.Task[None] | None = None

        async def ping() -> None:
            nonlocal last
            last = loop.time()
            await send({"type": "http.response.body", "body": self._ping, "more_body": True})

        def look(ping_s: float) -> None:
            nonlocal pinging, looking
            silent = loop.time() - last
            if silent >= ping_s and (pinging is None or pinging.done()):
                pinging = loop.create_task(ping())
                pinging.add_done_callback(lambda done: done.cancelled() or done.exception())
            looking = loop.call_later(ping_s - silent if silent < ping_s else ping_s, look, ping_s)

        if ping_s is not None:
            looking = loop.call_later(ping_s, look, ping_s)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self.body_iterator:
                last = loop.time()
                await send({"type": "http.response.body", "body": event, "more_body": True})
            last = loop.time()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if looking is not None:
                looking.cancel()
            if pinging is not None:
                pinging.cancel()
                await asyncio.wait([pinging])
