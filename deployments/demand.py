"""Which versions of adapters were wanted lately: counts that halve with time. Knows nothing of Ray."""

from __future__ import annotations

import threading

from lorauter.names import AdapterKey


class Demand:
    """Counts by version, in bounded memory; any thread may note and ask.

    Args:
        half_life_s: seconds after which a request counts half.
        limit: versions kept at most; the least wanted are forgotten.
    """

    def __init__(self, *, half_life_s: float = 600.0, limit: int = 4096) -> None:
        self._half_life_s = half_life_s
        self._limit = limit
        self._lock = threading.Lock()
        self._counts: dict[AdapterKey, tuple[float, float]] = {}  # the count, and when it was that

    def note(self, key: AdapterKey, now: float) -> None:
        """A request wanted it, at `now` seconds on any steady clock."""
        with self._lock:
            self._counts[key] = self._count(key, now) + 1.0, now
            if len(self._counts) > self._limit:
                for forgotten in self._ranked(now)[self._limit // 2 :]:
                    del self._counts[forgotten]

    def top(self, number: int, now: float) -> dict[AdapterKey, float]:
        """The most wanted with their counts, the most wanted first."""
        with self._lock:
            return {key: self._count(key, now) for key in self._ranked(now)[:number]}

    def _count(self, key: AdapterKey, now: float) -> float:
        count, at = self._counts.get(key, (0.0, now))
        return float(count * 0.5 ** ((now - at) / self._half_life_s))

    def _ranked(self, now: float) -> list[AdapterKey]:
        return sorted(self._counts, key=lambda key: self._count(key, now), reverse=True)
