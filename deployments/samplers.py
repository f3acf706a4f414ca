"""The tiers' and the engine's own counters, taken every few seconds and handed on as metrics.

The tiers count for themselves and know nothing of metrics; so nothing is added to what each request does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from deployments import metrics
from deployments.host_adapters import HostAdapters, Packed
from deployments.metrics import Metric
from lorauter.adapters import AdapterDiskCache
from lorauter.adapters.counters import TierCounters

if TYPE_CHECKING:
    from lorauter.engine.engine import Engine

logger = logging.getLogger("lorauter.metrics")

_PERIOD_S = 5.0


class Recorder(Protocol):
    """Where metrics go."""

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""


class _Totals:
    """Turns totals that only grow into what was added since they were told last."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._told: dict[tuple[str, str], float] = {}

    def tell(self, metric: Metric, total: float, tier: str = "") -> None:
        key = metric.name, tier
        added = total - self._told.get(key, 0.0)
        if added > 0:
            self._recorder.add(metric, added, **({"tier": tier} if tier else {}))
            self._told[key] = total


P = TypeVar("P", bound=Packed)


def model_sampler(engine: Engine, host: HostAdapters[P], recorder: Recorder) -> Callable[[], None]:
    """What samples a replica: its queue, and its adapters on the device and in host memory."""
    totals = _Totals(recorder)

    def tier(name: str, counters: TierCounters, resident: int, size: int) -> None:
        totals.tell(metrics.HITS, counters.hits, name)
        totals.tell(metrics.LOADS, counters.misses, name)
        totals.tell(metrics.LOAD_SECONDS, counters.load_seconds, name)
        totals.tell(metrics.EVICTIONS, counters.evictions, name)
        recorder.set(metrics.RESIDENT, resident, tier=name)
        recorder.set(metrics.RESIDENT_BYTES, size, tier=name)

    def sample() -> None:
        running, waiting = engine.load
        recorder.set(metrics.RUNNING, running)
        recorder.set(metrics.WAITING, waiting)
        counters = engine.counters
        recorder.set(metrics.CACHE_USED, counters.cache_used)
        totals.tell(metrics.REUSED_TOKENS, counters.reused)
        totals.tell(metrics.PREEMPTIONS, counters.preemptions)
        tier("device", counters.adapters, len(counters.resident), counters.resident_bytes)
        tier("host", host.counters, *host.held)

    return sample


def disk_sampler(cache: AdapterDiskCache, recorder: Recorder) -> Callable[[], None]:
    """What samples a node's cache."""
    totals = _Totals(recorder)

    def sample() -> None:
        counters = cache.counters
        totals.tell(metrics.HITS, counters.hits, "disk")
        totals.tell(metrics.LOADS, counters.downloads, "disk")
        totals.tell(metrics.LOAD_SECONDS, counters.download_seconds, "disk")
        totals.tell(metrics.EVICTIONS, counters.evictions, "disk")
        totals.tell(metrics.DOWNLOADED_BYTES, counters.downloaded_bytes)
        recorder.set(metrics.RESIDENT, len(cache.resident()), tier="disk")
        recorder.set(metrics.RESIDENT_BYTES, cache.size_bytes, tier="disk")

    return sample


class Sampling:
    """A thread that calls a sampler every few seconds, from now on until `stop`."""

    def __init__(self, sample: Callable[[], None], *, period_s: float = _PERIOD_S) -> None:
        self._sample = sample
        self._period_s = period_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorauter-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failing = False
        while True:
            try:
                self._sample()
                failing = False
            except Exception:  # a sample that fails must not end those after it
                if not failing:
                    logger.exception("metrics cannot be sampled")
                failing = True
            if self._stopped.wait(self._period_s):
                return

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()
