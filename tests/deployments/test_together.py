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


class Waiting:
    """Answers each lot when it is told to, with twice its questions."""

    def __init__(self) -> None:
        self.lots: list[list[int]] = []
        self.told: list[asyncio.Future[None]] = []

    async def __call__(self, questions: list[int]) -> Sequence[int]:
        self.lots.append(questions)
        self.told.append(asyncio.get_running_loop().create_future())
        await self.told[-1]
        return [2 * question for question in questions]


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_so_many_lots_are_answered_at_once_and_the_others_wait_together() -> None:
    async def ask() -> None:
        waiting = Waiting()
        together = Together(waiting, at_once=2)
        asked = [asyncio.create_task(together.ask(n)) for n in (1, 2)]
        await _turns()
        assert waiting.lots == [[1, 2]], "those that come in one turn of the loop are one lot"
        for n in (3, 4, 5, 6):
            asked.append(asyncio.create_task(together.ask(n)))
            await _turns()
        assert waiting.lots == [[1, 2], [3]]
        asked[4].cancel()
        waiting.told[1].set_result(None)  # the second is there before the first
        await _turns()
        assert waiting.lots == [[1, 2], [3], [4, 6]]
        assert [task.done() for task in asked] == [False, False, True, False, True, False]
        waiting.told[0].set_exception(ZeroDivisionError())
        waiting.told[2].set_result(None)
        *failed, three, four, gone, six = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(error) for error in failed] == [ZeroDivisionError] * 2
        assert (three, four, six) == (6, 8, 12) and isinstance(gone, asyncio.CancelledError)
        again = asyncio.create_task(together.ask(7))
        await _turns()
        waiting.told[3].set_result(None)
        assert await again == 14

    asyncio.run(ask())


def test_a_lot_that_is_full_goes_and_the_rest_with_the_next() -> None:
    async def ask() -> None:
        waiting = Waiting()
        together = Together(waiting, most=2, at_once=2)
        asked = [asyncio.create_task(together.ask(n)) for n in range(7)]
        await _turns()
        assert waiting.lots == [[0, 1], [2, 3]]
        for done in (1, 0, 2, 3):
            await _turns()
            waiting.told[done].set_result(None)
        assert await asyncio.gather(*asked) == [2 * n for n in range(7)]
        assert waiting.lots == [[0, 1], [2, 3], [4, 5], [6]]

    asyncio.run(ask())


def test_a_question_that_comes_as_the_last_lot_ends_is_answered() -> None:
    async def ask() -> list[int]:
        together = Together(Doubling())

        async def one_by_one() -> list[int]:
            return [await together.ask(n) for n in range(1, 50)]

        answers = await asyncio.wait_for(asyncio.gather(one_by_one(), one_by_one()), 5)
        return [answer for each in answers for answer in each]

    assert asyncio.run(ask()) == [2 * n for n in range(1, 50)] * 2
