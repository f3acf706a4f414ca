from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deployments.scope import ScopedOptions, permits, visible_places, visible_tasks
from lorauter.adapters import AdapterManifest
from lorauter.catalog import Catalog, CatalogTask, RankedAdapter, with_adapter, with_copies
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions, compose

NEAR = np.array([[1, 0]], np.float32)


@pytest.fixture
def catalog(make_task: Callable[..., Any]) -> Catalog:
    """Four tasks, the nearest to NEAR first: of a, of b, of both, of nobody."""
    angles = np.linspace(0.1, 0.4, 4)
    centroids = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    served = {"of-a": "a-1 a-2", "of-b": "b-1", "shared": "b-1 a-1", "free": ""}
    tasks = tuple(
        CatalogTask(make_task(name), tuple(map(RankedAdapter, adapters.split()))) for name, adapters in served.items()
    )
    adapters = dict.fromkeys(("a-1", "a-2", "b-1"), "0a1b2c3d")
    return Catalog.of(tasks, [row[None] for row in centroids], centroids[0], adapters)


@pytest.mark.parametrize(
    ("permitted", "names"),
    [
        (None, "a-1 a-2 b-1 A-1"),
        ((), ""),
        (("*",), "a-1 a-2 b-1 A-1"),
        (("a-*",), "a-1 a-2"),
        (("a-1", "b-1"), "a-1 b-1"),
        (("a",), ""),
        (("[ab]-1",), "a-1 b-1"),
        (("?-2",), "a-2"),
        ((".*",), ""),
    ],
)
def test_patterns(permitted: tuple[str, ...] | None, names: str) -> None:
    assert [name for name in "a-1 a-2 b-1 A-1".split() if permits(permitted, name)] == names.split()


@pytest.mark.parametrize("composition", ["tasks", "utility"])
@pytest.mark.parametrize(
    ("asked", "permitted", "adapters", "tasks"),
    [
        ({}, ("a-*",), {"a-1", "a-2"}, {"of-a", "shared"}),
        ({}, ("b-*",), {"b-1"}, {"of-b", "shared"}),
        ({}, ("c-*",), set(), set()),
        ({}, (), set(), set()),
        ({"allow_adapters": frozenset({"b-1", "a-2"})}, ("a-*",), {"a-2"}, {"of-a", "shared"}),
        ({"exclude_adapters": frozenset({"a-1"})}, ("a-*",), {"a-2"}, {"of-a", "shared"}),
        ({"exclude_tasks": frozenset({"of-a"})}, ("a-*",), {"a-1"}, {"shared"}),
    ],
)
def test_routing_stays_within_what_a_caller_may_use(
    catalog: Catalog,
    composition: str,
    asked: dict[str, Any],
    permitted: tuple[str, ...],
    adapters: set[str],
    tasks: set[str],
) -> None:
    config = RoutingConfig.model_validate({"preset": "paper", "composition": composition, "top_k": 8})
    options = pickle.loads(pickle.dumps(ScopedOptions.of(RoutingOptions(**asked), permitted)))
    [found] = Retriever(catalog, config).retrieve(NEAR, ["a query"], [options])
    decision = compose(found, options, config, catalog_version="v1", versions=catalog.adapters)
    assert {task.name for task in decision.tasks} == tasks
    assert {adapter.name for adapter in decision.adapters} <= adapters
    assert bool(decision.adapters) == bool(adapters)
    assert {name for task in found.tasks for name in task.adapters} <= adapters


def test_without_a_scope_options_stay_as_they_are(catalog: Catalog) -> None:
    options = RoutingOptions(top_k=3)
    assert options.among(catalog) is None
    everything = ScopedOptions.of(options, ("*",))
    assert everything.among(catalog) is None
    assert everything.top_k == 3


def test_what_a_caller_may_see_of_a_catalog_is_found_once(catalog: Catalog) -> None:
    options = ScopedOptions(permitted=("a-*",))
    subset = options.among(catalog)
    assert subset is not None
    assert subset.size == 2
    assert ScopedOptions(permitted=("a-*",), top_k=3).among(catalog) is subset


