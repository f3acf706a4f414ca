"""An answer as it comes, in an event loop. Knows nothing of what makes it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress

from lorauter.engine.front import LoopSink
from lorauter.engine.types import Chunk
from lorauter.errors import LorauterError


class Stream:
    """Iterates over an answer's chunks. No generator: an event loop keeps account of each of those.

    Args:
        submit: has the answer made, once the first chunk is asked for, and returns its number.
        cancel: lets it go, if it has not ended.
        gap, keep_s: see `LoopSink`.
        timeout_s: seconds after the first chunk without another one, after which it is given up.
    """

    def __init__(
        self,
        submit: Callable[[LoopSink], int],
        cancel: Callable[[int], None],
        gap: Callable[[], float],
        keep_s: float,
        timeout_s: float,
    ) -> None:
        self._submit = submit
        self._cancel = cancel
        self._gap = gap
        self._keep_s = keep_s
        self._timeout_s = timeout_s
        self._sink: LoopSink | None = None
        self._id: int | None = None  # while it is under way
        self._within = math.inf
        self._failure: BaseException | None = None
        self._closed = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Chunk:
        if self._closed:
            raise StopAsyncIteration
        chunk = None
        try:
            if self._sink is None:
                self._sink = LoopSink(asyncio.get_running_loop(), self._gap, self._keep_s)
                self._id = self._submit(self._sink)
            while chunk is None:
                if self._failure is not None:
                    raise self._failure
                try:
                    chunk, self._failure = await self._sink.take(self._within)
                except TimeoutError as error:
                    raise LorauterError(f"no token for {self._timeout_s:g} s") from error
                self._within = self._timeout_s
        except BaseException:
            self._close()
            raise
        if chunk.finish_reason is not None:
            self._close()
        return chunk

    async def aclose(self) -> None:
        """Let it go, unless it has ended."""
        self._close()

    def _close(self) -> None:
        self._closed = True
        if self._id is not None:
            self._cancel(self._id)
            self._id = None

    def __del__(self) -> None:
        """Nobody has it any more: wherever that is found out, its loop sees to it."""
        if self._id is not None and self._sink is not None:
            with suppress(RuntimeError):  # the loop is gone, which the front finds out too
                self._sink.loop.call_soon_threadsafe(self._cancel, self._id)
