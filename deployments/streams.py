"""Answers as they come: streams of several choices as one, and as server-sent events.

Knows nothing of what is in them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Generic, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")

_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Merged(Generic[T]):
    """What comes of several streams, with the place of its own, as it comes. To be closed, and all of them with it."""

    def __init__(self, streams: Sequence[AsyncGenerator[T]]) -> None:
        self._streams = streams
        self._waiting: dict[asyncio.Future[list[T]], int] = {}

    async def __aiter__(self) -> AsyncGenerator[tuple[int, T]]:
        if len(self._streams) == 1:  # needs no tasks
            async for item in self._streams[0]:
                yield 0, item
            return
        for place in range(len(self._streams)):
            self._wait_for(place)
        while self._waiting:
            done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = self._waiting.pop(task)
                for item in task.result():
                    self._wait_for(place)
                    yield place, item

    def _wait_for(self, place: int) -> None:
        self._waiting[asyncio.ensure_future(_next(self._streams[place]))] = place

    async def aclose(self) -> None:
        """Close the streams."""
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[T]) -> list[T]:
    """The next item; nothing once there is none."""
    async for item in stream:
        return [item]
    return []


class EventStream(StreamingResponse):
    """Server-sent events. However the response ends, what they are made of is closed.

    Where none comes for `ping_s` seconds, a comment is sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        source: Merged[Any],
        headers: dict[str, str],
        ping_s: float | None,
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={**_UNBUFFERED, **headers})
        self._source = source
        self._ping_s = ping_s

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
                    await send_noted({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})

        pinging = asyncio.create_task(ping())
        try:
            await super().stream_response(send_noted)
        finally:
            pinging.cancel()
            await asyncio.wait([pinging])
