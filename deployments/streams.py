"""Answers as they come, as server-sent events. Knows nothing of what is in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

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
        if (ping_s := self._ping_s) is None:
            await super().stream_response(send)
            return
        loop = asyncio.get_running_loop()
        last = loop.time()
        looking: asyncio.TimerHandle
        pinging: asyncio.Task[None] | None = None

        async def send_noted(message: Message) -> None:
            nonlocal last
            last = loop.time()
            await send(message)

        async def ping() -> None:
            await send_noted({"type": "http.response.body", "body": self._ping, "more_body": True})

        def look() -> None:
            nonlocal pinging, looking
            silent = loop.time() - last
            if silent >= ping_s and (pinging is None or pinging.done()):
                pinging = loop.create_task(ping())
                pinging.add_done_callback(lambda done: done.cancelled() or done.exception())
            looking = loop.call_later(ping_s - silent if silent < ping_s else ping_s, look)

        looking = loop.call_later(ping_s, look)
        try:
            await super().stream_response(send_noted)
        finally:
            looking.cancel()
            if pinging is not None:
                pinging.cancel()
                await asyncio.wait([pinging])
