"""What is measured of routing: the time of each step, and what was decided. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from deployments import metrics, observe
from lorauter.routing import RoutingDecision


class RoutingMetrics:
    """The router's side of the metrics."""

    def __init__(self, recorder: observe.Recorder) -> None:
        self._recorder = recorder
        self._tasks: set[str] = set()

    def step(self, name: str) -> AbstractContextManager[None]:
        """Time a step that does not fail."""
        return _Step(self._recorder, name)

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


class _Step:
    """A step, that each query takes some of: a generator in its place takes several times as long."""

    def __init__(self, recorder: observe.Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is None:
            seconds = time.perf_counter() - self._started
            self._recorder.observe(metrics.ROUTING_SECONDS, seconds, step=self._name)
