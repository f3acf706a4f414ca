"""Questions that come while others are being answered are answered together: a lone one waits for nobody.

A lot is answered in the context of its first question, with its id and trace. Knows neither what is asked nor who
answers, and no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Asked = TypeVar("Asked")
Told = TypeVar("Told")
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class _Waiting(Generic[Asked, Told]):
    question: Asked
    told: asyncio.Future[Told] | None
    context: Context


class Together(Generic[Asked, Told]):
    """Has questions answered, lot by lot, in the order in which they came.

    Args:
        answer: n questions to n answers; what it raises is told to all n.
        size: how much a question is.
        most: what a lot's sizes sum to at most; a question that is more by itself is a lot by itself.
        at_once: lots that are being answered at most. Where questions wait again at whoever answers, more of them take
            the first wait from it.
    """

    def __init__(
        self,
        answer: Callable[[list[Asked]], Awaitable[Sequence[Told]]],
        *,
        size: Callable[[Asked], int] = lambda _: 1,
        most: int = 1 << 30,
        at_once: int = 1,
    ) -> None:
        self._answer = answer
        self._size = size
        self._most = most
        self._at_once = at_once
        self._waiting: list[_Waiting[Asked, Told]] = []
        self._running: set[asyncio.Task[Any] | None] = set()
        self._beginning = False  # whether one of these has not taken its first lot

    async def ask(self, question: Asked) -> Told:
        """The answer."""
        told: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._put(question, told)
        return await told

    def tell(self, question: Asked) -> None:
        """Ask what has no answer that anybody waits for, or an error that anybody would hear of."""
        self._put(question, None)

    def _put(self, question: Asked, told: asyncio.Future[Told] | None) -> None:
        self._waiting.append(_Waiting(question, told, copy_context()))
        self._begin()

    def _begin(self) -> None:
        """Have what waits taken up, with all that comes in this turn of the loop, unless it has to wait."""
        if self._waiting and len(self._running) < self._at_once and not self._beginning:
            self._beginning = True
            self._running.add(asyncio.get_running_loop().create_task(self._run()))

    async def _run(self) -> None:
        self._beginning = False
        try:
            while lot := self._next():
                self._begin()
                answering = self._told([one.question for one in lot])
                try:
                    answers = await asyncio.create_task(answering, context=lot[0].context)
                except Exception as error:  # noqa: BLE001 (who asked is told)
                    for one in lot:
                        if one.told is not None and not one.told.done():
                            one.told.set_exception(error)
                    continue
                for one, answer in zip(lot, answers, strict=True):
                    if one.told is not None and not one.told.done():
                        one.told.set_result(answer)
        finally:
            self._running.discard(asyncio.current_task())

    async def _told(self, questions: list[Asked]) -> Sequence[Told]:
        return await self._answer(questions)

    def _next(self) -> list[_Waiting[Asked, Told]]:
        """The next lot, without the questions of those who have gone."""
        lot: list[_Waiting[Asked, Told]] = []
        total = 0
        for taken, one in enumerate(self._waiting):
            if one.told is not None and one.told.done():
                continue
            total += self._size(one.question)
            if lot and total > self._most:
                self._waiting = self._waiting[taken:]
                return lot
            lot.append(one)
        self._waiting = []
        return lot


def shared_out(rows: NDArray[Number], requests: Sequence[Sequence[object]]) -> list[NDArray[Number]]:
    """To each of some requests its rows, one for each of its parts."""
    ends = list(accumulate(map(len, requests)))
    return [rows[end - len(request) : end] for request, end in zip(requests, ends, strict=True)]
