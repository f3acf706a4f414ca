from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import metrics
from deployments.metrics import Metric
from deployments.samplers import Sampling, disk_sampler, model_sampler
from lorauter.adapters import AdapterDiskCache, AdapterRepository
from lorauter.adapters.counters import TierCounters
from lorauter.adapters.store import MemoryStore
from lorauter.engine.messages import Counters


class Recorder:
    """The sums of what was added, and what was set last."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        assert metric.kind == "counter"
        assert value > 0
        assert tuple(labels) == metric.labels
        key = metric.name, labels.get("tier", "")
        self.values[key] = self.values.get(key, 0.0) + value

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        assert metric.kind == "gauge"
        assert tuple(labels) == metric.labels
        self.values[metric.name, labels.get("tier", "")] = value

    def of(self, metric: Metric, tier: str = "") -> float | None:
        return self.values.get((metric.name, tier))


def test_a_replicas_tiers_and_queue() -> None:
    counters = Counters(0.25, 2, 48, TierCounters(5, 2, 1, 0.25), [("a", "1")], 10)
    engine: Any = SimpleNamespace(load=(3, 4), counters=counters)
    host: Any = SimpleNamespace(counters=TierCounters(7, 3, 0, 1.5), held=(2, 20))
    recorder = Recorder()
    sample = model_sampler(engine, host, recorder)
    for _ in range(2):  # the second adds nothing
        sample()
        assert recorder.of(metrics.RUNNING) == 3
        assert recorder.of(metrics.WAITING) == 4
        assert recorder.of(metrics.CACHE_USED) == 0.25
        assert recorder.of(metrics.REUSED_TOKENS) == 48
        assert recorder.of(metrics.PREEMPTIONS) == 2
        assert [recorder.of(metrics.RESIDENT, tier) for tier in ("device", "host")] == [1, 2]
        assert [recorder.of(metrics.RESIDENT_BYTES, tier) for tier in ("device", "host")] == [10, 20]
        assert [recorder.of(metrics.HITS, tier) for tier in ("device", "host")] == [5, 7]
        assert [recorder.of(metrics.LOADS, tier) for tier in ("device", "host")] == [2, 3]
        assert [recorder.of(metrics.LOAD_SECONDS, tier) for tier in ("device", "host")] == [0.25, 1.5]
        assert [recorder.of(metrics.EVICTIONS, tier) for tier in ("device", "host")] == [1, None]
    engine.counters = replace(counters, adapters=replace(counters.adapters, hits=9), resident=[])
    engine.load = (0, 0)
    sample()
    assert recorder.of(metrics.HITS, "device") == 9
    assert recorder.of(metrics.RESIDENT, "device") == recorder.of(metrics.RUNNING) == 0


def test_a_nodes_disk(tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    repository = AdapterRepository(MemoryStore())
    manifest = repository.push(make_adapter(tmp_path / "pool", "one"))
    cache = AdapterDiskCache(repository, tmp_path / "disk", budget_bytes=1 << 20, downloads=1)
    recorder = Recorder()
    sample = disk_sampler(cache, recorder)
    sample()
    assert recorder.of(metrics.RESIDENT, "disk") == 0
    cache.fetch(manifest.key)
    cache.fetch(manifest.key)
    sample()
    assert recorder.of(metrics.RESIDENT, "disk") == recorder.of(metrics.LOADS, "disk") == 1
    assert recorder.of(metrics.HITS, "disk") == 1
    assert recorder.of(metrics.RESIDENT_BYTES, "disk") == recorder.of(metrics.DOWNLOADED_BYTES) == manifest.size
    assert recorder.of(metrics.LOAD_SECONDS, "disk") > 0  # type: ignore[operator]
    cache.close()


def test_sampling_goes_on_after_a_failure_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    calls, enough = [0], threading.Event()

    def sample() -> None:
        calls[0] += 1
        if calls[0] == 6:
            enough.set()
        if calls[0] < 4:
            raise ValueError("not now")

    with caplog.at_level(logging.ERROR):
        sampling = Sampling(sample, period_s=0.001)
        assert enough.wait(10)
        sampling.stop()
    assert caplog.text.count("metrics cannot be sampled") == 1
    count = calls[0]
    asyncio.run(asyncio.sleep(0.01))
    assert calls[0] == count
