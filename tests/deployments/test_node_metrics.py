"""Metrics of several nodes as one text, and who may read them."""

from __future__ import annotations

import asyncio

import pytest
from fake_service import FakeService, send

from deployments import node_metrics
from deployments.node_metrics import joined, read_metrics

ONE = """\
# HELP ray_lorauter_requests_total Requests.
# TYPE ray_lorauter_requests_total counter
ray_lorauter_requests_total{endpoint="/v1/route",node="a"} 2.0
# HELP ray_node_cpu CPU.
# TYPE ray_node_cpu gauge
ray_node_cpu{node="a"} 1.0
# TYPE ray_lorauter_seconds histogram
ray_lorauter_seconds_bucket{le="+Inf",node="a"} 1.0
ray_lorauter_seconds_count{node="a"} 1.0
"""
BOTH = """\
# HELP ray_lorauter_requests_total Requests.
# TYPE ray_lorauter_requests_total counter
ray_lorauter_requests_total{endpoint="/v1/route",node="a"} 2.0
ray_lorauter_requests_total{endpoint="/v1/route",node="b"} 2.0
# TYPE ray_lorauter_seconds histogram
ray_lorauter_seconds_bucket{le="+Inf",node="a"} 1.0
ray_lorauter_seconds_count{node="a"} 1.0
ray_lorauter_seconds_bucket{le="+Inf",node="b"} 1.0
ray_lorauter_seconds_count{node="b"} 1.0
"""


def test_each_metric_is_there_once_with_the_samples_of_all_nodes() -> None:
    assert joined([ONE, "", ONE.replace('"a"', '"b"')]) == BOTH
    assert joined([]) == joined([""]) == ""


class Context:
    def get_node_id(self) -> str:
        return "1"


@pytest.mark.parametrize(("all_nodes", "expected"), [(False, joined([ONE])), (True, BOTH)])
def test_this_nodes_or_all_that_answer(monkeypatch: pytest.MonkeyPatch, all_nodes: bool, expected: str) -> None:
    nodes = [
        {"NodeID": str(i), "Alive": i != 4, "NodeManagerAddress": f"10.0.0.{i}", "MetricsExportPort": 80 + i}
        for i in range(1, 5)
    ]
    texts = {"http://10.0.0.1:81/metrics": ONE, "http://10.0.0.2:82/metrics": ONE.replace('"a"', '"b"')}
    monkeypatch.setattr(node_metrics.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(node_metrics.ray, "get_runtime_context", Context)
    monkeypatch.setattr(node_metrics, "_get", lambda url: texts.get(url, ""))
    assert asyncio.run(read_metrics(all_nodes=all_nodes)) == expected


def test_an_agent_that_does_not_answer_has_no_metrics(caplog: pytest.LogCaptureFixture) -> None:
    assert node_metrics._get("http://127.0.0.1:9/metrics") == ""
    assert "no metrics" in caplog.text


def test_the_ingress_serves_them() -> None:
    response = send(FakeService(), "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert response.text == "ray_lorauter_requests_total 1.0\n"
