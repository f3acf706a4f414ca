from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from deployments.together import Together


class Doubling:
    """Answers with twice the question; keeps each lot. A lot with a 0 in it fails."""

    def __init__(self) -> None:
        self.lots: list[list[int]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, questions: list[int]) -> Sequence[int]:
        self.lots.append(questions)
        await self.open.wait()
        return [2 * question // bool(question) for question in questions]


def test_a_lone_question_waits_for_nobody_and_those_that_come_meanwhile_go_together() -> None:
    async def ask() -> tuple[Doubling, list[Any]]:
        doubling = Doubling()
        together = Together(doubling)
        assert await together.ask(1) == 2
        doubling.open.clear()
        asked = [asyncio.create_task(together.ask(2))]
        await asyncio.sleep(0.01)
        asked += [asyncio.create_task(together.ask(n)) for n in (3, 4, 5)]
        await asyncio.sleep(0.01)
        asked[2].cancel()
        together.tell(6)
        doubling.open.set()
        return doubling, await asyncio.gather(*asked, return_exceptions=True)

    doubling, answers = asyncio.run(ask())
    assert doubling.lots == [[1], [2], [3, 5, 6]]
    assert answers[:2] == [4, 6]
    assert isinstance(answers[2], asyncio.CancelledError)
    assert answers[3] == 10


def test_an_error_is_told_to_its_lot_alone() -> None:
    async def ask() -> list[Any]:
        together = Together(Doubling(), most=2)
        together.tell(0)
        return await asyncio.gather(*[together.ask(n) for n in (0, 1, 2, 3)], return_exceptions=True)

    *failed, one, other = asyncio.run(ask())
    assert [type(answer) for answer in failed] == [ZeroDivisionError] * 2
    assert (one, other) == (4, 6)


@pytest.mark.parametrize(
    ("questions", "lots"),
    [([1, 2, 3, 4], [[1, 2], [3], [4]]), ([9, 1, 9, 9], [[9], [1], [9], [9]]), ([1] * 5, [[1, 1, 1, 1], [1]])],
)
def test_a_lot_holds_so_much_and_no_more(questions: list[int], lots: list[list[int]]) -> None:
    async def ask() -> list[list[int]]:
        doubling = Doubling()
        together = Together(doubling, size=lambda question: question, most=4)
        assert await asyncio.gather(*map(together.ask, questions)) == [2 * question for question in questions]
        return doubling.lots

    assert asyncio.run(ask()) == lots
