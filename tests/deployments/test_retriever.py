"""What the retriever's replica decides, in process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from deployments.metrics import ROUTING_SECONDS, Metric
from deployments.retriever import TaskRetriever
from deployments.routing_metrics import RoutingMetrics
from lorauter.adapters import AdapterRepository, MemoryStore
from lorauter.catalog import build_catalog
from lorauter.encoder import HashingEncoder
from lorauter.routing import Retriever, Router, RoutingConfig, RoutingOptions


class Recorder:
    def __init__(self) -> None:
        self.steps: list[str] = []

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        assert metric is ROUTING_SECONDS
        self.steps.append(labels["step"])


def test_a_replica_decides_as_the_library_does(
    tmp_path: Path, make_adapter: Callable[..., Any], make_task: Callable[..., Any]
) -> None:
    repository = AdapterRepository(MemoryStore())
    for name in ("films", "news"):
        repository.push(make_adapter(tmp_path, name))
    tasks = [make_task("films", "was this film good", "is it worth seeing"), make_task("news", "sort this article")]
    encoder, config = HashingEncoder(), RoutingConfig(top_k=1, temperature=0.5)
    catalog = build_catalog(tasks, encoder, repository=repository)
    texts = ["was the film any good", "sort these articles", "was the film any good"]
    options = [RoutingOptions(), RoutingOptions(), RoutingOptions(exclude_adapters={"films"}, top_k=2)]

    replica: Any = object.__new__(TaskRetriever.func_or_class)
    replica._live = SimpleNamespace(retriever=Retriever(catalog, config), close=lambda: None)
    recorder = Recorder()
    replica._metrics = RoutingMetrics(recorder)
    decisions = asyncio.run(replica.decide(encoder.encode(texts), texts, options))
    assert decisions == Router(catalog, encoder, config).route(texts, options)
    assert recorder.steps == ["retrieve", "compose"]
    assert asyncio.run(replica.versions(["news", "nobody"])) == {"news": catalog.adapters["news"]}


def test_a_replica_tells_of_the_tasks_that_a_caller_may_see(
    tmp_path: Path, make_adapter: Callable[..., Any], make_task: Callable[..., Any]
) -> None:
    repository = AdapterRepository(MemoryStore())
    repository.push(make_adapter(tmp_path, "films"))
    tasks = [make_task("films", "was this film good", "is it worth seeing"), make_task("news", "sort this article")]
    catalog = build_catalog(tasks, HashingEncoder(), repository=repository)
    replica: Any = object.__new__(TaskRetriever.func_or_class)
    replica._live = SimpleNamespace(retriever=Retriever(catalog, RoutingConfig()), close=lambda: None)
    replica._layouts = WeakKeyDictionary()

    examples = asyncio.run(replica.examples(["films", "nobody"], 1))
    assert {name: [row["input"] for row in rows] for name, rows in examples.items()} == {
        "films": ["was this film good"]
    }
    for permitted, seen in ((None, ["films", "news"]), (("fil*",), ["films"]), (("x*",), [])):
        shown = asyncio.run(replica.layout(permitted, ["news"]))
        assert [row["id"] for row in shown["data"]] == seen
        assert shown["total"] == len(seen)
