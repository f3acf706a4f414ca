import numpy as np
import pytest

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.catalog import RankedAdapter, build_catalog
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.encoder import HashingEncoder
from lorauter.errors import ConfigError, StoreUnavailable

ENCODER = HashingEncoder(64)


@pytest.fixture
def repository(tmp_path, make_adapter) -> AdapterRepository:
    """Adapters for sst2 and wic, and one called spare."""
    repository = AdapterRepository(MemoryStore())
    for name in ("sst2", "wic", "spare"):
        repository.push(make_adapter(tmp_path, name))
    return repository


@pytest.fixture
def tasks(make_task):
    return [make_task("wic"), make_task("agnews", "one", "two words", "three more words"), make_task("sst2")]


def test_a_task_is_the_normalised_mean_of_its_inputs(tasks) -> None:
    catalog = build_catalog(tasks, ENCODER)
    assert [task.name for task in catalog.tasks] == ["agnews", "sst2", "wic"]
    rows = [ENCODER.encode([example.input for example in task.task.validation]) for task in catalog.tasks]
    for place, part in enumerate(rows):
        np.testing.assert_array_equal(catalog.examples(place).embeddings, part)
    means = np.stack([part.mean(axis=0) for part in rows])
    np.testing.assert_allclose(catalog.centroids, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(catalog.probe, ENCODER.encode([PROBE_TEXT])[0])
    assert (catalog.dimension, catalog.encoder, catalog.centroids.dtype) == (64, "hashing-64", np.float32)


def test_the_order_of_the_tasks_does_not_matter(tasks, repository) -> None:
    versions = {build_catalog(order, ENCODER, repository=repository).version for order in (tasks, tasks[::-1])}
    assert len(versions) == 1


def test_an_adapter_serves_the_task_of_its_name(tasks, repository) -> None:
    catalog = build_catalog(tasks, ENCODER, repository=repository)
    assert {task.name: task.adapters for task in catalog.tasks} == {
        "agnews": (),
        "sst2": (RankedAdapter("sst2"),),
        "wic": (RankedAdapter("wic"),),
    }
    assert catalog.adapters == {name: repository.manifest(name).version for name in ("spare", "sst2", "wic")}
    assert catalog.base_model == "org/tiny-base"


def test_a_mapping_assigns_otherwise_the_best_first(tasks, repository) -> None:
    mapping = {"agnews": ["spare", "sst2"], "wic": []}
    catalog = build_catalog(tasks, ENCODER, repository=repository, mapping=mapping)
    assert {task.name: [adapter.name for adapter in task.adapters] for task in catalog.tasks} == {
        "agnews": ["spare", "sst2"],
        "sst2": ["sst2"],
        "wic": [],
    }
    twice = {**mapping, "agnews": ["spare", "sst2", "spare"]}
    assert build_catalog(tasks, ENCODER, repository=repository, mapping=twice).version == catalog.version


@pytest.mark.parametrize("empty", [False, True])
def test_a_catalog_can_do_without_adapters(tasks, empty) -> None:
    catalog = build_catalog(tasks, ENCODER, repository=AdapterRepository(MemoryStore()) if empty else None)
    assert (catalog.adapters, catalog.base_model) == ({}, "")
    assert all(task.adapters == () for task in catalog.tasks)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"mnli": ["sst2"]}, "names task 'mnli', which is not among the tasks"),
        ({"wic": ["sst2", "none"]}, "gives task 'wic' the adapter 'none', which is not in the store"),
    ],
)
def test_a_mapping_to_what_is_not_there_is_refused(tasks, repository, mapping, said) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build_catalog(tasks, ENCODER, repository=repository, mapping=mapping)
    assert caught.value.setting == "mapping"


def test_tasks_are_needed_and_need_names_of_their_own(make_task) -> None:
    with pytest.raises(ConfigError, match="at least one task"):
        build_catalog([], ENCODER)
    with pytest.raises(ConfigError, match=r"more than one task is called wic$"):
        build_catalog([make_task("wic"), make_task("sst2"), make_task("wic")], ENCODER)


def test_a_repository_that_cannot_be_read_stops_the_build(tasks, repository) -> None:
    repository.store.down = True
    with pytest.raises(StoreUnavailable):
        build_catalog(tasks, ENCODER, repository=repository)


