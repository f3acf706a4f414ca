"""Several answers to one prompt, as one stream. Knows nothing of how they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace

from lorauter.engine.types import Chunk


async def side_by_side(streams: Mapping[int, AsyncGenerator[Chunk]]) -> AsyncGenerator[Chunk]:
    """The chunks of all answers as they come, each with its answer's index. The first error ends them all.

    All begin before the first chunk comes, and are closed with this one.
    """
    came: asyncio.Queue[Chunk | Exception] = asyncio.Queue()

    async def listen(index: int, stream: AsyncGenerator[Chunk]) -> None:
        try:
            async for chunk in stream:
                came.put_nowait(replace(chunk, index=index))
        except Exception as error:  # noqa: BLE001 (the listener's to raise)
            came.put_nowait(error)
        finally:
            await stream.aclose()

    if len(streams) == 1:
        [(index, stream)] = streams.items()
        try:
            async for chunk in stream:
                yield replace(chunk, index=index) if index else chunk
        finally:
            await stream.aclose()
        return
    tasks = [asyncio.create_task(listen(index, stream)) for index, stream in streams.items()]
    left = len(tasks)
    try:
        while left:
            item = await came.get()
            if isinstance(item, Exception):
                raise item
            left -= item.finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
