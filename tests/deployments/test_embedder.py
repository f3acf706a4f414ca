"""The embedder's replica in process, with an encoder that is a few lines long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_states import HashingStates

from deployments import embedder
from deployments.embedder import QueryEmbedder
from lorauter.encoder import Embeddings, HashingEncoder
from lorauter.errors import ConfigError, ServiceUnavailable


class Encoder:
    """Keeps what it encodes together; the first of it, after the warm-up, takes as long as the test likes."""

    name = "fake"

    def __init__(self) -> None:
        self.lots: list[int] = []
        self.go_on = threading.Event()
        self._real = HashingEncoder()

    def encode(self, texts: Sequence[str]) -> Embeddings:
        self.lots.append(len(texts))
        if len(self.lots) == 2:
            assert self.go_on.wait(10)
        return self._real.encode(texts)


class Metrics:
    def observe(self, *_: Any, **__: Any) -> None:
        """Nothing."""


@pytest.fixture(autouse=True)
def no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a replica does to its process."""
    monkeypatch.setattr(embedder, "RayRecorder", Metrics)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr("sys.setswitchinterval", lambda _: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(embedder, "join_serve_logs", lambda: None)
    monkeypatch.setattr(embedder, "own_gpus_only", lambda: None)


def test_queries_that_come_together_are_embedded_together_and_a_lone_one_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = Encoder()
    monkeypatch.setattr(embedder, "load_encoder", lambda _: encoder)
    replica = QueryEmbedder.func_or_class("fake")
    queries = [["lone"], *[[f"query {i}"] for i in range(100)], [f"of many {i}" for i in range(200)], ["last"]]

    async def ask() -> list[Embeddings]:
        lone = asyncio.create_task(replica.embed(queries[0]))
        while len(encoder.lots) < 2:
            await asyncio.sleep(0)
        others = [asyncio.create_task(replica.embed(texts)) for texts in queries[1:]]
        await asyncio.sleep(0)
        encoder.go_on.set()
        return await asyncio.gather(lone, *others)

    answers = asyncio.run(ask())
    assert encoder.lots == [1, 1, 64, 36, 200, 1]
    for texts, vectors in zip(queries, answers, strict=True):
        np.testing.assert_array_equal(vectors, HashingEncoder().encode(texts))


def test_a_text_is_read_by_a_model_that_is_loaded_for_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, dict[str, int]]] = []
    model = HashingStates()

    def load(name: str, **how: int) -> HashingStates:
        loaded.append((name, how))
        return model

    monkeypatch.setattr(embedder, "load_encoder", lambda _: HashingEncoder())
    monkeypatch.setattr(embedder, "load_states", load)
    replica = QueryEmbedder.func_or_class("fake", "reader")
    asyncio.run(replica.embed(["nothing is read for this"]))
    assert not loaded
    queries = [["lone"], [f"of many {i}" for i in range(20)], ["last", "one"]]

    async def ask() -> list[Any]:
        with pytest.raises(ServiceUnavailable, match="is being loaded"):  # a query does not wait for it
            await replica.states_if_loaded(["too soon"])
        answers = await asyncio.gather(*map(replica.states, queries))
        np.testing.assert_array_equal(await replica.states_if_loaded(queries[0]), answers[0])
        return answers

    for texts, states in zip(queries, asyncio.run(ask()), strict=True):
        np.testing.assert_array_equal(states, HashingStates().states(texts))
    assert [name for name, _ in loaded] == ["reader"]
    assert sorted(model.read) == sorted(text for texts in queries for text in texts), "each of them once"
    with pytest.raises(ConfigError, match="no model of states is served"):
        asyncio.run(QueryEmbedder.func_or_class("fake").states(["a text"]))


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (128, 4)])
def test_an_encoder_leaves_cores_to_the_others(cores: int, threads: int) -> None:
    assert embedder.threads(cores) == threads