def test_what_cannot_be_served_is_reported_and_left_out_though_a_mapping_names_it(tasks, repository) -> None:
    repository.store.objects["wic/adapter.json"] = b"{}"
    told: list[str] = []
    mapping = {"sst2": ["wic", "spare"]}
    catalog = build_catalog(tasks, ENCODER, repository=repository, mapping=mapping, report=told.append)
    assert sorted(catalog.adapters) == ["spare", "sst2"]
    assert {entry.name: [a.name for a in entry.adapters] for entry in catalog.tasks}["sst2"] == ["spare"]
    [line] = told
    assert line.startswith("left out: adapter 'wic': its adapter.json is malformed")
    with pytest.raises(ConfigError, match="'nowhere', which is not in the store"):
        build_catalog(tasks, ENCODER, repository=repository, mapping={"sst2": ["nowhere"]})


def test_other_folders_in_the_store_are_passed_over(tasks, repository) -> None:
    repository.store.write("notes/readme.txt", b"not an adapter")
    assert sorted(build_catalog(tasks, ENCODER, repository=repository).adapters) == ["spare", "sst2", "wic"]


# Scores


def served(catalog) -> dict[str, list[str]]:
    return {task.name: [adapter.name for adapter in task.adapters] for task in catalog.tasks}


def test_the_scores_decide_among_adapters_that_were_made_for_no_task_or_fail_at_it(tasks, repository) -> None:
    scores = {"sst2": {"sst2": {0: 0.0, 1: 0.1}, "wic": {0: 0.5, 1: 0.6}, "spare": {0: 0.9, 1: 0.9}}}
    catalog = build_catalog(tasks, ENCODER, repository=repository, scores=scores, mapping={"sst2": ["sst2"]})
    assert served(catalog) == {"agnews": [], "sst2": ["spare", "wic", "sst2"], "wic": ["wic"]}
    by_name = {task.name: task for task in catalog.tasks}
    assert by_name["sst2"].scores == scores["sst2"]
    assert [adapter.score for adapter in by_name["sst2"].adapters] == pytest.approx([0.9, 0.55, 0.05])
    assert (by_name["wic"].scores, by_name["wic"].adapters) == ({}, (RankedAdapter("wic"),))


def test_an_adapter_that_was_made_for_the_task_comes_before_a_luckier_one(tasks, repository) -> None:
    scores = {"sst2": {"sst2": {0: 0.6, 1: 0.6}, "wic": {0: 0.8, 1: 0.8}, "spare": {0: 0.7, 1: 0.7}}}
    catalog = build_catalog(tasks, ENCODER, repository=repository, scores=scores)
    assert served(catalog)["sst2"] == ["sst2", "wic", "spare"]
    mapped = build_catalog(tasks, ENCODER, repository=repository, scores=scores, mapping={"sst2": ["spare", "wic"]})
    assert served(mapped)["sst2"] == ["wic", "spare", "sst2"]
    assert {task.name: task.declared for task in catalog.tasks} == {"agnews": (), "sst2": ("sst2",), "wic": ("wic",)}
    assert {task.name: task.declared for task in mapped.tasks}["sst2"] == ("spare", "wic")


def test_of_the_adapters_that_were_not_tried_only_the_tasks_own_are_kept(tasks, repository) -> None:
    catalog = build_catalog(tasks, ENCODER, repository=repository, scores={"wic": {"spare": {1: 0.4}}})
    wic = {task.name: task for task in catalog.tasks}["wic"]
    assert wic.adapters == (RankedAdapter("wic"), RankedAdapter("spare", 0.4))


def test_what_is_not_there_is_ignored_in_the_scores(tasks, repository) -> None:
    ghost = {"ghost": {0: 1.0}}
    scores = {"wic": {**ghost, "spare": {0: 0.5}}, "agnews": ghost, "mnli": {"spare": {0: 1.0}}}
    catalog = build_catalog(tasks, ENCODER, repository=repository, scores=scores)
    assert served(catalog) == {"agnews": [], "sst2": ["sst2"], "wic": ["wic", "spare"]}
    assert {task.name: dict(task.scores) for task in catalog.tasks} == {
        "agnews": {},
        "sst2": {},
        "wic": {"spare": {0: 0.5}},
    }
    unscored = build_catalog(tasks, ENCODER, scores=scores)
    assert all(task.adapters == () and task.scores == {} for task in unscored.tasks)