def test_a_catalog_that_is_gone_is_not_kept(catalog: Catalog) -> None:
    twin = Catalog(*(getattr(catalog, name) for name in catalog.__dataclass_fields__))
    ScopedOptions(permitted=("a-*",)).among(twin)
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


def test_what_is_listed() -> None:
    tasks = [
        {"id": "of-a", "adapters": [{"name": "a-1"}, {"name": "b-1"}]},
        {"id": "of-b", "adapters": [{"name": "b-1"}]},
        {"id": "free", "adapters": []},
    ]
    assert visible_tasks(tasks, None) == tasks
    assert visible_tasks(tasks, ("a-*",)) == [{"id": "of-a", "adapters": [{"name": "a-1"}]}]
    assert tasks[0]["adapters"] == [{"name": "a-1"}, {"name": "b-1"}]


@pytest.mark.parametrize("composition", ["tasks", "utility"])
def test_routing_among_few_of_many_tasks_is_as_if_there_were_only_those(
    make_task: Callable[..., Any], composition: str
) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((400, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = [i for i in range(400) if i % 50 == 7]
    tasks = [CatalogTask(make_task(f"t{i}"), (RankedAdapter(f"{'a' if i in own else 'b'}-{i}"),)) for i in range(400)]

    def catalog(kept: list[int]) -> Catalog:
        adapters = dict.fromkeys((tasks[i].adapters[0].name for i in kept), "0a1b2c3d")
        rows = vectors[kept]
        return Catalog.of([tasks[i] for i in kept], [row[None] for row in rows], rows[0], adapters)

    config = RoutingConfig.model_validate({"preset": "paper", "composition": composition, "top_k": 3, "num_tasks": 5})
    everything, alone = Retriever(catalog(list(range(400))), config), Retriever(catalog(own), config)
    scoped = ScopedOptions(permitted=("a-*",), exclude_tasks=frozenset({"t7", "t8", "unheard-of"}))
    plain = RoutingOptions(exclude_tasks=scoped.exclude_tasks)
    queries = random.standard_normal((8, 16)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    mixed = [scoped if i % 2 else plain for i in range(8)]
    for query, options, found in zip(queries, mixed, everything.retrieve(queries, ["q"] * 8, mixed), strict=True):
        if options is scoped:
            [expected] = alone.retrieve(query[None], ["q"], [plain])
            assert [task.name for task in found.tasks] == [task.name for task in expected.tasks]
            assert [task.score for task in found.tasks] == pytest.approx([task.score for task in expected.tasks])
            assert [a.name for a in found.adapters] == [a.name for a in expected.adapters]
        else:
            assert found == everything.retrieve(query[None], ["q"], [plain])[0]
    assert everything.retrieve(queries, ["q"] * 8, [ScopedOptions(permitted=())] * 8)[0].tasks == ()


def test_a_key_of_a_copy_alone_is_routed_to_it_as_others_are_to_what_it_copies(catalog: Catalog) -> None:
    scores = {name: {"a-1": {0: 1.0}} for name in ("of-a", "shared")}
    catalog = with_copies(with_adapter(catalog, AdapterManifest("c-1", "1" * 16, {})), {"c-1": "a-1"}, scores)
    assert set(visible_tasks_of(catalog, ("c-*",))) == {"of-a", "shared"}
    retriever = Retriever(catalog, RoutingConfig())
    options = [RoutingOptions(), *(ScopedOptions.of(RoutingOptions(), (name,)) for name in ("a-1", "c-1"))]
    every, mine, copys = retriever.retrieve(np.repeat(NEAR, 3, 0), ["a query"] * 3, options)
    assert "c-1" not in {adapter.name for adapter in every.adapters}
    assert [(a.name, a.utility) for a in copys.adapters] == [("c-1", a.utility) for a in mine.adapters]


def visible_tasks_of(catalog: Catalog, permitted: tuple[str, ...]) -> list[str]:
    return [name for name, seen in zip(catalog.names, visible_places(catalog, permitted), strict=True) if seen]
