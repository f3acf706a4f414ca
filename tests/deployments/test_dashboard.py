"""The Grafana dashboard and the Prometheus configuration, held against the metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from deployments import metrics

INFRA = Path(__file__).resolve().parents[2] / "infra"
OF_RAY = {"application", "deployment", "replica", "le"}


def board() -> Any:
    return json.loads((INFRA / "grafana" / "lorauter.json").read_text())


def expressions() -> list[str]:
    """What the panels and the variables ask of Prometheus."""
    asked = [target["expr"] for panel in board()["panels"] for target in panel.get("targets", [])]
    return asked + [variable["definition"] for variable in board()["templating"]["list"] if "definition" in variable]


def grouped_by(expression: str) -> set[str]:
    """The labels that an expression sums by."""
    return {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(", ")}


def test_every_series_of_the_dashboard_exists_and_every_metric_is_shown() -> None:
    there = {series: metric for metric in metrics.ALL for series in metric.series}
    used = {name for text in expressions() for name in re.findall(r"\bray_\w+", text)}
    assert used <= set(there)
    assert {there[name] for name in used} == set(metrics.ALL)


def test_the_dashboard_asks_for_labels_that_its_metrics_have() -> None:
    there = {series: metric for metric in metrics.ALL for series in metric.series}
    for text in expressions():
        known = OF_RAY | {label for name in re.findall(r"\bray_\w+", text) for label in there[name].labels}
        selected = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", text))
        assert selected | grouped_by(text) <= known, text
    for panel in board()["panels"]:
        for target in panel.get("targets", []):
            names = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert names <= (grouped_by(target["expr"]) or OF_RAY), panel["title"]


def test_the_dashboard_is_whole() -> None:
    panels = board()["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    places = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells
    for text in expressions():
        assert text.count("(") == text.count(")")
        assert text.count("{") == text.count("}")


def test_prometheus_reads_what_ray_writes() -> None:
    config = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    [discovery] = job["file_sd_configs"]
    assert [Path(file).name for file in discovery["files"]] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]
