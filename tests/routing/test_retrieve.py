import math
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits
from three_tasks import ANY, ENCODER, TEXTS, WORTHS, retrieve, utilities

from lorauter.catalog import Catalog, CatalogTask, RankedAdapter
from lorauter.catalog.lexicon import grams_of, similarities
from lorauter.catalog.rerank import Reranker, softmax
from lorauter.encoder import normalised
from lorauter.errors import InvalidRequest
from lorauter.routing import Retrieved, Retriever, RoutingConfig, RoutingOptions
from lorauter.routing import retrieve as retrieve_module


@pytest.fixture
def make_retriever(make_task):
    """Makes a retriever over tasks t0, t1, ... of which t0 is the nearest to `NEAR`, t1 the next, and so on.

    It takes the nearest tasks as they are, as the paper does, unless the settings say otherwise.
    `adapters` gives the tasks' adapters by number; a task that it leaves out has none.
    """

    def make(size: int, adapters: dict[int, str], **config: Any) -> Retriever:
        angles = np.linspace(0.1, 1.5, size)
        centroids = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        tasks = tuple(
            CatalogTask(make_task(f"t{i}"), tuple(map(RankedAdapter, adapters.get(i, "").split()))) for i in range(size)
        )
        named = {name: "0a1b2c3d" for served in adapters.values() for name in served.split()}
        catalog = Catalog.of(tasks, [row[None] for row in centroids], centroids[0], named)
        return Retriever(catalog, RoutingConfig(**{"preset": "paper", **config}))

    return make


NEAR = np.array([1, 0], np.float32)
FAR = np.array([0, 1], np.float32)


def found(retriever: Retriever, options: RoutingOptions = ANY, query=NEAR) -> dict[str, str]:
    """Names and adapters of the tasks that are retrieved, in their order."""
    (result,) = retriever.retrieve(query[None], ["a query"], [options])
    return {task.name: " ".join(task.adapters) for task in result.tasks}


def test_the_nearest_come_first_with_their_similarity_and_adapters(make_retriever) -> None:
    retriever = make_retriever(3, {0: "a b", 2: "c"}, num_tasks=3)
    (result,) = retriever.retrieve(NEAR[None], ["a query"], [ANY])
    cosines = [math.cos(0.1), math.cos(0.8), math.cos(1.5)]
    chances = softmax(20 * np.array(cosines))
    assert [task.name for task in result.tasks] == ["t0", "t1", "t2"]
    assert [task.score for task in result.tasks] == pytest.approx(cosines)
    assert [task.adapters for task in result.tasks] == [("a", "b"), (), ("c",)]
    assert [task.probability for task in result.tasks] == pytest.approx(chances, rel=1e-4)
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
    results = retriever.retrieve(np.stack([NEAR, NEAR, FAR, NEAR]), ["a query"] * 4, options)
    assert [[task.name for task in result.tasks] for result in results] == [
        ["t0", "t60"],
        ["t0", "t90"],
        ["t99", "t90"],
        ["t0", "t60", "t90"],
    ]
    assert retriever.retrieve(np.empty((0, 2), np.float32), [], []) == []


def test_it_agrees_with_a_plain_search(make_task) -> None:
    numbers = np.random.default_rng(0)
    centroids = normalised(numbers.standard_normal((300, 16)).astype(np.float32))
    tasks = tuple(CatalogTask(make_task(f"t{i}"), (RankedAdapter("a"),) * (i % 7 == 0)) for i in range(300))
    catalog = Catalog.of(tasks, [row[None] for row in centroids], centroids[0], {"a": "0a1b2c3d"})
    queries = normalised(numbers.standard_normal((20, 16)).astype(np.float32))
    config = RoutingConfig(preset="paper", num_tasks=5, top_k=4)
    results = Retriever(catalog, config).retrieve(queries, ["a query"] * 20, [ANY] * 20)
    for query, result in zip(queries, results, strict=True):
        nearest = np.argsort(-centroids @ query)
        lenders = [i for i in nearest if i % 7 == 0][:4]
        expected = [i for rank, i in enumerate(nearest) if rank < 5 or i in lenders]
        assert [task.name for task in result.tasks] == [f"t{i}" for i in expected]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_no_numbers_are_refused(make_retriever, bad) -> None:
    with pytest.raises(InvalidRequest, match="NaN or infinity"):
        make_retriever(3, {}).retrieve(np.array([[1, 0], [0, bad]], np.float32), ["a"] * 2, [ANY, ANY])


@pytest.mark.parametrize("shape", [(1, 3), (1, 1), (2,), (1, 1, 2)])
def test_embeddings_of_another_shape_are_refused(make_retriever, shape) -> None:
    with pytest.raises(InvalidRequest, match="do not fit the catalog's dimension 2"):
        make_retriever(3, {}).retrieve(np.ones(shape, np.float32), ["a"], [ANY])


