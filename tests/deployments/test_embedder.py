"""The embedder's replica in process, with an encoder that is a few lines long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from deployments import embedder
from deployments.embedder import QueryEmbedder
from lorauter.encoder import Embeddings, HashingEncoder


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


def test_queries_that_come_together_are_embedded_together_and_a_lone_one_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = Encoder()
    monkeypatch.setattr(embedder, "load_encoder", lambda _: encoder)
    monkeypatch.setattr(embedder, "RayRecorder", Metrics)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr(embedder, "join_serve_logs", lambda: None)
    monkeypatch.setattr(embedder, "own_gpus_only", lambda: None)
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


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (128, 4)])
def test_an_encoder_leaves_cores_to_the_others(cores: int, threads: int) -> None:
    assert embedder.threads(cores) == threads
