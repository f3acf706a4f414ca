"""What is decided together: whose is whose, who waits for whom, and who is told of what is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from fake_states import HashingStates

from deployments.deciding import Deciding, Query
from deployments.metrics import Metric
from deployments.routing_metrics import RoutingMetrics
from lorauter.catalog import build_catalog
from lorauter.encoder import HashingEncoder
from lorauter.errors import InvalidRequest
from lorauter.routing import Retriever, Router, RoutingConfig, RoutingOptions

ENCODER, CONFIG, PLAIN = HashingEncoder(), RoutingConfig(sure=0.5), RoutingOptions()
SURE, UNSURE = "films question 3", "zyzzyva qoph"


class Steps:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Nothing."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        self.seen.append(labels["step"])


@pytest.fixture
def retriever(make_task: Callable[..., Any]) -> Retriever:
    tasks = [make_task(name, *(f"{name} question {i}" for i in range(8))) for name in ("films", "news", "law")]
    return Retriever(build_catalog(tasks, ENCODER, states=HashingStates()), CONFIG)


def decided(
    retriever: Retriever,
    queries: Sequence[Query],
    read: Callable[[list[str]], Awaitable[Any]] | None,
    steps: Steps | None = None,
) -> list[Any]:
    async def run() -> list[Any]:
        deciding = Deciding(RoutingMetrics(steps or Steps()), read)
        embeddings = [ENCODER.encode(query.texts) for query in queries]
        return await asyncio.gather(*deciding.begin(retriever, queries, embeddings))

    return asyncio.run(run())


def test_queries_are_decided_on_as_each_would_be_alone_and_what_is_unsure_is_read_once(retriever: Retriever) -> None:
    model, steps = HashingStates(), Steps()

    async def read(texts: list[str]) -> Any:
        return model.states(texts)

    few = RoutingOptions(top_k=1, exclude_tasks={"law"})
    queries = [Query([SURE], [PLAIN]), Query([UNSURE, SURE], [PLAIN, few]), Query([], []), Query([UNSURE + "!"], [few])]
    found = decided(retriever, queries, read, steps)
    alone = Router(retriever.catalog, ENCODER, CONFIG, states=HashingStates())
    assert found == [alone.route(query.texts, query.options) for query in queries]
    assert model.read == [UNSURE, UNSURE + "!"]
    assert steps.seen == ["retrieve", "compose", "retrieve", "compose"]
    assert all(decision.seconds["retrieve"] > 0 for decisions in found for decision in decisions)


def test_who_is_sure_does_not_wait_for_what_is_read_for_others_and_one_who_leaves_harms_nobody(
    retriever: Retriever,
) -> None:
    async def run() -> None:
        go_on = asyncio.Event()

        async def read(texts: list[str]) -> Any:
            await go_on.wait()
            return HashingStates().states(texts)

        queries = [Query([text], [PLAIN]) for text in (SURE, UNSURE, UNSURE)]
        deciding = Deciding(RoutingMetrics(Steps()), read)
        sure, leaves, unsure = deciding.begin(retriever, queries, [ENCODER.encode(query.texts) for query in queries])
        assert sure.done() and not unsure.done()
        await asyncio.sleep(0)
        leaves.cancel()
        go_on.set()
        decided = await unsure
        assert not isinstance(decided, Exception)
        [decision] = decided
        assert decision.by_states

    asyncio.run(run())


def test_what_is_wrong_with_one_is_told_to_that_one(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    real = retriever.retrieve

    def retrieve(embeddings: Any, texts: Sequence[str], options: Any, states: Any = None) -> Any:
        if "broken" in texts:
            raise InvalidRequest("a broken one")
        return real(embeddings, texts, options, states)

    monkeypatch.setattr(retriever, "retrieve", retrieve)
    queries = [Query([SURE], [PLAIN]), Query([SURE, "broken"], [PLAIN, PLAIN]), Query([UNSURE], [PLAIN])]
    first, wrong, last = decided(retriever, queries, None)
    assert isinstance(wrong, InvalidRequest)
    alone = Router(retriever.catalog, ENCODER, CONFIG, states=None)
    assert [first, last] == [alone.route([text]) for text in (SURE, UNSURE)]
