from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments import tracing
from deployments.tracing import span, tracing_config
from lorauter.errors import ConfigError

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What keeps the spans that are made."""
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("lorauter"))
    yield kept
    provider.shutdown()


def test_traces_are_off_unless_an_endpoint_is_named() -> None:
    assert tracing_config({}) is None
    assert tracing_config({"OTEL_EXPORTER_OTLP_ENDPOINT": "", "OTEL_TRACES_SAMPLER_ARG": "0.5"}) is None
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        config = tracing_config({name: "http://127.0.0.1:4318"})
        assert config == {"enabled": True, "exporter_import_path": "deployments.tracing:otlp", "sampling_ratio": 1.0}
    assert tracing_config({**ENDPOINT, "OTEL_TRACES_SAMPLER_ARG": "0.25"}) == {**(config or {}), "sampling_ratio": 0.25}


@pytest.mark.parametrize("share", ["half", "-1", "1.5", "nan"])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        tracing_config({**ENDPOINT, "OTEL_TRACES_SAMPLER_ARG": share})


@pytest.mark.parametrize("missing", ["no.such.package", "opentelemetry.no_such"])
def test_a_missing_exporter_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(tracing, "_PACKAGE", missing)
    assert tracing_config({}) is None
    with pytest.raises(ConfigError, match=r"lorauter\[tracing\]"):
        tracing_config(ENDPOINT)


def test_without_traces_nothing_is_made_or_imported() -> None:
    code = (
        "import sys; from deployments.tracing import span\n"
        "with span('route') as made: assert made is None\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'opentelemetry']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_spans_lie_within_each_other(exporter: InMemorySpanExporter) -> None:
    with span("route"):
        with span("embed"):
            pass
        with span("generate", current=False) as made:
            made.set_attributes({"completion_tokens": 3})
            with span("retrieve"):
                pass
    spans: dict[str, ReadableSpan] = {made.name: made for made in exporter.get_finished_spans()}
    assert set(spans) == {f"lorauter.{name}" for name in ("route", "embed", "generate", "retrieve")}
    top = spans["lorauter.route"].context
    for name in ("embed", "generate", "retrieve"):
        parent = spans[f"lorauter.{name}"].parent
        assert parent is not None
        assert top is not None
        assert parent.span_id == top.span_id
    assert spans["lorauter.generate"].attributes == {"request_id": "", "completion_tokens": 3}


def test_an_error_passes_and_its_text_stays_out(exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError, match="secret"), span("route"):
        raise ValueError("a secret prompt")
    [made] = exporter.get_finished_spans()
    assert "secret" not in made.to_json()
