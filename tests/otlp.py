"""A receiver of OpenTelemetry's spans."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import MessageToJson
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """An OTLP receiver on the loopback that keeps the spans it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.text = ""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path.endswith("/v1/metrics"):
                    collector.text += MessageToJson(ExportMetricsServiceRequest.FromString(raw))
                    self.send_response(200)
                    self.end_headers()
                    return
                batch = ExportTraceServiceRequest.FromString(raw)
                collector.text += MessageToJson(batch)
                for resource in batch.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def above(self, span: Any) -> list[str]:
        """The names of the spans that a span lies in, from the next on."""
        by_id = {span.span_id: span for span in self.spans}
        parent = by_id.get(span.parent_span_id)
        return [] if parent is None else [parent.name, *self.above(parent)]


def attributes(span: Any) -> dict[str, Any]:
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes}
