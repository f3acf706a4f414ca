"""Every metric: its name, kind, help, labels and buckets; and what records them.

Ray puts `ray_` before each name, and `_total` behind a counter's; its agent on each node shows them to Prometheus.
Labels take few values each, whatever a catalog or a client holds.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any, Literal

MANY_TASKS = 100
_PAUSE_S = 0.5
_FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_SLOW = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        labels: beside those that Ray and Serve add (`deployment`, `replica`, `application`, the node's address).
        buckets: upper bounds, of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names of the time series that Prometheus gets."""
        name = f"ray_{self.name}"
        if self.kind == "histogram":
            return f"{name}_bucket", f"{name}_sum", f"{name}_count"
        return (f"{name}_total",) if self.kind == "counter" else (name,)


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"lorauter_{name}", "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(f"lorauter_{name}", "gauge", text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(f"lorauter_{name}", "histogram", text, labels, buckets)


REQUESTS = _counter(
    "requests", "HTTP requests by what became of them (see `deployments.observe`).", "endpoint", "status", "outcome"
)
REQUEST_SECONDS = _histogram("request_seconds", "Seconds until a request was answered whole.", _SLOW, "endpoint")
ROUTING_SECONDS = _histogram(
    "routing_seconds",
    "Seconds of a step of routing (embed, retrieve, compose), and of all (route), calls between replicas included.",
    _FAST, "step",
)  # fmt: skip
CONFIDENCE = _histogram(
    "confidence", "Probability that a routed query is one of its first task.", tuple(i / 10 for i in range(1, 11))
)
TASKS = _counter(
    "routed_tasks", f"Routed queries by their first task: the first {MANY_TASKS} tasks seen, then 'other'.", "task"
)
MIXED_ADAPTERS = _histogram("mixed_adapters", "Adapters in a routed query's mixture.", (1, 2, 3, 4, 6, 8, 16, 64))
FALLBACKS = _counter("fallbacks", "Routed queries answered by the base model alone, and not after examples.")
LEFT_OUT = _counter("left_out", "Adapters that routed answers went on without, as they could not be had.", "cause")
FIRST_TOKEN_SECONDS = _histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _SLOW)
TOKEN_SECONDS = _histogram("time_per_token_seconds", "Mean seconds between an answer's tokens after the first.", _FAST)
PROMPT_TOKENS = _counter("prompt_tokens", "Tokens of the prompts answered.")
COMPLETION_TOKENS = _counter("completion_tokens", "Tokens of the answers.")
REUSED_TOKENS = _counter("prompt_tokens_reused", "Tokens of prompts that were found computed.")
ANSWERS = _counter("answers", "Answers by why they ended: stop, length, or abort (by an error or a client).", "reason")
CACHE_USED = _gauge("cache_used", "Share of a replica's key-value cache that running requests hold.")
PREEMPTIONS = _counter("preemptions", "Running requests that had to wait again, as the key-value cache was full.")
RUNNING = _gauge("requests_running", "Requests that a replica generates for.")
WAITING = _gauge("requests_waiting", "Requests that wait in a replica.")
RESIDENT = _gauge("adapters_resident", "Adapters in a tier (device, host, disk).", "tier")
RESIDENT_BYTES = _gauge("adapter_bytes", "Bytes of the adapters in a tier.", "tier")
HITS = _counter("adapter_hits", "Adapters wanted in a tier and found there.", "tier")
LOADS = _counter("adapter_loads", "Adapters loaded into a tier.", "tier")
LOAD_SECONDS = _counter("adapter_load_seconds", "Seconds of loading into a tier; by loads, the mean time.", "tier")
EVICTIONS = _counter("adapter_evictions", "Adapters that left a tier for want of room.", "tier")
DOWNLOADED_BYTES = _counter("adapter_downloaded_bytes", "Bytes of adapters that a node took from the store.")

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


class RayRecorder:
    """Hands values to Ray; in a replica with Serve's labels. May be used by any thread."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._added: dict[tuple[Any, ...], tuple[Metric, dict[str, str], float]] = {}

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add to a counter; nothing changes for 0. Where a loop runs, what is added in half a second is told to Ray as
        one sum: to tell it takes ten times as long as to add."""
        if not value:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._get(metric).inc(value, labels)
            return
        if not self._added or self._loop is not loop:
            self._loop = loop
            loop.call_later(_PAUSE_S, self._tell)
        key = (metric.name, *labels.items())
        _, _, before = self._added.get(key, (metric, labels, 0.0))
        self._added[key] = metric, labels, before + value

    def _tell(self) -> None:
        added, self._added = self._added, {}
        for metric, labels, value in added.values():
            self._get(metric).inc(value, labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._get(metric).set(value, labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        self._get(metric).observe(value, labels)

    def _get(self, metric: Metric) -> Any:
        made = self._made.get(metric.name)
        return made if made is not None else self._make(metric)

    def _make(self, metric: Metric) -> Any:
        from ray.serve.metrics import Counter, Gauge, Histogram

        labels: Any = metric.labels  # Ray's annotation says a tuple of one
        with self._lock:
            if metric.name not in self._made:
                if metric.kind == "histogram":
                    made: Any = Histogram(metric.name, metric.help, list(metric.buckets), labels)
                else:
                    kind = Counter if metric.kind == "counter" else Gauge
                    made = kind(metric.name, metric.help, labels)
                self._made[metric.name] = made
            return self._made[metric.name]
