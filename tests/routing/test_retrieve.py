import math

import numpy as np
import pytest

from lorauter.catalog import Catalog, CatalogTask, RankedAdapter
from lorauter.encoder import normalised
from lorauter.errors import InvalidRequest
from lorauter.routing import RetrievedTask, Retriever, RoutingConfig, RoutingOptions

ANY = RoutingOptions()


@pytest.fixture
def make_retriever(make_task):
    """Makes a retriever over tasks t0, t1, ... of which t0 is the nearest to `NEAR`, t1 the next, and so on.

    `adapters` gives the tasks' adapters by number; a task that it leaves out has none.
    """

    def make(size: int, adapters: dict[int, str], **config: int) -> Retriever:
        angles = np.linspace(0.1, 1.5, size)
        centroids = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        tasks = tuple(
            CatalogTask(make_task(f"t{i}"), tuple(map(RankedAdapter, adapters.get(i, "").split()))) for i in range(size)
        )
        named = {name: "0a1b2c3d" for served in adapters.values() for name in served.split()}
        catalog = Catalog(tasks, centroids, centroids, centroids[0], named, "flat", "")
        return Retriever(catalog, RoutingConfig(**config))

    return make


NEAR = np.array([1, 0], np.float32)
FAR = np.array([0, 1], np.float32)


def found(retriever: Retriever, options: RoutingOptions = ANY, query=NEAR) -> dict[str, str]:
    """Names and adapters of the tasks that are retrieved, in their order."""
    (tasks,) = retriever.retrieve(query[None], [options])
    return {task.name: " ".join(task.adapters) for task in tasks}


def test_the_nearest_come_first_with_their_similarity_and_adapters(make_retriever) -> None:
    retriever = make_retriever(3, {0: "a b", 2: "c"}, num_tasks=3)
    ((first, second, third),) = retriever.retrieve(NEAR[None], [ANY])
    assert first == RetrievedTask("t0", pytest.approx(math.cos(0.1)), ("a", "b"))
    assert second == RetrievedTask("t1", pytest.approx(math.cos(0.8)), ())
    assert third == RetrievedTask("t2", pytest.approx(math.cos(1.5)), ("c",))
    assert list(found(retriever, query=FAR)) == ["t2", "t1", "t0"]


@pytest.mark.parametrize(("num_tasks", "expected"), [(1, 1), (2, 2), (5, 5), (9, 5)])
def test_as_many_tasks_as_wanted_and_there_are(make_retriever, num_tasks, expected) -> None:
    every = dict.fromkeys(range(5), "a")
    assert len(found(make_retriever(5, every, num_tasks=num_tasks, top_k=1))) == expected


def test_an_excluded_task_is_as_if_it_were_not_there(make_retriever) -> None:
    retriever = make_retriever(30, dict.fromkeys(range(30), "a"), num_tasks=2, top_k=1)
    assert list(found(retriever)) == ["t0", "t1"]
    without = RoutingOptions(exclude_tasks=frozenset({"t0", "none"}))
    assert list(found(retriever, without)) == ["t1", "t2"]
    without = RoutingOptions(exclude_tasks=frozenset(f"t{i}" for i in range(25)))
    assert list(found(retriever, without)) == ["t25", "t26"]
    assert found(retriever, RoutingOptions(exclude_tasks=frozenset(f"t{i}" for i in range(30)))) == {}


@pytest.mark.parametrize(
    ("options", "adapters"),
    [
        ({}, ["a b", "b", "a"]),
        ({"exclude_adapters": {"a"}}, ["b", "b", ""]),
        ({"exclude_adapters": {"a", "b"}}, ["", "", ""]),
        ({"allow_adapters": {"a"}}, ["a", "", "a"]),
        ({"allow_adapters": {"a", "b"}, "exclude_adapters": {"b"}}, ["a", "", "a"]),
        ({"allow_adapters": set()}, ["", "", ""]),
    ],
)
def test_adapters_that_may_not_be_used_do_not_appear(make_retriever, options, adapters) -> None:
    retriever = make_retriever(3, {0: "a b", 1: "b", 2: "a"}, num_tasks=3)
    got = found(retriever, RoutingOptions(**{key: frozenset(names) for key, names in options.items()}))
    assert list(got.values()) == adapters


def test_it_looks_deeper_where_the_nearest_tasks_have_no_adapter(make_retriever) -> None:
    retriever = make_retriever(200, {50: "a", 120: "b", 199: "c"}, num_tasks=2, top_k=2)
    assert found(retriever) == {"t0": "", "t1": "", "t50": "a", "t120": "b"}
    assert found(retriever, RoutingOptions(top_k=1)) == {"t0": "", "t1": "", "t50": "a"}
    assert found(retriever, RoutingOptions(top_k=9)) == {"t0": "", "t1": "", "t50": "a", "t120": "b", "t199": "c"}
    only = RoutingOptions(allow_adapters=frozenset({"c"}), exclude_tasks=frozenset({"t0"}))
    assert found(retriever, only) == {"t1": "", "t2": "", "t199": "c"}


def test_a_catalog_without_adapters_gives_tasks_alone(make_retriever) -> None:
    assert found(make_retriever(50, {}, num_tasks=2)) == {"t0": "", "t1": ""}


def test_every_query_has_options_of_its_own(make_retriever) -> None:
    retriever = make_retriever(100, {60: "a", 90: "b"}, num_tasks=1, top_k=1)
    options = [ANY, RoutingOptions(exclude_adapters=frozenset({"a"})), ANY, RoutingOptions(top_k=2)]
    results = retriever.retrieve(np.stack([NEAR, NEAR, FAR, NEAR]), options)
    assert [[task.name for task in tasks] for tasks in results] == [
        ["t0", "t60"],
        ["t0", "t90"],
        ["t99", "t90"],
        ["t0", "t60", "t90"],
    ]
    assert retriever.retrieve(np.empty((0, 2), np.float32), []) == []


def test_it_agrees_with_a_plain_search(make_task) -> None:
    numbers = np.random.default_rng(0)
    centroids = normalised(numbers.standard_normal((300, 16)).astype(np.float32))
    tasks = tuple(CatalogTask(make_task(f"t{i}"), (RankedAdapter("a"),) * (i % 7 == 0)) for i in range(300))
    catalog = Catalog(tasks, centroids, centroids, centroids[0], {"a": "0a1b2c3d"}, "flat", "")
    queries = normalised(numbers.standard_normal((20, 16)).astype(np.float32))
    results = Retriever(catalog, RoutingConfig(num_tasks=5, top_k=4)).retrieve(queries, [ANY] * 20)
    for query, result in zip(queries, results, strict=True):
        nearest = np.argsort(-centroids @ query)
        lenders = [i for i in nearest if i % 7 == 0][:4]
        expected = [i for rank, i in enumerate(nearest) if rank < 5 or i in lenders]
        assert [task.name for task in result] == [f"t{i}" for i in expected]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_no_numbers_are_refused(make_retriever, bad) -> None:
    with pytest.raises(InvalidRequest, match="NaN or infinity"):
        make_retriever(3, {}).retrieve(np.array([[1, 0], [0, bad]], np.float32), [ANY, ANY])


@pytest.mark.parametrize("shape", [(1, 3), (1, 1), (2,), (1, 1, 2)])
def test_embeddings_of_another_shape_are_refused(make_retriever, shape) -> None:
    with pytest.raises(InvalidRequest, match="do not fit the catalog's dimension 2"):
        make_retriever(3, {}).retrieve(np.ones(shape, np.float32), [ANY])
