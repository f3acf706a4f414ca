"""Searches among some of a catalog's tasks."""

from __future__ import annotations

import time

import faiss
import numpy as np
import pytest

from lorauter.catalog.subset import TaskSubset

N = 60_000


@pytest.fixture(scope="module")
def index() -> faiss.Index:
    rows = np.random.default_rng(0).standard_normal((N, 64)).astype(np.float32)
    index = faiss.IndexFlatIP(64)
    index.add(rows)
    return faiss.deserialize_index(faiss.serialize_index(index))  # as a catalog loads it


@pytest.mark.parametrize("kept", [[7], range(0, N, 1000), range(1, N), []])
def test_what_is_found_is_the_best_of_the_subset(index: faiss.Index, kept: list[int]) -> None:
    mask = np.zeros(N, bool)
    mask[list(kept)] = True
    subset = TaskSubset(mask)
    assert subset.size == len(kept)
    if not kept:
        return
    rows = index.reconstruct_n(0, N)
    number = min(len(kept), 50)
    for query in np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32):
        scores, ids = index.search(query[None], number, params=subset.search)
        best = np.flatnonzero(mask)[np.argsort(-(rows[mask] @ query), kind="stable")[:number]]
        assert ids[0].tolist() == best.tolist()
        assert scores[0] == pytest.approx(rows[best] @ query, rel=1e-4, abs=1e-4)


def test_a_search_among_few_of_many_takes_no_time(index: faiss.Index) -> None:
    mask = np.zeros(N, bool)
    mask[::1000] = True
    subset, query = TaskSubset(mask), np.ones((1, 64), np.float32)
    started = time.process_time()
    for _ in range(50):
        index.search(query, 60, params=subset.search)
    assert (time.process_time() - started) / 50 < 0.003
