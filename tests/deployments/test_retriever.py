"""What the retriever's replica decides, in process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from fake_states import HashingStates

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
    replica._metrics, replica._embedder = RoutingMetrics(recorder), None
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


class Embedder:
    """A handle of the deployment that reads."""

    def __init__(self, states: Callable[..., Any]) -> None:
        self._states = states

    async def call(self, method: str, texts: list[str]) -> Any:
        assert method == "states"
        return self._states(texts)


def test_a_replica_has_read_what_it_is_not_sure_of_and_goes_on_where_nobody_reads(
    make_task: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [make_task(name, *(f"{name} question {i}" for i in range(8))) for name in ("films", "news", "law")]
    encoder, config, model = HashingEncoder(), RoutingConfig(sure=0.5), HashingStates()
    catalog = build_catalog(tasks, encoder, states=HashingStates())
    texts = ["films question 3", "zyzzyva qoph", "law question 2"]
    options = [RoutingOptions()] * 3
    replica: Any = object.__new__(TaskRetriever.func_or_class)
    replica._live = SimpleNamespace(retriever=Retriever(catalog, config), close=lambda: None)
    recorder = Recorder()
    replica._metrics, replica._told = RoutingMetrics(recorder), -1e9

    async def read(some: list[str]) -> Any:
        return model.states(some)

    async def fail(some: list[str]) -> Any:
        raise RuntimeError("the actor died")

    async def hang(some: list[str]) -> Any:
        await asyncio.sleep(60)

    replica._embedder = Embedder(read)
    decisions = asyncio.run(replica.decide(encoder.encode(texts), texts, options))
    assert decisions == Router(catalog, encoder, config, states=HashingStates()).route(texts, options)
    assert model.read == texts[1:2]
    assert [decision.by_states for decision in decisions] == [False, True, False]
    plain = Router(catalog, encoder, config).route(texts, options)
    for broken in (fail, hang):
        replica._embedder = Embedder(broken)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("deployments.retriever._STATES_S", 0.05)
            assert asyncio.run(replica.decide(encoder.encode(texts), texts, options)) == plain
    assert [record.message for record in caplog.records] == [
        "queries are routed without their states, which do not come: RuntimeError('the actor died')"
    ]
    replica._embedder = None  # a service that has no model of states
    assert asyncio.run(replica.decide(encoder.encode(texts), texts, options)) == plain
