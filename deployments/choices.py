"""Several answers to one prompt, as one stream. Knows nothing of how they are made."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace

from deployments.merged import Merged, Stream
from lorauter.engine.types import Chunk


def side_by_side(streams: Mapping[int, Stream[Chunk]]) -> Stream[Chunk]:
    """The chunks of all answers as they come, each with its answer's index. The first error ends them all.

    All begin before the first chunk comes, and are closed with this one.
    """
    return streams[0] if list(streams) == [0] else _merged(streams)


async def _merged(streams: Mapping[int, Stream[Chunk]]) -> AsyncGenerator[Chunk]:
    indices, merged = list(streams), Merged(list(streams.values()))
    try:
        async for place, chunk in merged:
            yield replace(chunk, index=indices[place]) if indices[place] else chunk
    finally:
        await merged.aclose()
