"""The index over a catalog's tasks, of either kind, and searches among some of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from lorauter.catalog import index as catalog_index
from lorauter.catalog.index import TaskIndex, TaskSubset
from lorauter.catalog.segments import CatalogTask, Examples, Segment, TaskRow, name_hash
from lorauter.encoder import normalised
from lorauter.tasks import Example, Task

N, D = 24_000, 64
Make = Callable[[np.ndarray], TaskIndex]


def segments_of(rows: np.ndarray, names: Iterable[str]) -> list[Segment]:
    """Tasks of one example each, in segments of 5,000."""
    made = [
        TaskRow(
            CatalogTask(Task(name, "d", "em", (Example("x", "y"),)), ()), Examples(row[None], (np.zeros(0, np.int64),))
        )
        for name, row in zip(names, rows, strict=True)
    ]
    return [Segment.of(made[start : start + 5000]) for start in range(0, len(made), 5000)]


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """In families, as tasks are."""
    draw = np.random.default_rng(0)
    families = draw.standard_normal((300, D))
    return normalised((families[draw.integers(300, size=N)] + draw.standard_normal((N, D))).astype(np.float32))


@pytest.fixture(scope="module")
def segments(rows: np.ndarray) -> list[Segment]:
    return segments_of(rows, (f"t{i}" for i in range(N)))


@pytest.fixture(scope="module")
def lists(segments: list[Segment]) -> TaskIndex:
    index = TaskIndex(segments)
    assert index.faiss.nlist == 512
    return index


@pytest.fixture(scope="module")
def flat(segments: list[Segment]) -> TaskIndex:
    return TaskIndex(segments[:4])


def queries_near(rows: np.ndarray, count: int) -> np.ndarray:
    draw = np.random.default_rng(1)
    near = rows[draw.integers(len(rows), size=count)]
    return normalised((near + 0.05 * draw.standard_normal(near.shape)).astype(np.float32))


def best(rows: np.ndarray, query: np.ndarray, count: int) -> list[int]:
    return np.argsort(-(rows @ query), kind="stable")[:count].tolist()


@pytest.mark.parametrize("kept", [[7], range(0, 20_000, 400), range(1, 20_000), []])
def test_among_thousands_exactly_the_best_of_a_subset_are_found(
    flat: TaskIndex, rows: np.ndarray, kept: Iterable[int]
) -> None:
    mask = np.zeros(20_000, bool)
    mask[list(kept)] = True
    subset = TaskSubset(mask)
    assert subset.size == mask.sum()
    for query in queries_near(rows[:20_000], 3):
        expected = np.flatnonzero(mask)[best(rows[:20_000][mask], query, 50)].tolist()
        assert flat.search(query[None], 50, subset).tolist() == [expected]
    assert flat.search(query[None], 50).tolist() == [best(rows[:20_000], query, 50)]


def test_among_many_nearly_all_of_the_nearest_are_found_and_the_first(lists: TaskIndex, rows: np.ndarray) -> None:
    queries = queries_near(rows, 50)
    found = lists.search(queries, 64)
    expected = [best(rows, query, 64) for query in queries]
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert np.mean([len({*one} & {*other}) / 64 for one, other in zip(found.tolist(), expected, strict=True)]) > 0.95


@pytest.mark.parametrize("every", [2, 20, 1000])
def test_among_many_a_subset_is_searched_as_if_there_were_only_that(
    lists: TaskIndex, rows: np.ndarray, every: int
) -> None:
    mask = np.zeros(N, bool)
    mask[::every] = True
    queries, subset = queries_near(rows[mask], 30), TaskSubset(mask)
    found = lists.search(queries, 64, subset)
    assert mask[found[found >= 0]].all()
    shares = []
    for query, row in zip(queries, found, strict=True):
        expected = np.flatnonzero(mask)[best(rows[mask], query, 64)].tolist()
        assert row[0] == expected[0]
        shares.append(len({*row.tolist()} & {*expected}) / len(expected))
    assert np.mean(shares) > 0.95


def test_a_search_among_some_of_many_takes_as_long_as_among_all(
    lists: TaskIndex, rows: np.ndarray, alone: None
) -> None:
    def took(subset: TaskSubset | None) -> float:
        started = time.process_time()
        for query in queries_near(rows, 100):
            lists.search(query[None], 64, subset)
        return (time.process_time() - started) / 100

    of_all = min(took(None) for _ in range(3))
    for every in (2, 10, 1000):
        subset = TaskSubset(np.arange(N) % every == 0)
        assert min(took(subset) for _ in range(3)) < 2 * of_all + 0.0005


def test_a_task_that_changes_moves_no_other_from_its_list(
    segments: list[Segment], rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another segment's tasks are near to is not computed again."""
    TaskIndex(segments)
    computed = []
    nearest = catalog_index._lists_of

    def counted(segment: Segment, pivots: np.ndarray, key: bytes) -> np.ndarray:
        known = catalog_index._assigned.get(segment)
        computed.append(known is None or known[0] != key)
        return nearest(segment, pivots, key)

    monkeypatch.setattr(catalog_index, "_lists_of", counted)
    names = segments[-1].names
    changed = rows[20_000:].copy()
    changed[names.index(max(names, key=name_hash))] *= -1  # one of those that the lists are not fitted to
    TaskIndex([*segments[:-1], *segments_of(changed, names)])
    assert computed == [False] * 4 + [True]
