"""Answers as they come, as server-sent events. Knows nothing of what is in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from deployments.merged import Merged

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
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass  # the status is sent, and nobody is there
        finally:
            await self._source.aclose()

    async def stream_response(self, send: Send) -> None:
        if (ping_s := self._ping_s) is None:
            await super().stream_response(send)
            return
        last = time.monotonic()

        async def send_noted(message: Message) -> None:
            nonlocal last
            last = time.monotonic()
            await send(message)

        async def ping() -> None:
            while True:
                silent = time.monotonic() - last
                await asyncio.sleep(ping_s - silent if silent < ping_s else 0.0)
                if time.monotonic() - last >= ping_s:
                    await send_noted({"type": "http.response.body", "body": self._ping, "more_body": True})

        pinging = asyncio.create_task(ping())
        try:
            await super().stream_response(send_noted)
        finally:
            pinging.cancel()
            await asyncio.wait([pinging])
