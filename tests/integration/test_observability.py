"""Metrics from Ray's own endpoint after real traffic, and traces at a real OTLP receiver, from `lorauter serve`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from google.protobuf.json_format import MessageToJson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from deployments import metrics
from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import current_version, use_version
from lorauter.keys import hash_key, new_key
from lorauter.tasks import read_task

pytestmark = pytest.mark.integration

CANARY = "xylophagous-canary"


def scrape() -> str:
    """What Ray's agent on this process's node shows; other tests' nodes may still be leaving."""
    here = ray.get_runtime_context().get_node_id()
    [node] = [node for node in ray.nodes() if node["NodeID"] == here]
    return httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10).text


def test_every_metric_exists_after_some_traffic(service: Any, s3: Any, root: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(root / "examples" / "adapters" / "sst2", tmp_path / "observed")
    AdapterRepository(open_store(service.config.adapters)).push(copied)
    before = current_version(service.config.catalog)
    service.catalog("observed")
    assert service.ask("observed").status_code == 200  # a download, whatever the node's cache has from other tests
    review = read_task(root / "examples" / "tasks" / "sst2.json").test[0].input
    for model in ("lorauter", "lorauter", "base", "sst2"):
        assert service.ask(model, review).status_code == 200
    assert service.ask("lorauter", f"{CANARY} qwzx 8817 %%").status_code == 200
    assert service.ask("lorauter", review, lorauter={"allow_adapters": []}).status_code == 200
    assert service.ask("no-such-adapter").status_code == 404
    for _ in range(2):  # the second finds the first's prompt computed
        assert service.ask("base", CANARY + " and so on" * 20).status_code == 200
    never = {metrics.EVICTIONS, metrics.PREEMPTIONS}  # what there is room for does not leave
    expected = {f"{series}[{{ ]" for metric in set(metrics.ALL) - never for series in metric.series}
    expected |= {f'ray_lorauter_adapters_resident{{.*tier="{tier}"' for tier in ("device", "host", "disk")}
    expected |= {f'ray_lorauter_requests_total{{.*status="{status}"' for status in (200, 404)}
    deadline = time.monotonic() + 90
    while missing := {pattern for pattern in expected if not re.search(f"^{pattern}", text := scrape(), re.M)}:
        assert time.monotonic() < deadline, missing
        time.sleep(1)
    use_version(service.config.catalog, before)
    service.settle()
    assert CANARY not in text

    def labels(series: str) -> list[dict[str, str]]:
        found = re.findall(rf"^{series}{{(.*)}} ", text, re.M)
        return [dict(re.findall(r'(\w+)="([^"]*)"', pairs)) for pairs in found]

    steps = {row["step"] for row in labels("ray_lorauter_routing_seconds_count")}
    assert steps == {"route", "embed", "retrieve", "compose"}
    assert {row["tier"] for row in labels("ray_lorauter_adapters_resident")} == {"device", "host", "disk"}
    requests = {(row["endpoint"], row["status"]) for row in labels("ray_lorauter_requests_total")}
    assert requests >= {("/v1/chat/completions", "200"), ("/v1/chat/completions", "404")}
    assert "sst2" in {row["task"] for row in labels("ray_lorauter_routed_tasks_total")}
    for metric in set(metrics.ALL) - never:
        for row in labels(metric.series[0]):
            assert set(metric.labels) <= set(row), metric.name
    for row in labels("ray_lorauter_requests_total"):
        assert row["deployment"] == "Router"


class Collector:
    """An OTLP receiver on the loopback that keeps the spans it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.text = ""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
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


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in span.attributes}


def test_a_requests_spans_reach_the_collector_as_one_trace(
    collector: Collector, tmp_path: Path, root: Path, free_port: int
) -> None:
    config = yaml.safe_load((root / "serve_config.yaml").read_text())
    config["http_options"]["port"] = free_port
    config["applications"][0]["args"]["access"] = {"keys_env": "SOME_KEYS"}
    key = new_key()
    row = {"name": "one", "sha256": hash_key(key), "requests_per_minute": 2}
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    env = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    env["SOME_KEYS"] = yaml.safe_dump([row])
    url, log = f"http://127.0.0.1:{free_port}", tmp_path / "log"
    with log.open("w") as out:
        cli = Path(sys.executable).parent / "lorauter"
        process = subprocess.Popen([cli, "serve", "--config", path], env=env, cwd=root, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 180
        while f"serving on {url}" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        body = {"model": "lorauter", "messages": [{"role": "user", "content": f"{CANARY}: good?"}], "max_tokens": 4}
        headers = {"x-request-id": "traced-1", "Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 401
        limited = [httpx.get(f"{url}/v1/models/base", headers=headers).status_code for _ in range(3)]
        assert limited == [200, 429, 429]
        names = {f"lorauter.{name}" for name in ("route", "embed", "retrieve", "compose", "generate")}
        deadline = time.monotonic() + 60
        while not names <= {span.name for span in collector.spans}:
            assert time.monotonic() < deadline, {span.name for span in collector.spans}
            time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    [trace] = {span.trace_id for span in collector.spans if span.name == "lorauter.route"}  # starting has its own
    ours = [span for span in collector.spans if span.name.startswith("lorauter.") and span.trace_id == trace]
    assert {span.name for span in ours} == names
    assert {attributes(span)["request_id"] for span in ours} == {"traced-1"}
    by_id = {span.span_id: span for span in collector.spans}

    def above(span: Any) -> list[str]:
        """The names of the spans that a span lies in, from the next on."""
        parent = by_id.get(span.parent_span_id)
        return [] if parent is None else [parent.name, *above(parent)]

    for span in ours:
        if span.name in ("lorauter.embed", "lorauter.retrieve", "lorauter.compose"):
            deployment = "QueryEmbedder" if span.name == "lorauter.embed" else "TaskRetriever"
            assert deployment in above(span)[0]
            assert "lorauter.route" in above(span)
        if span.name == "lorauter.generate":
            assert attributes(span)["completion_tokens"] > 0
            assert "LoraModel" in above(span)[0]
        assert above(span)[-1] == "replica_handle_request Router __call__"  # the ingress is the trace's root
    assert '"stringValue": "lorauter"' in collector.text  # the service's name
    assert CANARY not in collector.text
