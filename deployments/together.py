"""Questions that come while others are being answered are answered together: a lone one waits for nobody.

Knows neither what is asked nor who answers, and no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Told = TypeVar("Told")


class Together(Generic[Asked, Told]):
    """Has questions answered, one lot at a time, in the order in which they came.

    Args:
        answer: n questions to n answers; what it raises is told to all n.
        size: how much a question is.
        most: what a lot's sizes sum to at most; a question that is more by itself is a lot by itself.
    """

    def __init__(
        self,
        answer: Callable[[list[Asked]], Awaitable[Sequence[Told]]],
        *,
        size: Callable[[Asked], int] = lambda _: 1,
        most: int = 1 << 30,
    ) -> None:
        self._answer = answer
        self._size = size
        self._most = most
        self._waiting: list[tuple[Asked, asyncio.Future[Told] | None]] = []
        self._running: asyncio.Task[None] | None = None

    async def ask(self, question: Asked) -> Told:
        """The answer."""
        told: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._put(question, told)
        return await told

    def tell(self, question: Asked) -> None:
        """Ask what has no answer that anybody waits for, or an error that anybody would hear of."""
        self._put(question, None)

    def _put(self, question: Asked, told: asyncio.Future[Told] | None) -> None:
        self._waiting.append((question, told))
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while lot := self._next():
                try:
                    answers = await self._answer([question for question, _ in lot])
                except Exception as error:  # noqa: BLE001 (who asked is told)
                    for _, told in lot:
                        if told is not None and not told.done():
                            told.set_exception(error)
                    continue
                for (_, told), answer in zip(lot, answers, strict=True):
                    if told is not None and not told.done():
                        told.set_result(answer)
        finally:
            self._running = None

    def _next(self) -> list[tuple[Asked, asyncio.Future[Told] | None]]:
        """The next lot, without the questions of those who have gone."""
        lot: list[tuple[Asked, asyncio.Future[Told] | None]] = []
        total = 0
        for taken, (question, told) in enumerate(self._waiting):
            if told is not None and told.done():
                continue
            total += self._size(question)
            if lot and total > self._most:
                self._waiting = self._waiting[taken:]
                return lot
            lot.append((question, told))
        self._waiting = []
        return lot
