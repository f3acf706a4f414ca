"""What is measured of routing: the time of each step, and what was decided. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from deployments import metrics, observe
from lorauter.routing import RoutingDecision


class RoutingMetrics:
    """The router's side of the metrics."""

    def __init__(self, recorder: observe.Recorder) -> None:
        self._recorder = recorder
        self._tasks: set[str] = set()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step that does not fail."""
        started = time.perf_counter()
        yield
        self._recorder.observe(metrics.ROUTING_SECONDS, time.perf_counter() - started, step=name)

    def decided(self, decisions: Sequence[RoutingDecision]) -> None:
        """Count decisions."""
        for decision in decisions:
            if decision.confidence is not None:
                self._recorder.observe(metrics.CONFIDENCE, decision.confidence)
            if decision.tasks:
                self._recorder.add(metrics.TASKS, task=self._task(decision.tasks[0].name))
            self._recorder.observe(metrics.MIXED_ADAPTERS, len(decision.adapters))
            if not decision.adapters and not decision.examples:
                self._recorder.add(metrics.FALLBACKS)

    def left_out(self, causes: Iterable[str]) -> None:
        """Count adapters that a routed answer goes on without."""
        for cause in causes:
            self._recorder.add(metrics.LEFT_OUT, cause=cause)

    def _task(self, name: str) -> str:
        """A task's name as a label: a catalog of thousands must not make thousands of series."""
        if name not in self._tasks:
            if len(self._tasks) >= metrics.MANY_TASKS:
                return "other"
            self._tasks.add(name)
        return name
