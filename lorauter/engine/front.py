"""From tokens to what clients get: text, stop strings, delivery. A thread of its own: the device waits for none of it.

Knows nothing of models, steps or adapters.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from lorauter.engine.messages import Report
from lorauter.engine.text import TextStream
from lorauter.engine.types import Chunk, FinishReason, PromptLogprobs

logger = logging.getLogger("lorauter.engine")

Item = Chunk | BaseException
Sink = Callable[[Item], object]
"""Who is told what becomes of a request: each chunk, or the error that ended it. A `LoopSink` is told by its loop."""


class _Bare(NamedTuple):
    """The first token of an answer without text, or its last; see `Chunk`."""

    token: int
    finish_reason: FinishReason | None
    cached_tokens: int = 0
    waited_s: float = 0.0


_Gathered = Item | _Bare | int
"""The same, or what an answer without text is told: its first token, its last, and of those between them each alone."""


class LoopSink:
    """Gathers what comes for somebody in an event loop: the first at once, and what ends it; the rest at leisure.

    It comes from another thread, which calls the loop only for what somebody is to wake up for.

    Args:
        gap: seconds from one time that things are taken to the next, as of when it is asked.
        keep_s: seconds from now for which the first waits too, if it is not the last.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, gap: Callable[[], float], keep_s: float = 0.0) -> None:
        self.loop = loop
        self._gap = gap
        self._items: deque[_Gathered] = deque()
        self._due = time.monotonic() + keep_s if keep_s else 0.0
        self._came = None if keep_s else math.inf  # when the first did, until it is taken
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, item: Item) -> None:
        if self.add(item):
            wake(self.loop, [self])

    def add(self, item: _Gathered) -> bool:
        """Something has come; whether the loop is to be told (`wake`)."""
        self._items.append(item)
        if item.__class__ is int:
            return time.monotonic() >= self._due
        now = time.monotonic()
        if self._came is None:
            self._came = now
        return now >= self._due or _ends(item)

    async def take(self, within: float = math.inf) -> tuple[Chunk | None, BaseException | None]:
        """What has come, once something has and it is time to: as one chunk, and the error that came after it.

        Raises TimeoutError: there was nothing to take within so many seconds.
        """
        if not self._is_due():
            self._waiter = self.loop.create_future()
            left = self._due - time.monotonic()
            if 0 < left < within:
                self._timer = self.loop.call_later(left, self._ring, within - left)
            elif within < math.inf:
                self._timer = self.loop.call_later(within, self._give_up)
            try:
                if not self._is_due():  # it may have come while nobody waited for it
                    await self._waiter
            finally:
                self._waiter = None
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
        pieces: list[Chunk | _Bare | int] = []
        failure: BaseException | None = None
        for _ in range(len(self._items)):
            item = self._items.popleft()
            if not isinstance(item, BaseException):
                pieces.append(item)
            elif failure is None:
                failure = item
        now = time.monotonic()
        kept_s, self._came = max(0.0, now - (self._came or now)), math.inf
        self._due = now + self._gap()
        return _joined(pieces, kept_s) if pieces else None, failure

    def wake(self) -> None:
        """In the loop: somebody who waits may have something to take."""
        if self._waiter is not None and not self._waiter.done() and self._is_due():
            self._waiter.set_result(None)

    def _ring(self, left: float) -> None:
        self._due = 0.0  # whatever the clock of the loop's timers
        self.wake()
        self._timer = self.loop.call_later(left, self._give_up) if left < math.inf else None

    def _give_up(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            if self._items:  # it was not yet time to take it
                self._waiter.set_result(None)
            else:
                self._waiter.set_exception(TimeoutError())

    def _is_due(self) -> bool:
        if not self._items:
            return False
        return _ends(self._items[-1]) or time.monotonic() >= self._due


def _ends(item: _Gathered) -> bool:
    """Whether nothing comes after it."""
    if isinstance(item, int):
        return False
    return isinstance(item, BaseException) or item.finish_reason is not None


def _joined(pieces: Sequence[Chunk | _Bare | int], kept_s: float) -> Chunk:
    """Pieces that follow one another as one; an answer has text in all of its pieces, or in none."""
    chunks = [piece for piece in pieces if isinstance(piece, Chunk)]
    if chunks:
        return Chunk.joined(chunks).but(kept_s=kept_s)
    bare = cast(Sequence[_Bare | int], pieces)
    first, last = bare[0], bare[-1]
    tokens = tuple([piece.token if isinstance(piece, _Bare) else piece for piece in bare])
    reason = last.finish_reason if isinstance(last, _Bare) else None
    if not isinstance(first, _Bare):
        return Chunk("", tokens, reason)
    return Chunk("", tokens, reason, first.cached_tokens, first.waited_s, kept_s=kept_s)


def wake(loop: asyncio.AbstractEventLoop, sinks: Sequence[LoopSink]) -> None:
    """Wake those who wait for something in their loop, which is called once. Raises RuntimeError if it is gone."""

    def wake_all() -> None:
        for sink in sinks:
            sink.wake()

    loop.call_soon_threadsafe(wake_all)


@dataclass
class _Answer:
    sink: Sink
    text: TextStream | None
    prompt: PromptLogprobs  # as far as they are known


class Front:
    """Turns tokens into chunks, and hands them out.

    Args:
        cancel: lets a sequence go: a stop string has ended it, or nobody is there any more.
    """

    def __init__(self, cancel: Callable[[int], None]) -> None:
        self._cancel = cancel
        self._answers: dict[int, _Answer] = {}
        self._queue: queue.SimpleQueue[tuple[Report, AbstractContextManager[object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lorauter-front", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether tokens are handed out."""
        return self._thread.is_alive()

    def expect(self, id: int, sink: Sink, text: TextStream | None) -> None:
        """From now on tokens of this sequence may come.

        Args:
            text: makes their text; None makes none.
        """
        tells_prompt = text is not None and text.sampling.prompt_logprobs is not None
        self._answers[id] = _Answer(sink, text, (None,) if tells_prompt else ())

    def forget(self, id: int) -> None:
        """Nobody waits for this sequence any more."""
        self._answers.pop(id, None)

    def put(self, report: Report, while_handled: AbstractContextManager[object] | None = None) -> None:
        """What a step brought; returns at once.

        Args:
            while_handled: what is entered while all of it is handed out.
        """
        self._queue.put((report, while_handled or nullcontext()))

    def close(self, error: Exception) -> None:
        """Hand out what is there, and tell everybody else this error."""
        self._queue.put(None)
        self._thread.join()
        self._handle(Report(failed=[(id, error) for id in list(self._answers)]))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            report, while_handled = item
            try:
                with while_handled:
                    self._handle(report)
            except BaseException:
                logger.exception("what a step brought could not be handed out")

    def _handle(self, report: Report) -> None:
        woken: defaultdict[asyncio.AbstractEventLoop, list[LoopSink]] = defaultdict(list)

        def hand_out(id: int, answer: _Answer, item: Item) -> None:
            if isinstance(answer.sink, LoopSink):
                if answer.sink.add(item):
                    woken[answer.sink.loop].append(answer.sink)
                return
            try:
                answer.sink(item)
            except Exception:
                logger.exception("an answer could not be handed out")
                self._abandon(id)

        for id, scores in report.scored.items():
            answer = self._answers.get(id)
            if answer is not None and answer.text is not None:
                try:
                    answer.prompt += tuple(answer.text.logprobs(scores))
                except Exception as error:  # this answer's trouble alone
                    logger.exception("a prompt's text could not be made")
                    self._abandon(id)
                    hand_out(id, answer, error)
        for id, token, reason in report.events:
            answer = self._answers.get(id)
            if answer is None:
                continue
            if answer.text is None and isinstance(answer.sink, LoopSink):
                bare: _Bare | int = token
                if reason is not None or id in report.reused:
                    bare = _Bare(token, reason, report.reused.get(id, 0), report.waited.get(id, 0.0))
                if reason is not None:
                    self.forget(id)
                if answer.sink.add(bare):
                    woken[answer.sink.loop].append(answer.sink)
                continue
            item: Item
            try:
                item = _chunk(answer.text, token, reason)
                if id in report.ranked and answer.text is not None:
                    item = replace(item, logprobs=tuple(answer.text.logprobs(report.ranked[id])))
                if id in report.reused:  # it is the first
                    item = replace(
                        item,
                        cached_tokens=report.reused[id],
                        waited_s=report.waited[id],
                        prompt_logprobs=answer.prompt,
                    )
            except Exception as error:  # this answer's trouble alone
                logger.exception("an answer's text could not be made")
                item = error
            if not isinstance(item, Chunk) or item.finish_reason is not None:
                self.forget(id)
                if reason is None:  # else it has ended of itself
                    self._cancel(id)
            hand_out(id, answer, item)
        for id, failure in report.failed:
            answer = self._answers.pop(id, None)
            if answer is not None:
                hand_out(id, answer, failure)
        for loop, sinks in woken.items():
            try:
                wake(loop, sinks)
            except RuntimeError:  # the loop is gone, and who waited in it
                for id, answer in list(self._answers.items()):
                    if isinstance(answer.sink, LoopSink) and answer.sink.loop is loop:
                        self._abandon(id)

    def _abandon(self, id: int) -> None:
        self.forget(id)
        self._cancel(id)


def _chunk(stream: TextStream | None, token: int, reason: FinishReason | None) -> Chunk:
    """What a token adds to the answer, with the reason if it ends it."""
    if stream is None:
        return Chunk("", (token,), reason)
    text = ""
    if reason == "stop":  # it is the token that says so
        text = stream.end(token)
    else:
        text, stopped = stream.push(token)
        if stopped:
            reason = "stop"
    if reason is not None:
        text += stream.flush()
    return Chunk(text, (token,), reason, stop_string=stream.stopped_by)
