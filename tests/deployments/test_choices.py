from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from deployments.choices import side_by_side
from lorauter.engine import Chunk


class Stream:
    """Says its letters one after another, each once there is nothing else to do; an error in a letter's place."""

    def __init__(self, *items: Any) -> None:
        self._items = items
        self.closed = False

    async def run(self) -> AsyncGenerator[Chunk]:
        try:
            for i, item in enumerate(self._items):
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                yield Chunk(item, (i,), "stop" if i == len(self._items) - 1 else None)
        finally:
            self.closed = True


def listen(*streams: Stream, stop: int | None = None) -> list[Chunk]:
    async def run() -> list[Chunk]:
        heard: list[Chunk] = []
        stream = side_by_side({index: stream.run() for index, stream in enumerate(streams, 3)})
        try:
            async for chunk in stream:
                heard.append(chunk)
                if len(heard) == stop:
                    break
        finally:
            await stream.aclose()
        return heard

    return asyncio.run(run())


@pytest.mark.parametrize("texts", [["abc"], ["abc", "x"], ["a", "b", "cdefg"]])
def test_each_answer_comes_whole_and_with_its_index(texts: list[str]) -> None:
    heard = listen(*(Stream(*text) for text in texts))
    for index, text in enumerate(texts, 3):
        mine = [chunk for chunk in heard if chunk.index == index]
        assert "".join(chunk.text for chunk in mine) == text
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(text) - 1) + ["stop"]


def test_answers_come_beside_each_other() -> None:
    assert [chunk.index for chunk in listen(Stream(*"abc"), Stream(*"def"))] == [3, 4] * 3


def test_an_error_ends_them_all() -> None:
    endless, broken = Stream(*"a" * 10000), Stream("x", ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        listen(endless, broken)
    assert endless.closed
    assert broken.closed


@pytest.mark.parametrize("n", [1, 3])
def test_who_stops_listening_closes_them_all(n: int) -> None:
    streams = [Stream(*"a" * 10000) for _ in range(n)]
    listen(*streams, stop=4)
    assert all(stream.closed for stream in streams)
