"""Metrics from Ray's own endpoint after real traffic; `commands/test_launch.py` has the traces."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from catalogued import wait_for_catalog

from deployments import metrics
from lorauter.adapters import AdapterManifest, AdapterRepository, open_store
from lorauter.catalog import Catalog, current_version, use_version, with_adapter
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
    lacking = with_adapter(Catalog.load(service.config.catalog), AdapterManifest("sst2", "0" * 16, {}))
    lacking.save(service.config.catalog)
    try:
        wait_for_catalog(service.url, lacking.version)
        assert service.ask("lorauter", review).json()["lorauter"]["left_out"]
    finally:
        use_version(service.config.catalog, before)
        service.settle()
    never = {metrics.EVICTIONS, metrics.PREEMPTIONS}  # what there is room for does not leave
    expected = {f"{series}[{{ ]" for metric in set(metrics.ALL) - never for series in metric.series}
    expected |= {f'ray_lorauter_adapters_resident{{.*tier="{tier}"' for tier in ("device", "host", "disk")}
    expected |= {f'ray_lorauter_requests_total{{.*status="{status}"' for status in (200, 404)}
    deadline = time.monotonic() + 90
    while missing := {pattern for pattern in expected if not re.search(f"^{pattern}", text := scrape(), re.M)}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)
    assert CANARY not in text

    def labels(series: str) -> list[dict[str, str]]:
        found = re.findall(rf"^{series}{{(.*)}} ", text, re.M)
        return [dict(re.findall(r'(\w+)="([^"]*)"', pairs)) for pairs in found]

    steps = {row["step"] for row in labels("ray_lorauter_routing_seconds_count")}
    assert steps - {"read"} == {"route", "embed", "retrieve", "compose"}  # where words are not sure, once it can be
    assert {row["tier"] for row in labels("ray_lorauter_adapters_resident")} == {"device", "host", "disk"}
    requests = {(row["endpoint"], row["status"]) for row in labels("ray_lorauter_requests_total")}
    assert requests >= {("/v1/chat/completions", "200"), ("/v1/chat/completions", "404")}
    assert "sst2" in {row["task"] for row in labels("ray_lorauter_routed_tasks_total")}
    for metric in set(metrics.ALL) - never:
        for row in labels(metric.series[0]):
            assert set(metric.labels) <= set(row), metric.name
    for row in labels("ray_lorauter_requests_total"):
        assert row["deployment"] == "Router"
    with service.http as http:
        shown = http.get("/metrics").text
    vllms = {name: float(value) for name, value in re.findall(r"^(vllm:\w+)(?:{.*})? (\S+)$", shown, re.M)}
    assert {"vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= vllms.keys()
    for name in ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_hits_total"):
        assert vllms[f"vllm:{name}"] > 0, name
    assert vllms["vllm:time_to_first_token_seconds_count"] > 0
    loras = re.search(r'^vllm:lora_requests_info{.*running_lora_adapters="([^"]*)".*} (\S+)$', shown, re.M)
    assert loras is not None
    assert "sst2" in loras[1].split(",")
    assert time.time() - float(loras[2]) < 60
