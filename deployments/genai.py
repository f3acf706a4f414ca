"""OpenTelemetry's conventions for generative AI: a span for each request that a model answers, and its metrics.

Spans and metrics are named and described as the conventions have it, so that any dashboard for them reads these too.
They leave by OTLP where traces do (`deployments.tracing`), and cost a comparison where nothing is sent. No prompt or
answer is in them, and of what a client chose only figures and what is known to be a model's name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from deployments import tracing
from deployments.metrics import MANY_TASKS

if TYPE_CHECKING:
    from deployments.observe import Outcome, RequestRecord

PROVIDER = "lorauter"
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""What each endpoint does, in the conventions' words."""

_SECONDS = tuple(0.01 * 2**i for i in range(14))
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_EACH = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(float(4**i) for i in range(14))


def operation(path: str) -> AbstractContextManager[Operation | None]:
    """A request to this path as a span that is under way; None where no model answers, or nothing is sent."""
    name, tracer = OPERATIONS.get(path), tracing.tracer()
    return nullcontext() if name is None or tracer is None else _operation(name, tracer)


@contextmanager
def _operation(name: str, tracer: Any) -> Iterator[Operation]:
    # An error's text stays out: it may quote what a client sent.
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        yield Operation(name, span, _instruments())


class Operation:
    """A request that a model answers.

    Args:
        name: of the operation.
        span: it is told there.
        instruments: and measured by these.
    """

    def __init__(self, name: str, span: Any, instruments: Instruments | None) -> None:
        self._name, self._span, self._instruments = name, span, instruments

    def end(self, record: RequestRecord, status: int, outcome: Outcome) -> None:
        """Tell what became of it."""
        from opentelemetry.trace import Status, StatusCode

        said = _attributes(self._name, record)
        error = None if outcome == "answered" else {"error.type": "left" if outcome == "left" else str(status)}
        self._span.set_attributes({**said, **(error or {})})
        self._span.update_name(f"{self._name} {record.model}" if record.model else self._name)
        if outcome in ("failed", "broken"):
            self._span.set_status(Status(StatusCode.ERROR))
        if self._instruments is not None:
            self._instruments.measure(self._name, record, error or {})


def _attributes(name: str, record: RequestRecord) -> dict[str, Any]:
    """What a span says of a request, whose values are known."""
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai

    sampling = record.sampling
    said: dict[str, Any] = {
        gen_ai.GEN_AI_OPERATION_NAME: name,
        gen_ai.GEN_AI_PROVIDER_NAME: PROVIDER,
        gen_ai.GEN_AI_REQUEST_MODEL: record.model,
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: record.prompt_tokens or None,
        "lorauter.adapters": record.adapters,
        "lorauter.confidence": record.confidence,
    }
    if sampling is not None:
        said |= {
            gen_ai.GEN_AI_RESPONSE_MODEL: record.model,
            gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: record.completion_tokens,
            gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: record.cached_tokens,
            gen_ai.GEN_AI_RESPONSE_FINISH_REASONS: list(record.ends) or None,
            gen_ai.GEN_AI_REQUEST_CHOICE_COUNT: record.asked if record.asked > 1 else None,
            gen_ai.GEN_AI_REQUEST_MAX_TOKENS: sampling.max_tokens,
            gen_ai.GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
            gen_ai.GEN_AI_REQUEST_TOP_P: sampling.top_p,
            gen_ai.GEN_AI_REQUEST_TOP_K: sampling.top_k or None,
            gen_ai.GEN_AI_REQUEST_SEED: sampling.seed,
            gen_ai.GEN_AI_REQUEST_FREQUENCY_PENALTY: sampling.frequency_penalty or None,
            gen_ai.GEN_AI_REQUEST_PRESENCE_PENALTY: sampling.presence_penalty or None,
        }
    return {key: value for key, value in said.items() if value is not None}


class Instruments:
    """The conventions' histograms.

    Args:
        meter: OpenTelemetry's, that makes them.
    """

    def __init__(self, meter: Any) -> None:
        from opentelemetry.semconv._incubating.metrics import gen_ai_metrics as gen_ai

        def histogram(name: str, unit: str, text: str, bounds: tuple[float, ...]) -> Any:
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=bounds)

        self._duration = histogram(
            gen_ai.GEN_AI_SERVER_REQUEST_DURATION, "s", "Seconds until a request was answered whole.", _SECONDS
        )
        self._first = histogram(
            gen_ai.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN, "s", "Seconds from a request to its first token.", _FIRST
        )
        self._each = histogram(
            gen_ai.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN, "s", "Mean seconds between tokens after the first.", _EACH
        )
        self._tokens = histogram(gen_ai.GEN_AI_CLIENT_TOKEN_USAGE, "{token}", "Tokens of a request.", _TOKENS)
        self._models: set[str] = set()

    def measure(self, name: str, record: RequestRecord, error: Mapping[str, str]) -> None:
        """Take in a request that has ended."""
        from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai

        labels = {gen_ai.GEN_AI_OPERATION_NAME: name, gen_ai.GEN_AI_PROVIDER_NAME: PROVIDER}
        if record.model is not None:
            labels[gen_ai.GEN_AI_REQUEST_MODEL] = self._model(record.model)
        self._duration.record(time.perf_counter() - record.started, {**labels, **error})
        for kind, tokens in (("input", record.prompt_tokens), ("output", record.completion_tokens)):
            if tokens:
                self._tokens.record(tokens, {**labels, gen_ai.GEN_AI_TOKEN_TYPE: kind})
        if error or record.first_token is None or record.last_token is None:
            return  # the others are of what was answered
        self._first.record(record.first_token - record.started, labels)
        if record.completion_tokens > 1:
            each = (record.last_token - record.first_token) / (record.completion_tokens - 1)
            self._each.record(each, labels)

    def _model(self, name: str) -> str:
        """A model's name as a label: thousands of adapters must not make thousands of series."""
        if name not in self._models:
            if len(self._models) >= MANY_TASKS:
                return "other"
            self._models.add(name)
        return name


@lru_cache(maxsize=1)
def _instruments() -> Instruments | None:
    """This process's, sent by OpenTelemetry's own variables; None where `OTEL_METRICS_EXPORTER` is "none"."""
    if os.environ.get("OTEL_METRICS_EXPORTER", "").strip().lower() == "none":
        return None
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    # Not the process's own provider, which is Ray's.
    provider = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
    return Instruments(provider.get_meter("lorauter"))
