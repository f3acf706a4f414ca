"""Several streams as one. Knows nothing of what comes of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Stream(Protocol[T_co]):
    """What comes as it comes; a generator is one."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    def __anext__(self) -> Awaitable[T_co]: ...

    def aclose(self) -> Awaitable[None]:
        """Nothing more is wanted."""


class Merged(Generic[T]):
    """What comes of several streams, with the place of its own, as it comes. To be closed, and all of them with it."""

    def __init__(self, streams: Sequence[Stream[T]]) -> None:
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
            for task in sorted(done, key=self._waiting.__getitem__):
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


async def _next(stream: Stream[T]) -> list[T]:
    """The next item; nothing once there is none."""
    async for item in stream:
        return [item]
    return []
