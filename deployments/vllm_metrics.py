"""The metrics under vLLM's names, labels and types, made of lorauter's own when they are read.

Inference gateways and dashboards read these names. A series is that of all replicas that the text tells of, as `engine`
0: requests and tokens are summed, the share of the cache is their mean. Histograms have lorauter's buckets. Knows
nothing of Ray; what is where on devices is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from deployments import metrics

_LABELS = ("model_name", "engine")
_ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
REASONS = ("stop", "length", "abort")
"""What an answer's end is called by vLLM."""


@dataclass(frozen=True)
class _Series:
    """A metric of vLLM's, and the one that it is made of."""

    name: str
    help: str
    of: metrics.Metric
    how: Literal["sum", "mean"] = "sum"


SERIES = (
    _Series("num_requests_running", "Number of requests in model execution batches.", metrics.RUNNING),
    _Series("num_requests_waiting", "Number of requests waiting to be processed.", metrics.WAITING),
    _Series("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", metrics.CACHE_USED, "mean"),
    _Series("gpu_cache_usage_perc", "The same by its older name.", metrics.CACHE_USED, "mean"),
    _Series("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", metrics.PROMPT_TOKENS),
    _Series("prefix_cache_hits", "Prompt tokens found in the prefix cache.", metrics.REUSED_TOKENS),
    _Series("num_preemptions", "Cumulative number of preemptions from the engine.", metrics.PREEMPTIONS),
    _Series("prompt_tokens", "Number of prefill tokens processed.", metrics.PROMPT_TOKENS),
    _Series("generation_tokens", "Number of generation tokens processed.", metrics.COMPLETION_TOKENS),
    _Series("request_success", "Count of successfully processed requests.", metrics.ANSWERS),
    _Series("time_to_first_token_seconds", "Time to first token in seconds.", metrics.FIRST_TOKEN_SECONDS),
    _Series("time_per_output_token_seconds", "Mean time per output token of a request.", metrics.TOKEN_SECONDS),
    _Series("request_time_per_output_token_seconds", "The same by its newer name.", metrics.TOKEN_SECONDS),
    _Series("e2e_request_latency_seconds", "End to end request latency in seconds.", metrics.REQUEST_SECONDS),
)


@dataclass(frozen=True)
class Loras:
    """The adapters on devices.

    Attributes:
        running: those that are there, ready to be used.
        most: that there is room for at once, as far as is known.
        seen: when, in seconds since the epoch.
    """

    running: Sequence[str]
    most: int
    seen: float


def as_vllm(text: str, model: str, loras: Loras) -> str:
    """vLLM's metrics in Prometheus' text, of lorauter's in the same.

    Args:
        text: what `deployments.node_metrics` gives.
        model: the base model's name.
        loras: the adapters on devices.
    """
    return generate_latest(_Collected(_samples(text), model, loras)).decode()


def _samples(text: str) -> dict[str, list[Sample]]:
    """The samples of each series, by its name."""
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


class _Collected(Collector):
    def __init__(self, samples: dict[str, list[Sample]], model: str, loras: Loras) -> None:
        self._samples, self._values, self._loras = samples, [model, "0"], loras

    def collect(self) -> Iterator[Metric]:
        for series in SERIES:
            name = f"vllm:{series.name}"
            if series.of.kind == "histogram":
                yield self._histogram(name, series)
            elif series.of.kind == "gauge":
                gauge = GaugeMetricFamily(name, series.help, labels=_LABELS)
                gauge.add_metric(self._values, self._total(series))
                yield gauge
            else:
                reasons = REASONS if series.of is metrics.ANSWERS else ()
                counter = CounterMetricFamily(
                    name, series.help, labels=(*_LABELS, *["finished_reason"][: len(reasons)])
                )
                for reason in reasons:
                    counter.add_metric([*self._values, reason], self._total(series, reason=reason))
                if not reasons:
                    counter.add_metric(self._values, self._total(series))
                yield counter
        loras = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Running stats on lora requests.",
            labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )
        loras.add_metric([str(self._loras.most), "", ",".join(self._loras.running)], self._loras.seen)
        yield loras

    def _total(self, series: _Series, **labels: str) -> float:
        values = [sample.value for sample in self._of(series.of.series[0]) if labels.items() <= sample.labels.items()]
        return sum(values) / (max(1, len(values)) if series.how == "mean" else 1)

    def _histogram(self, name: str, series: _Series) -> HistogramMetricFamily:
        buckets, total, _ = series.of.series
        bounds = [*(str(float(bound)) for bound in series.of.buckets), "+Inf"]
        counts = dict.fromkeys(bounds, 0.0)
        for sample in self._answers(buckets):
            bound = sample.labels.get("le", "+Inf")
            bound = bound if bound == "+Inf" else str(float(bound))
            counts[bound] = counts.get(bound, 0.0) + sample.value
        histogram = HistogramMetricFamily(name, series.help, labels=_LABELS)
        histogram.add_metric(self._values, list(counts.items()), sum(s.value for s in self._answers(total)))
        return histogram

    def _of(self, name: str) -> Iterable[Sample]:
        return self._samples.get(name, ())

    def _answers(self, name: str) -> Iterator[Sample]:
        """The samples that are of answers: of requests of all kinds, those to the endpoints that answer."""
        return (sample for sample in self._of(name) if sample.labels.get("endpoint", _ANSWERS[0]) in _ANSWERS)
