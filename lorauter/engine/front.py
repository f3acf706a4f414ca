"""From tokens to what clients get: text, stop strings, delivery. A thread of its own: the device waits for none of it.

Knows nothing of models, steps or adapters.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorauter.engine.scheduler import ActiveSequence, Event
from lorauter.engine.text import TextStream
from lorauter.engine.types import Chunk, FinishReason

logger = logging.getLogger("lorauter.engine")

Item = Chunk | BaseException
Sink = Callable[[Item], object]
"""Who is told what becomes of a request: each chunk, or the error that ended it. A `LoopSink` is told by its loop."""


class LoopSink:
    """Puts what comes into a queue of an event loop; what a step brings to all queues of a loop wakes it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ready: asyncio.Queue[Item] = asyncio.Queue()

    def __call__(self, item: Item) -> None:
        deliver(self.loop, [(self, item)])


def deliver(loop: asyncio.AbstractEventLoop, items: Sequence[tuple[LoopSink, Item]]) -> None:
    """Put items into their queues. Raises RuntimeError if the loop is gone."""

    def put() -> None:
        for sink, item in items:
            sink.ready.put_nowait(item)

    loop.call_soon_threadsafe(put)


@dataclass
class _Answer:
    sink: Sink
    text: TextStream
    begun: bool = False


class Front:
    """Turns tokens into chunks, and hands them out.

    Args:
        cancel: lets a sequence go: a stop string has ended it, or nobody is there any more.
    """

    def __init__(self, cancel: Callable[[ActiveSequence], None]) -> None:
        self._cancel = cancel
        self._answers: dict[ActiveSequence, _Answer] = {}
        self._queue: queue.SimpleQueue[Sequence[Event | tuple[ActiveSequence, Exception]] | None] = queue.SimpleQueue()
        self._pending = 0
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lorauter-front", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether tokens are handed out."""
        return self._thread.is_alive()

    def expect(self, sequence: ActiveSequence, sink: Sink, text: TextStream) -> None:
        """From now on tokens of this sequence may come."""
        self._answers[sequence] = _Answer(sink, text)

    def forget(self, sequence: ActiveSequence) -> None:
        """Nobody waits for this sequence any more."""
        self._answers.pop(sequence, None)

    def put(self, events: Sequence[Event | tuple[ActiveSequence, Exception]]) -> None:
        """Tokens of one step, or errors that have ended sequences. Returns at once."""
        with self._idle:
            self._pending += 1
        self._queue.put(events)

    def drain(self) -> None:
        """Wait until all that was put is handed out."""
        with self._idle:
            self._idle.wait_for(lambda: not self._pending or not self._thread.is_alive())

    def close(self, error: Exception) -> None:
        """Hand out what is there, and tell everybody else this error."""
        self._queue.put(None)
        self._thread.join()
        self._handle([(sequence, error) for sequence in list(self._answers)])

    def _run(self) -> None:
        while (events := self._queue.get()) is not None:
            try:
                self._handle(events)
            except BaseException:
                logger.exception("what a step brought could not be handed out")
            with self._idle:
                self._pending -= 1
                self._idle.notify_all()

    def _handle(self, events: Sequence[Event | tuple[ActiveSequence, Exception]]) -> None:
        loops: dict[asyncio.AbstractEventLoop, list[tuple[LoopSink, Item]]] = {}
        senders: dict[asyncio.AbstractEventLoop, list[ActiveSequence]] = {}
        for event in events:
            item: Item
            sequence = event.sequence if isinstance(event, Event) else event[0]
            answer = self._answers.get(sequence)
            if answer is None:
                continue
            try:
                item = self._chunk(answer, event) if isinstance(event, Event) else event[1]
            except Exception as error:  # this answer's trouble alone
                logger.exception("an answer's text could not be made")
                item = error
            if not isinstance(item, Chunk) or item.finish_reason is not None:
                self.forget(sequence)
                if not sequence.ended:
                    self._cancel(sequence)
            if isinstance(answer.sink, LoopSink):
                loops.setdefault(answer.sink.loop, []).append((answer.sink, item))
                senders.setdefault(answer.sink.loop, []).append(sequence)
                continue
            try:
                answer.sink(item)
            except Exception:
                logger.exception("an answer could not be handed out")
                self._abandon(sequence)
        for loop, items in loops.items():
            try:
                deliver(loop, items)
            except RuntimeError:  # the loop is gone, and who waited in it
                for sequence in senders[loop]:
                    self._abandon(sequence)

    def _abandon(self, sequence: ActiveSequence) -> None:
        self.forget(sequence)
        self._cancel(sequence)

    @staticmethod
    def _chunk(answer: _Answer, event: Event) -> Chunk:
        """What a token adds to the answer, with the reason if it ends it."""
        reason: FinishReason | None = event.reason
        text = ""
        if reason != "stop":  # else it is the token that says so
            text, stopped = answer.text.push(event.token)
            if stopped:
                reason = "stop"
        if reason is not None:
            text += answer.text.flush()
        reused = 0 if answer.begun else event.sequence.reused
        answer.begun = True
        return Chunk(text, (event.token,), reason, reused)