# Reranking and utilities


def with_films(catalog: Catalog, films: CatalogTask) -> Catalog:
    """The same with the first task otherwise."""
    examples = [catalog.examples(place).embeddings for place in range(3)]
    return Catalog.of([films, *catalog.tasks[1:]], examples, catalog.probe, catalog.adapters)


def expected_worths(chances: dict[str, float]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for task, chance in chances.items():
        for adapter, worth in WORTHS[task].items():
            totals[adapter] = totals.get(adapter, 0) + chance * worth
    return totals


QUERIES = ["was the film good news", "the news of a contract", "hello"]


@pytest.mark.parametrize("text", QUERIES)
def test_without_the_reranker_utilities_are_expected_over_the_tasks(catalog, text) -> None:
    result = retrieve(catalog, text, selection="mean", rerank=False)
    chances = {task.name: task.probability for task in result.tasks}
    assert sum(chances.values()) == pytest.approx(1)
    assert utilities(result) == pytest.approx(expected_worths(chances))
    assert list(result.adapters) == sorted(result.adapters, key=lambda a: (-a.utility, a.name))


@pytest.mark.parametrize("text", QUERIES)
@pytest.mark.parametrize("familiarity", [0.0, 0.25, 1.0])
def test_the_adapters_of_kindred_tasks_serve_what_may_be_of_no_task(catalog, text, familiarity, monkeypatch) -> None:
    """The own task as far as there may be one; else those whose words are nearest."""
    words = similarities(grams_of(text), catalog.candidates(np.arange(3)).words, catalog.reranker.idf).astype(float)
    kindred = dict(zip(TEXTS, softmax(50 * words), strict=True))
    rank = Reranker.rank
    fixed = np.array([familiarity])
    monkeypatch.setattr(Reranker, "rank", lambda *args: replace(rank(*args), familiarity=fixed))
    result = retrieve(catalog, text, selection="mean")
    chances = {t.name: familiarity * t.probability + (1 - familiarity) * kindred[t.name] for t in result.tasks}
    assert utilities(result) == pytest.approx(expected_worths(chances), rel=1e-5)


@pytest.mark.parametrize("selection", ["mean", "similar"])
def test_a_declared_adapter_comes_before_a_luckier_one_and_counts_as_the_best_until_tried(catalog, selection) -> None:
    films = catalog.tasks[0]
    only = RoutingOptions(exclude_tasks=frozenset({"news", "law"}))
    untried = (*films.adapters, RankedAdapter("editor"))
    for entry, expected in (
        (replace(films, declared=("writer",)), {"critic": 1, "writer": 0.5 / 0.75 + 0.5}),
        (replace(films, adapters=untried, declared=("editor",)), {"editor": 1.5, "critic": 1, "writer": 0.5 / 0.75}),
    ):
        changed = with_films(catalog, entry)
        result = retrieve(changed, "which of these", only, selection=selection)
        got, name = utilities(result), entry.declared[0]
        expected[name] += 0.5 * result.familiarity  # and the more so, the surer it is that the query is of its task
        assert got == pytest.approx(expected, rel=0.2 if selection == "similar" else 1e-6)
        assert next(iter(got)) == name


def test_tasks_come_in_the_order_of_the_reranker_with_their_cosines(catalog) -> None:
    text = "does the contract make news"
    (query,) = ENCODER.encode([text])
    cosines = catalog.centroids @ query
    ranking = catalog.reranker.rank(query[None], [text], catalog.candidates(np.arange(3)))
    [logits] = ranking.logits
    result = retrieve(catalog, text, rerank=True)
    order = np.argsort(-logits)
    assert [task.name for task in result.tasks] == [catalog.tasks[i].name for i in order]
    assert [task.score for task in result.tasks] == pytest.approx(list(cosines[order]))
    assert [task.probability for task in result.tasks] == pytest.approx(list(softmax(logits[order])))
    assert result.familiarity == pytest.approx(ranking.familiarity[0])
    assert retrieve(catalog, text, rerank=False).familiarity == pytest.approx(ranking.familiarity[0])


def test_the_reranker_may_put_another_task_first_than_the_cosine(make_task) -> None:
    """Its examples vary along one axis, which says nothing; the other, small one tells the tasks apart."""
    random = np.random.default_rng(0)
    rows = []
    for side in (-0.1, 0.1):
        along = random.uniform(-1, 1, 20)
        rows.append(normalised(np.stack([along, np.full(20, side), np.ones(20)], axis=1).astype(np.float32)))
    texts = [f"the same {i}" for i in range(20)]
    tasks = tuple(CatalogTask(make_task(name, *texts), ()) for name in ("minus", "plus"))
    centroids = normalised(np.stack([part.mean(axis=0) for part in rows]))
    catalog = Catalog.of(tasks, rows, centroids[0], {})
    towards_minus = np.sign(centroids[0, 0] - centroids[1, 0])
    query = normalised(np.array([[towards_minus * 0.9, 0.1, 1]], np.float32))
    assert query[0] @ centroids[0] > query[0] @ centroids[1]
    for rerank, first in ((False, "minus"), (True, "plus")):
        (result,) = Retriever(catalog, RoutingConfig(rerank=rerank)).retrieve(query, ["the same"], [ANY])
        assert result.tasks[0].name == first


def test_an_adapter_that_did_well_on_similar_examples_is_worth_more(catalog) -> None:
    """Of the news, `writer` is good at the first two examples and `editor` at the others; on the whole they tie."""
    only = RoutingOptions(exclude_tasks=frozenset({"films", "law"}))
    for text, better, worse in (
        ("sort this news article", "writer", "editor"),
        ("news of sports", "editor", "writer"),
    ):
        nearby = utilities(retrieve(catalog, text, only, selection="similar"))
        assert nearby[better] > 1.1
        assert nearby[worse] < 0.9
        assert utilities(retrieve(catalog, text, only, selection="mean")) == pytest.approx({"writer": 1, "editor": 1})


def test_the_worth_nearby_by_hand(catalog) -> None:
    only = RoutingOptions(exclude_tasks=frozenset({"news", "law"}))
    text = "rate the film"
    (query,) = ENCODER.encode([text])
    nearness = np.exp(ENCODER.encode(TEXTS["films"]) @ query / 0.2)
    nearby = {
        "critic": nearness @ [0.9, 0.7, 0.8, 0.6] / nearness.sum(),
        "writer": nearness[:2] @ [0.5, 0.5] / nearness[:2].sum(),
    }
    means = {"critic": 0.75, "writer": 0.5}
    share = {"critic": 4 / (4 + 4), "writer": 2 / (2 + 4)}
    expected = {n: (means[n] + share[n] * (nearby[n] - means[n])) / 0.75 for n in means}
    assert utilities(retrieve(catalog, text, only, selection="similar")) == pytest.approx(expected, rel=1e-5)


def test_a_task_where_nothing_works_makes_no_adapter_look_skilled(catalog) -> None:
    bad = (RankedAdapter("critic", 0.01), RankedAdapter("writer", 0.0))
    failed = with_films(catalog, CatalogTask(catalog.tasks[0].task, bad, {"critic": {0: 0.01}, "writer": {0: 0.0}}))
    only = RoutingOptions(exclude_tasks=frozenset({"news", "law"}))
    for selection in ("mean", "similar"):
        assert utilities(retrieve(failed, "a film", only, selection=selection)) == pytest.approx({"critic": 0.2})


@pytest.mark.parametrize("selection", ["mean", "similar"])
def test_excluded_tasks_and_adapters_are_worth_nothing(catalog, selection) -> None:
    text = "was the film good news about the contract"
    every = utilities(retrieve(catalog, text, selection=selection))
    assert set(every) == {"critic", "editor", "lawyer", "writer"}
    for options, left in (
        ({"exclude_adapters": {"critic", "none"}}, {"editor", "lawyer", "writer"}),
        ({"allow_adapters": {"critic", "lawyer"}}, {"critic", "lawyer"}),
        ({"allow_adapters": set()}, set()),
    ):
        got = retrieve(catalog, text, RoutingOptions(**{k: frozenset(v) for k, v in options.items()}))
        assert utilities(got) == pytest.approx(
            {n: u for n, u in utilities(retrieve(catalog, text)).items() if n in left}
        )
    without = retrieve(catalog, text, RoutingOptions(exclude_tasks=frozenset({"films"})), selection=selection)
    assert {task.name for task in without.tasks} == {"news", "law"}
    assert sum(task.probability for task in without.tasks) == pytest.approx(1)
    assert set(utilities(without)) == {"editor", "lawyer", "writer"}
    nothing = retrieve(catalog, text, RoutingOptions(exclude_tasks=frozenset(TEXTS)), selection=selection)
    assert nothing == Retrieved((), (), 0.0, False)


def test_what_resembles_no_task_is_a_stranger(catalog) -> None:
    text = "was the film good"
    catalog.__dict__["reranker"] = replace(catalog.reranker, stranger=0.0)
    known, odd = retrieve(catalog, text), retrieve(catalog, "zyzzyva qoph")
    assert known.familiarity > odd.familiarity
    assert not known.stranger
    assert not odd.stranger
    between = (known.familiarity + odd.familiarity) / 2
    catalog.__dict__["reranker"] = replace(catalog.reranker, stranger=between)
    assert not retrieve(catalog, text).stranger
    assert retrieve(catalog, "zyzzyva qoph").stranger


def test_it_looks_deeper_until_there_are_enough_useful_adapters(make_retriever) -> None:
    lenders = {100: "a b", 299: "c"}
    retriever = make_retriever(300, lenders, composition="utility", num_tasks=1, top_k=2)
    for options, expected in ((ANY, {"a", "b"}), (RoutingOptions(allow_adapters=frozenset({"c"})), {"c"})):
        (result,) = retriever.retrieve(NEAR[None], ["a query"], [options])
        assert set(utilities(result)) == expected
        assert result.tasks[0].name == "t0"


@pytest.mark.parametrize("config", [{"preset": "paper"}, {"candidates": 8, "num_tasks": 4, "top_k": 2}, {}])
def test_what_is_found_does_not_depend_on_the_batch(make_retriever, config) -> None:
    """However deep the others of the batch are searched for."""
    retriever = make_retriever(300, {i: f"a{i}" for i in range(0, 300, 2)}, **{"preset": "default", **config})
    options = [
        ANY,
        RoutingOptions(exclude_tasks=frozenset(f"t{i}" for i in range(150))),
        RoutingOptions(top_k=64),
        RoutingOptions(allow_adapters=frozenset({"a298"})),
        RoutingOptions(exclude_tasks=frozenset({"unheard-of", "t299"})),
    ]
    together = retriever.retrieve(np.stack([NEAR] * 5), ["a query"] * 5, options)
    assert together == [retriever.retrieve(NEAR[None], ["a query"], [option])[0] for option in options]
    assert together[4] == together[0]


def test_which_of_equal_tasks_are_found_does_not_depend_on_the_batch(make_task) -> None:
    """Where more are as near as there is room for, which of them a search finds hangs on how many it looks for."""
    rows = np.stack([NEAR] * 40)
    tasks = tuple(CatalogTask(make_task(f"t{i}"), (RankedAdapter("a"),)) for i in range(40))
    catalog = Catalog.of(tasks, [row[None] for row in rows], NEAR, {"a": "0a1b2c3d"})
    retriever = Retriever(catalog, RoutingConfig(preset="paper", num_tasks=3, top_k=1))
    options = [RoutingOptions(exclude_tasks=frozenset(f"t{i}" for i in range(n))) for n in (0, 1, 3, 9, 30)]
    together = retriever.retrieve(rows[:5], ["a query"] * 5, options)
    assert together == [retriever.retrieve(NEAR[None], ["a query"], [option])[0] for option in options]


def test_what_is_remembered_of_options_is_bounded_however_many_names_they_have(make_retriever, monkeypatch) -> None:
    """A request may exclude as many as its body has room for."""
    retriever = make_retriever(30, {20: "a", 29: "b"}, num_tasks=1, top_k=2)
    monkeypatch.setattr(retrieve_module, "_KNOWN_BYTES", 50_000)
    for i in range(30):
        names = frozenset(f"{i}-{n}" for n in range(100))
        options = RoutingOptions(exclude_tasks=names, exclude_adapters=names)
        assert found(retriever, options) == {"t0": "", "t20": "a", "t29": "b"}
        assert found(retriever, options) == {"t0": "", "t20": "a", "t29": "b"}
        assert options in retriever._asked
        assert len(retriever._asked) <= 2
        assert len(retriever._lenders) <= 2


def test_a_thousand_tasks_answer_in_milliseconds(make_task, alone) -> None:
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(500)]

    def text(task: int) -> str:
        return " ".join([f"own{task}", *random.choice(words, 40)])

    centres = random.standard_normal((1000, 384))
    examples = normalised((np.repeat(centres, 3, axis=0) + random.standard_normal((3000, 384))).astype(np.float32))
    names = [f"a{i}" for i in range(1000)]
    tasks = []
    for task in range(1000):
        scores = {names[a]: {i: float(random.random()) for i in range(3)} for a in random.choice(1000, 10, False)}
        ranked = sorted((RankedAdapter(n, sum(of.values()) / 3) for n, of in scores.items()), key=lambda a: -a.score)
        tasks.append(CatalogTask(make_task(f"t{task}", *(text(task) for _ in range(3))), tuple(ranked), scores))
    catalog = Catalog.of(tasks, list(examples.reshape(1000, 3, 384)), examples[0], dict.fromkeys(names, "0a1b2c3d"))
    retriever = Retriever(catalog, RoutingConfig())

    def median_s() -> float:
        took = []
        for task in range(60):
            query = normalised((centres[task] + random.standard_normal(384)).astype(np.float32))[None]
            words_of = text(task)
            started = time.process_time()  # whatever else the machine does
            (result,) = retriever.retrieve(query, [words_of], [ANY])
            took.append(time.process_time() - started)
            assert result.tasks[0].name == f"t{task}"
        return statistics.median(took)

    with threadpool_limits(1):
        # The least: threads that other tests have left count too.
        assert min(median_s() for _ in range(3)) < 0.005
