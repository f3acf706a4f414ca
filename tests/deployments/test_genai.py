"""OpenTelemetry's conventions for generative AI: the spans and metrics of requests that a model answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from otlp import Collector
from starlette.types import Receive, Scope, Send

from deployments import genai, observe, tracing
from deployments.observe import Observed
from lorauter.engine.types import SamplingParams

SECRET = "a secret prompt"
CHAT = "/v1/chat/completions"


class Nothing:
    def add(self, *_: Any, **__: Any) -> None:
        return

    observe = add


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("lorauter"))
    yield kept
    provider.shutdown()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    kept = InMemoryMetricReader()
    provider = MeterProvider([kept])
    instruments = genai.Instruments(provider.get_meter("lorauter"))
    monkeypatch.setattr(genai, "_instruments", lambda: instruments)
    yield kept
    provider.shutdown()


def ask(
    path: str = CHAT, *, status: int = 200, ends: str | None = "stop", model: str = "sst2", fails: bool = False
) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        record = observe.current()
        record.endpoint = path
        if status == 200:
            record.decided(model, 2, 0.5)
            record.prompt_tokens, record.cached_tokens, record.asked = 9, 4, 1
            record.sampling = SamplingParams(max_tokens=5, temperature=0.5, top_p=0.9, seed=7, stop=(SECRET,))
            record.token_arrived(1)
            record.token_arrived(2, ends)
        await send({"type": "http.response.start", "status": status, "headers": []})
        if fails:
            record.broken = 503
        await send({"type": "http.response.body", "body": SECRET.encode()})

    async def nothing(*_: Any) -> Any:
        return {}

    asyncio.run(Observed(app, Nothing())({"type": "http", "path": path, "headers": []}, nothing, nothing))


def test_a_span_describes_the_request_as_the_conventions_have_it(spans, reader) -> None:
    ask()
    [span] = spans.get_finished_spans()
    assert (span.name, span.kind, span.status.status_code) == ("chat sst2", SpanKind.INTERNAL, StatusCode.UNSET)
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "lorauter",
        "gen_ai.request.model": "sst2",
        "gen_ai.response.model": "sst2",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 7,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "lorauter.adapters": 2,
        "lorauter.confidence": 0.5,
    }
    assert SECRET not in span.to_json()


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("/v1/completions", "text_completion"),
        ("/v1/responses", "chat"),
        ("/v1/messages", "chat"),
        ("/v1/embeddings", "embeddings"),
        ("/v1/models", None),
        ("/healthz", None),
    ],
)
def test_what_each_endpoint_does(spans, reader, path, operation) -> None:
    ask(path)
    names = [span.name for span in spans.get_finished_spans()]
    assert names == ([f"{operation} sst2"] if operation else [])


def test_what_fails_says_how_and_not_in_whose_words(spans, reader) -> None:
    for status, fails, error, code in (
        (404, False, "404", StatusCode.UNSET),
        (503, False, "503", StatusCode.ERROR),
        (200, True, "503", StatusCode.ERROR),
    ):
        spans.clear()
        ask(status=status, fails=fails)
        [span] = spans.get_finished_spans()
        assert (span.attributes or {})["error.type"] == error
        assert (span.status.status_code, span.status.description) == (code, None)
        assert not span.events


def test_spans_of_routing_lie_within(spans, reader) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        with tracing.span("route"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def nothing(*_: Any) -> Any:
        return {}

    asyncio.run(Observed(app, Nothing())({"type": "http", "path": CHAT, "headers": []}, nothing, nothing))
    found: dict[str, ReadableSpan] = {span.name: span for span in spans.get_finished_spans()}
    parent, whole = found["lorauter.route"].parent, found["chat"].context
    assert parent is not None and whole is not None and parent.span_id == whole.span_id


def measured(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: [metric.unit, *metric.data.data_points]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_metrics_have_the_conventions_names_units_and_buckets(spans, reader) -> None:
    ask()
    found = measured(reader)
    labels = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "lorauter", "gen_ai.request.model": "sst2"}
    bounds = {
        "gen_ai.server.request.duration": ("s", 0.01, 81.92),
        "gen_ai.server.time_to_first_token": ("s", 0.001, 10.0),
        "gen_ai.server.time_per_output_token": ("s", 0.01, 2.5),
        "gen_ai.client.token.usage": ("{token}", 1.0, 67108864.0),
    }
    assert found.keys() == bounds.keys()
    for name, (unit, first, last) in bounds.items():
        got, *points = found[name]
        assert (got, points[0].explicit_bounds[0], points[0].explicit_bounds[-1]) == (unit, first, last), name
        assert all(labels.items() <= dict(point.attributes).items() for point in points)
    _, *tokens = found["gen_ai.client.token.usage"]
    assert {point.attributes["gen_ai.token.type"]: point.sum for point in tokens} == {"input": 9, "output": 3}


def test_errors_have_a_duration_and_no_speed(spans, reader) -> None:
    ask(status=503)
    found = measured(reader)
    assert found.keys() == {"gen_ai.server.request.duration"}
    assert found["gen_ai.server.request.duration"][1].attributes["error.type"] == "503"


def test_thousands_of_adapters_do_not_make_thousands_of_series(spans, reader) -> None:
    for number in range(130):
        ask(model=f"a{number}")
    models = {
        point.attributes["gen_ai.request.model"] for point in measured(reader)["gen_ai.server.request.duration"][1:]
    }
    assert len(models) == 101 and "other" in models


def test_metrics_leave_by_otlp_unless_they_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    genai._instruments.cache_clear()
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    assert genai._instruments() is None
    monkeypatch.delenv("OTEL_METRICS_EXPORTER")
    collector, providers = Collector(), []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    begun = MeterProvider.__init__
    monkeypatch.setattr(MeterProvider, "__init__", lambda self, *a: (providers.append(self), begun(self, *a))[1])
    genai._instruments.cache_clear()
    try:
        made = genai._instruments()
        assert made is not None
        record = observe.RequestRecord()
        record.decided("sst2", 0, None)
        made.measure("chat", record, {})
        assert providers[0].force_flush()
        assert "gen_ai.server.request.duration" in collector.text
    finally:
        for provider in providers:
            provider.shutdown()
        genai._instruments.cache_clear()
        collector.close()


def test_where_nothing_is_sent_there_is_nothing() -> None:
    with genai.operation(CHAT) as made:
        assert made is None
