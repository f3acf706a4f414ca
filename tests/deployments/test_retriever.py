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

from deployments.deciding import Deciding
from deployments.metrics import ROUTING_SECONDS, Metric
from deployments.replicas import Replica
from deployments.retriever import TaskRetriever
from deployments.routing_metrics import RoutingMetrics
from deployments.together import Together
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


class Embedder:
    """The replicas that embed, and read as they are told to."""

    def __init__(self, encoder: HashingEncoder, states: Callable[..., Any] | None = None) -> None:
        self._encoder = encoder
        self.states = states
        self.asked: list[list[str]] = []

    async def call(self, method: str, texts: list[str]) -> Any:
        if method == "embed":
            self.asked.append(texts)
            return _done(self._encoder.encode(texts))
        assert method == "states" and self.states is not None
        return self.states(texts)


async def _done(value: Any) -> Any:
    return value


def replica_of(retriever: Retriever, embedder: Embedder, recorder: Recorder, *, reads: bool) -> Any:
    replica: Any = object.__new__(TaskRetriever.func_or_class)
    replica._live = SimpleNamespace(retriever=retriever, close=lambda: None)
    replica._told, replica._embedder, replica._embed_s = -1e9, embedder, 5.0
    replica._embedding = Together(replica._embed, size=lambda query: len(query.texts))
    replica._deciding = Deciding(RoutingMetrics(recorder), replica._states if reads else None)
    return replica


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

    recorder, embedder = Recorder(), Embedder(encoder)
    replica = replica_of(Retriever(catalog, config), embedder, recorder, reads=False)
    decisions = asyncio.run(replica.decide(texts, options))
    assert decisions == Router(catalog, encoder, config).route(texts, options)
    assert recorder.steps == ["retrieve", "compose"]

    async def at_once() -> list[Any]:
        asked = [replica.decide([text], [option]) for text, option in zip(texts, options, strict=True)]
        return await asyncio.gather(*asked)

    embedder.asked.clear()
    recorder.steps.clear()
    assert [decision for [decision] in asyncio.run(at_once())] == decisions
    assert embedder.asked == [texts], "those that come together are embedded in a call"
    assert recorder.steps == ["retrieve", "compose"], "and decided on together"
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

    examples = asyncio.run(replica.examples(["films", "nobody"], 1, None))
    assert {name: [row["input"] for row in rows] for name, rows in examples.items()} == {
        "films": ["was this film good"]
    }
    for permitted, seen in ((None, ["films", "news"]), (("fil*",), ["films"]), (("x*",), [])):
        shown = asyncio.run(replica.layout(permitted, ["news"]))
        assert [row["id"] for row in shown["data"]] == seen
        assert shown["total"] == len(seen)


def test_examples_are_told_to_those_alone_who_may_use_what_was_made_for_their_task(
    tmp_path: Path, make_adapter: Callable[..., Any], make_task: Callable[..., Any]
) -> None:
    repository = AdapterRepository(MemoryStore())
    for name in ("films", "law-1"):
        repository.push(make_adapter(tmp_path, name))
    tasks, tried = [make_task(name, name) for name in ("films", "news", "law")], {"films": {0: 0.5}, "law-1": {0: 0.4}}
    scores = {task.name: tried for task in tasks}
    catalog = build_catalog(tasks, HashingEncoder(), repository=repository, mapping={"law": ["law-1"]}, scores=scores)
    replica: Any = object.__new__(TaskRetriever.func_or_class)
    replica._live = SimpleNamespace(retriever=Retriever(catalog, RoutingConfig()), close=lambda: None)
    for permitted, told in (
        (None, {"films", "law", "news"}),
        (("*",), {"films", "law", "news"}),
        (("films",), {"films"}),
        (("law-*",), {"law"}),
        (("law-1", "ne*"), {"law", "news"}),
        ((), set()),
    ):
        assert asyncio.run(replica.examples(["films", "news", "law"], 9, permitted)).keys() == told


def test_a_replica_has_read_what_it_is_not_sure_of_and_goes_on_where_nobody_reads(
    make_task: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [make_task(name, *(f"{name} question {i}" for i in range(8))) for name in ("films", "news", "law")]
    encoder, config, model = HashingEncoder(), RoutingConfig(sure=0.5), HashingStates()
    catalog = build_catalog(tasks, encoder, states=HashingStates())
    texts = ["films question 3", "zyzzyva qoph", "law question 2"]
    options = [RoutingOptions()] * 3
    embedder = Embedder(encoder)
    replica = replica_of(Retriever(catalog, config), embedder, Recorder(), reads=True)

    async def read(some: list[str]) -> Any:
        return model.states(some)

    async def fail(some: list[str]) -> Any:
        raise RuntimeError("the actor died")

    async def hang(some: list[str]) -> Any:
        await asyncio.sleep(60)

    embedder.states = read
    decisions = asyncio.run(replica.decide(texts, options))
    assert decisions == Router(catalog, encoder, config, states=HashingStates()).route(texts, options)
    assert model.read == texts[1:2]
    assert [decision.by_states for decision in decisions] == [False, True, False]
    plain = Router(catalog, encoder, config).route(texts, options)
    for broken in (fail, hang):
        embedder.states = broken
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("deployments.retriever._STATES_S", 0.05)
            assert asyncio.run(replica.decide(texts, options)) == plain
    assert [record.message for record in caplog.records] == [
        "queries are routed without their states, which do not come: RuntimeError('the actor died')"
    ]
    replica._deciding = Deciding(RoutingMetrics(Recorder()), None)  # a service that has no model of states
    assert asyncio.run(replica.decide(texts, options)) == plain


def test_whoever_reads_is_told_to_load_the_model_as_soon_as_it_is_there(make_task: Callable[..., Any]) -> None:
    encoder, told = HashingEncoder(), list[tuple[Any, ...]]()
    replicas = [Replica(name, "node", {}) for name in ("one", "two", "three")]
    for states, expected in ((HashingStates(), ["one", "two", "three"]), (None, [])):
        catalog = build_catalog([make_task("films", "a", "b", "c")], encoder, states=states)
        replica = replica_of(Retriever(catalog, RoutingConfig()), Embedder(encoder), Recorder(), reads=True)
        replica._met, replica._embedder = set(), SimpleNamespace(call_of=lambda *call: told.append(call))
        told.clear()
        replica._meet(replicas[:1])
        replica._meet(replicas[:2])
        replica._meet(replicas)
        assert told == [(name, "states", []) for name in expected]
