"""Feeds an engine a long row of requests so that it is never idle, and so that the answers can be repeated.

Each request that ends lets the next one in, in the same step of the engine. What runs together then follows from
the requests alone, not from any clock, and so do the tokens, whose arithmetic depends on the company. Knows nothing of
where requests come from.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lorauter.engine.engine import Engine
from lorauter.engine.types import Chunk, Completion, GenerationRequest


@dataclass(frozen=True)
class Outcome:
    """What became of a request: an answer or an error, and the seconds from its admission to its end."""

    result: Completion | Exception
    seconds: float = 0.0


@dataclass
class _Feed:
    engine: Engine
    requests: Iterator[GenerationRequest | Exception]
    ended: Callable[[Outcome], None]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    taken: int = 0
    running: int = 0
    failure: BaseException | None = None
    idle: threading.Event = field(default_factory=threading.Event)

    def admit_next(self) -> None:
        """Submit the next request that the engine takes; what it refuses has ended."""
        while self.failure is None:
            place = self.taken
            try:
                request = next(self.requests, None)
            except Exception as error:  # noqa: BLE001 (the caller's iterator, told to the caller)
                self.failure = error
                return
            if request is None:
                return
            self.taken += 1
            if isinstance(request, GenerationRequest):
                try:
                    self.engine.submit(request, self._sink(place))
                except Exception as error:  # noqa: BLE001 (its own trouble; where the engine has ended, that is told)
                    request = error.with_traceback(None)
                else:
                    self.running += 1
                    return
            self._end(place, Outcome(request))

    def _sink(self, place: int) -> Callable[[Chunk | BaseException], None]:
        started = time.perf_counter()
        pieces: list[Chunk] = []

        def sink(item: Chunk | BaseException) -> None:
            if isinstance(item, Chunk):
                pieces.append(item)
                if item.finish_reason is None:
                    return
            seconds = time.perf_counter() - started
            result = item if isinstance(item, Exception) else Completion.of(pieces)
            self.running -= 1
            try:
                self._end(place, Outcome(result, seconds))
                self.admit_next()
            except Exception as error:  # noqa: BLE001 (the caller's own code, in the engine's front: told to the caller)
                self.failure = self.failure or error
            if not self.running:
                self.idle.set()

        return sink

    def _end(self, place: int, outcome: Outcome) -> None:
        self.outcomes[place] = outcome
        self.ended(outcome)


def feed(
    engine: Engine,
    requests: Iterable[GenerationRequest | Exception],
    ended: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Answer all requests, as many at once as the engine runs, and wait; no other requests may be in the engine.

    Args:
        engine: with `max_queue` of at least `max_batch`.
        requests: taken one by one as there is room, by the engine's front but for the first; an exception in a
            request's place is its outcome.
        ended: is told each outcome as it comes, mostly by the engine's front.

    Returns:
        The outcomes in the order of the requests; errors of single requests are among them.

    Raises:
        RuntimeError: the engine's thread is gone.
        Exception: what `requests` raised, once all that ran has ended.
    """
    state = _Feed(engine, iter(requests), ended)
    with engine.lockstep():
        with engine.held():  # or the first would begin alone, or not, as it happens
            for _ in range(engine.config.rows):
                before = state.running
                state.admit_next()
                if state.running == before:
                    break
            if not state.running:
                state.idle.set()
        state.idle.wait()
    if state.failure is not None:
        raise state.failure
    engine.check_health()
    return [state.outcomes[place] for place in range(state.taken)]