def test_few_examples_count_for_less_than_what_similar_tasks_say(tasks, repository) -> None:
    """On sst2 alone `spare` is the best, by one lucky example."""
    lucky = {"spare": {0: 1.0}, "wic": dict.fromkeys(range(2), 0.9)}
    unnamed = {"sst2": []}
    alone = build_catalog(tasks, ENCODER, repository=repository, scores={"sst2": lucky}, mapping=unnamed)
    assert served(alone)["sst2"] == ["spare", "wic"]
    scores = {"sst2": lucky, "wic": {"spare": dict.fromkeys(range(2), 0.0), "wic": dict.fromkeys(range(2), 0.9)}}
    catalog = build_catalog(tasks, ENCODER, repository=repository, scores=scores, mapping=unnamed)
    assert served(catalog)["sst2"] == ["wic", "spare"]
    ranked = {task.name: task.adapters for task in catalog.tasks}["sst2"]
    assert [adapter.score for adapter in ranked] == pytest.approx([0.9, 0.2])


def test_adapters_that_score_the_same_are_in_the_order_of_their_names(tasks, repository) -> None:
    scores = {"wic": {name: {0: 0.5} for name in ("wic", "sst2", "spare")}}
    for order in (scores, {"wic": dict(reversed(scores["wic"].items()))}):
        catalog = build_catalog(tasks, ENCODER, repository=repository, scores=order, mapping={"wic": []})
        assert served(catalog)["wic"] == ["spare", "sst2", "wic"]


def test_a_task_keeps_a_bounded_number_of_adapters(tmp_path, make_adapter, make_task, monkeypatch) -> None:
    monkeypatch.setattr("lorauter.catalog.build.MAX_RANKED", 2)
    repository = AdapterRepository(MemoryStore())
    for name in "abc":
        repository.push(make_adapter(tmp_path, name))
    scores = {"t": {"a": {0: 0.1}, "b": {0: 0.3}, "c": {0: 0.2}}}
    catalog = build_catalog([make_task("t")], ENCODER, repository=repository, scores=scores)
    assert served(catalog) == {"t": ["b", "c"]}
    assert set(catalog.tasks[0].scores) == {"a", "b", "c"}


def test_scored_catalogs_are_the_same_bytes_when_built_anew(tasks, repository) -> None:
    scores = {"wic": {"wic": {0: 0.25, 1: 1.0}, "spare": {1: 0.5}}, "sst2": {"wic": {0: 0.75}}}
    stores = [MemoryStore(), MemoryStore()]
    for order, store in zip((tasks, tasks[::-1]), stores, strict=True):
        build_catalog(order, ENCODER, repository=repository, scores=scores).save(store)
    assert stores[0].objects == stores[1].objects


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ({2: 0.5}, "example 2: the task has 2 validation examples"),
        ({-1: 0.5}, "example -1: the task has 2"),
        ({0: float("nan")}, "is nan; it must be finite"),
        ({1: float("-inf")}, "is -inf; it must be finite"),
    ],
)
def test_scores_that_cannot_be_are_refused(tasks, repository, of, said) -> None:
    with pytest.raises(ConfigError, match=f"adapter 'spare' on task 'wic', .*{said}") as caught:
        build_catalog(tasks, ENCODER, repository=repository, scores={"wic": {"wic": {0: 0.5}, "spare": of}})
    assert caught.value.setting == "scores"


def test_the_order_of_the_scores_does_not_matter(repository, make_task) -> None:
    tasks = [make_task("wic", *(f"input {i}" for i in range(12)))]
    values = {i: 0.1 * i for i in range(12)}  # sums of which depend on the order
    orders = (values, dict(reversed(values.items())), dict(sorted(values.items(), key=lambda item: str(item[0]))))
    catalogs = [
        build_catalog(tasks, ENCODER, repository=repository, scores={"wic": {"wic": order, "spare": {0: 1}}})
        for order in orders
    ]
    assert len({catalog.version for catalog in catalogs}) == 1
