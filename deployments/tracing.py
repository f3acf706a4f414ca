"""Traces: lorauter's own spans among those that Serve makes, sent by OTLP when that is configured.

Serve makes a span for each request in its proxy and in the ingress; where there is no proxy `deployments.listener`
makes one. Calls between the deployments carry their context along. Serve's `tracing_config` names
`deployments.tracing:otlp` as what sends them. Without that nothing here imports OpenTelemetry, and a span costs a
comparison. Spans carry the request's id and figures, no prompt or answer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lorauter.errors import ConfigError

_PACKAGE = "opentelemetry.exporter.otlp.proto.http"
_tracer: Any = None


def tracing_config(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Serve's `tracing_config` by OpenTelemetry's own variables; None if they name no endpoint.

    `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` turns traces on, `OTEL_TRACES_SAMPLER_ARG` is
    the share of requests that are traced (all of them, unless it is given).

    Raises:
        ConfigError: the exporter is not installed, or the share is none.
    """
    if not (environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        return None
    if not _is_installed():
        raise ConfigError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but the exporter is not installed; "
            "run: pip install 'lorauter[tracing]'"
        )
    share = environ.get("OTEL_TRACES_SAMPLER_ARG") or "1"
    try:
        ratio = float(share)
        if not 0 <= ratio <= 1:
            raise ValueError(share)
    except ValueError:
        raise ConfigError(f"OTEL_TRACES_SAMPLER_ARG is {share!r}; it must be between 0 and 1") from None
    return {"enabled": True, "exporter_import_path": "deployments.tracing:otlp", "sampling_ratio": ratio}


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec(_PACKAGE) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def otlp() -> list[Any]:
    """What Serve calls in every process that it traces: how spans leave, by OpenTelemetry's own variables."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    global _tracer
    _tracer = trace.get_tracer("lorauter")  # of the provider that Serve is about to set
    return [BatchSpanProcessor(OTLPSpanExporter())]


def span(name: str, *, current: bool = True) -> AbstractContextManager[Any]:
    """A span below the one that is under way, or None if there are no traces.

    Args:
        name: `lorauter.` goes before it.
        current: whether spans that begin within it are below it; not for use in a generator, which may be closed
            by another task than the one that began it.
    """
    return nullcontext() if _tracer is None else _span(f"lorauter.{name}", current=current)


@contextmanager
def _span(name: str, *, current: bool) -> Iterator[Any]:
    from ray.serve.context import _get_serve_request_context

    attributes = {"request_id": _get_serve_request_context().request_id}
    if current:
        # An error's text stays out: it may quote what a client sent.
        with _tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as made:
            yield made
        return
    made = _tracer.start_span(name, attributes=attributes)
    try:
        yield made
    finally:
        made.end()


def tracer() -> Any:
    """What makes spans; None if there are no traces."""
    return _tracer


def carried() -> dict[str, str]:
    """What takes the span that is under way to another process."""
    carrier: dict[str, str] = {}
    if _tracer is not None:
        from opentelemetry import propagate

        propagate.inject(carrier)
    return carrier


def continued(carrier: Mapping[str, str]) -> AbstractContextManager[None]:
    """Spans that begin within this are below the one that was carried here."""
    return nullcontext() if _tracer is None else _continued(carrier)


@contextmanager
def _continued(carrier: Mapping[str, str]) -> Iterator[None]:
    from opentelemetry import context, propagate

    token = context.attach(propagate.extract(carrier))
    try:
        yield
    finally:
        context.detach(token)
