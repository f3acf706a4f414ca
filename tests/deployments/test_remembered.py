"""Texts whose rows are known are not asked for again."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from deployments.remembered import Remembered


class Asked:
    """Rows that tell of their text, and which texts were asked for."""

    def __init__(self) -> None:
        self.lots: list[list[str]] = []

    async def rows(self, texts: list[str]) -> NDArray[np.float32]:
        self.lots.append(texts)
        return np.array([[len(text), hash(text) % 1000] for text in texts], np.float32).reshape(-1, 2)


def test_a_text_is_asked_for_once_and_rows_are_in_the_order_of_the_texts() -> None:
    asked = Asked()
    remembered = Remembered(asked.rows)

    async def scenario() -> None:
        for texts in (["a", "bb", "a"], ["bb"], ["ccc", "a"], [], ["\ud800"], ["\ud800", "ccc"]):
            np.testing.assert_array_equal(await remembered.ask(texts), await Asked().rows(texts))

    asyncio.run(scenario())
    assert asked.lots == [["a", "bb"], ["ccc"], [], ["\ud800"]]


def test_the_texts_that_came_last_are_known_and_a_lot_larger_than_that_is_answered() -> None:
    asked = Asked()
    remembered = Remembered(asked.rows, most=2)

    async def scenario() -> None:
        for texts in (["a", "b"], ["a"], ["c"], ["a", "c"], ["b"], ["x", "y", "z"], ["z"]):
            assert len(await remembered.ask(texts)) == len(texts)

    asyncio.run(scenario())
    assert asked.lots == [["a", "b"], ["c"], ["b"], ["x", "y", "z"]]


def test_what_fails_is_not_known_and_a_row_does_not_keep_its_lot() -> None:
    fails = [True]

    async def ask(texts: list[str]) -> NDArray[np.float32]:
        if fails.pop():
            raise ValueError("no")
        return np.zeros((len(texts), 2), np.float32)

    remembered = Remembered(ask)

    async def scenario() -> None:
        try:
            await remembered.ask(["a"])
        except ValueError:
            fails.append(False)
        assert not (await remembered.ask(["a"])).any()

    asyncio.run(scenario())
    assert all(row.base is None for row in remembered._known.values())
