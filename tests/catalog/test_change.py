"""A changed catalog is the one that would be built anew, byte for byte, and embeds only what is new."""

import random

import numpy as np
import pytest
from fake_states import HashingStates

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.catalog import (
    Catalog,
    build_catalog,
    with_adapter,
    with_adapters,
    with_scores,
    with_tasks,
    without_adapters,
    without_tasks,
)
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.encoder import HashingEncoder
from lorauter.errors import CatalogError, ConfigError, StoreUnavailable, TaskError

NAMES = ("agnews", "sst2", "wic", "xsum")
POOL = ("spare", "sst2", "wic")


class Recording(HashingEncoder):
    """An encoder that keeps what it was given."""

    def __init__(self, dimension=64):
        super().__init__(dimension)
        self.texts = []

    def encode(self, texts):
        self.texts += texts
        return super().encode(texts)


@pytest.fixture
def encoder():
    return Recording()


@pytest.fixture
def tasks(make_task):
    """Enough examples that the reranker is fitted, and that the order of numbers as texts is another."""
    return {name: make_task(name, *(f"{name} question {i}" for i in range(11))) for name in NAMES}


@pytest.fixture
def push(tmp_path, make_adapter):
    def push(repository, *names, **settings):
        for name in names:
            repository.push(make_adapter(tmp_path, name, **settings))

    return push


@pytest.fixture
def repository(push):
    repository = AdapterRepository(MemoryStore())
    push(repository, *POOL)
    return repository


def scores_of(tasks, adapters, seed=0):
    draw = random.Random(seed)
    return {t: {a: {i: draw.random() for i in draw.sample(range(11), 11)} for a in adapters} for t in tasks}


def published(catalog):
    """As it comes back from a store, where scores lie in another order."""
    store = MemoryStore()
    catalog.save(store)
    return Catalog.load(store)


def assert_same(changed, built):
    stores = [MemoryStore(), MemoryStore()]
    for catalog, store in zip((changed, built), stores, strict=True):
        catalog.save(store)
    assert changed.version == built.version
    assert stores[0].objects == stores[1].objects


def served(catalog):
    return {task.name: [adapter.name for adapter in task.adapters] for task in catalog.tasks}


@pytest.mark.parametrize("scored", [(), ("wic",), NAMES[:3]])
def test_tasks_that_are_added(tasks, repository, encoder, scored) -> None:
    scores = scores_of(scored, POOL)
    before = published(build_catalog([tasks["wic"], tasks["agnews"]], encoder, repository=repository, scores=scores))
    version = before.version
    encoder.texts.clear()
    late = {name: of for name, of in scores.items() if name == "sst2"}
    changed = with_tasks(before, [tasks["xsum"], tasks["sst2"]], encoder, scores=late)
    assert encoder.texts == [PROBE_TEXT, *(e.input for name in ("sst2", "xsum") for e in tasks[name].validation)]
    assert_same(changed, build_catalog(list(tasks.values()), encoder, repository=repository, scores=scores))
    assert before.version == version != changed.version


def test_tasks_with_adapters_of_their_own(tasks, repository, encoder, push) -> None:
    before = published(build_catalog([tasks["wic"]], encoder, repository=repository))
    push(repository, "xsum", base="org/other")
    assert served(with_tasks(before, [tasks["xsum"]], encoder))["xsum"] == []
    changed = with_tasks(before, [tasks["xsum"]], encoder, repository=repository)
    assert_same(changed, build_catalog([tasks["wic"], tasks["xsum"]], encoder, repository=repository))
    assert served(changed)["xsum"] == ["xsum"] and changed.base_model == "org/other, org/tiny-base"


def test_a_task_that_is_replaced_loses_the_scores_of_other_examples(tasks, repository, encoder, make_task) -> None:
    scores = scores_of(NAMES, POOL)
    before = published(build_catalog(list(tasks.values()), encoder, repository=repository, scores=scores))
    other = make_task("wic", "quite another question", "and one more")
    encoder.texts.clear()
    changed = with_tasks(before, [other, tasks["sst2"]], encoder)
    assert encoder.texts == [PROBE_TEXT, *(example.input for example in other.validation)]
    kept = {name: of for name, of in scores.items() if name != "wic"}
    anew = [other, *(task for name, task in tasks.items() if name != "wic")]
    assert_same(changed, build_catalog(anew, encoder, repository=repository, scores=kept))


def test_tasks_that_are_removed(tasks, repository, encoder) -> None:
    scores = scores_of(NAMES[:3], POOL)
    before = published(build_catalog(list(tasks.values()), encoder, repository=repository, scores=scores))
    encoder.texts.clear()
    changed = without_tasks(before, ["sst2", "xsum"])
    assert encoder.texts == []
    left = [tasks["agnews"], tasks["wic"]]
    assert_same(changed, build_catalog(left, encoder, repository=repository, scores=scores))
    assert_same(with_tasks(before, list(tasks.values()), encoder), before)


def test_adapters_that_come_change_and_go(tasks, repository, encoder, push) -> None:
    scores = scores_of(("wic", "xsum"), POOL)
    before = published(build_catalog(list(tasks.values()), encoder, repository=repository, scores=scores))
    push(repository, "agnews")
    push(repository, "wic", rank=3)
    repository.store.delete("spare/adapter.json")
    new = {"xsum": {"agnews": {4: 0.9}, "sst2": {3: 0.25}, "wic": {2: 0.5}}}
    changed = with_adapters(before, repository, scores=new)
    merged = {task: dict(of) for task, of in scores.items()}
    merged["xsum"] |= {"agnews": {4: 0.9}, "sst2": merged["xsum"]["sst2"] | {3: 0.25}, "wic": {2: 0.5}}
    assert_same(changed, build_catalog(list(tasks.values()), encoder, repository=repository, scores=merged))
    assert changed.adapters["wic"] == repository.manifest("wic").version != before.adapters["wic"]
    assert served(changed)["agnews"] == ["agnews"] and "spare" not in changed.adapters


def test_adapters_that_are_removed(tasks, repository, encoder, tmp_path, make_adapter) -> None:
    scores = scores_of(("xsum",), POOL)
    before = published(build_catalog(list(tasks.values()), encoder, repository=repository, scores=scores))
    changed = without_adapters(before, ["wic"])
    fewer = AdapterRepository(MemoryStore())
    for name in ("spare", "sst2"):
        fewer.push(make_adapter(tmp_path, name))
    assert_same(changed, build_catalog(list(tasks.values()), encoder, repository=fewer, scores=scores))
    assert_same(with_scores(with_adapters(changed, repository), scores), before)
    assert_same(without_adapters(before, POOL), build_catalog(list(tasks.values()), encoder))


def test_one_adapter_that_comes_or_is_replaced(tasks, repository, encoder, push) -> None:
    scores = scores_of(("xsum",), POOL)
    before = published(build_catalog(list(tasks.values()), encoder, repository=repository, scores=scores))
    push(repository, "agnews", base="org/another")
    push(repository, "sst2", lora_alpha=9)
    encoder.texts.clear()
    changed = with_adapter(with_adapter(before, repository.manifest("agnews")), repository.manifest("sst2"))
    assert encoder.texts == []
    assert_same(changed, build_catalog(list(tasks.values()), encoder, repository=repository, scores=scores))
    assert changed.base_model == "org/another, org/tiny-base"


def test_a_mapping_stays(tasks, repository, encoder, push) -> None:
    mapping = {"wic": [], "agnews": ["spare", "sst2"]}
    before = published(build_catalog(list(tasks.values()), encoder, repository=repository, mapping=mapping))
    push(repository, "xsum")
    changed = with_adapters(before, repository)
    assert_same(changed, build_catalog(list(tasks.values()), encoder, repository=repository, mapping=mapping))
    assert served(without_adapters(changed, ["spare"])) == {
        "agnews": ["sst2"],
        "sst2": ["sst2"],
        "wic": [],
        "xsum": ["xsum"],
    }


def test_a_mapping_stays_where_scores_rank_the_adapters(tasks, repository, encoder, push) -> None:
    mapping = {"wic": [], "agnews": ["spare", "sst2"], "sst2": ["wic"]}
    scores = scores_of(("agnews", "sst2", "wic"), POOL)
    given = {"repository": repository, "mapping": mapping}
    before = published(build_catalog(list(tasks.values()), encoder, **given))
    changed = published(with_scores(before, scores))
    built = build_catalog(list(tasks.values()), encoder, scores=scores, **given)
    assert_same(changed, built)
    assert {task.name: task.declared for task in changed.tasks} == {**mapping_of(mapping), "xsum": ()}
    push(repository, "xsum")
    assert_same(
        with_adapters(changed, repository), build_catalog(list(tasks.values()), encoder, scores=scores, **given)
    )
    fewer = without_adapters(changed, ["spare"])
    assert {task.name: task.declared for task in fewer.tasks}["agnews"] == ("sst2",)


def mapping_of(mapping):
    return {task: tuple(names) for task, names in mapping.items()}


def test_what_cannot_be_changed_is_refused(tasks, repository, encoder) -> None:
    catalog = build_catalog([tasks["wic"], tasks["sst2"]], encoder, repository=repository)
    with pytest.raises(ConfigError, match="no task called nil, xsum"):
        without_tasks(catalog, ["xsum", "wic", "nil"])
    with pytest.raises(ConfigError, match="the last one cannot be taken out"):
        without_tasks(catalog, ["wic", "sst2"])
    with pytest.raises(ConfigError, match="no adapter called xsum"):
        without_adapters(catalog, ["xsum", "wic"])
    with pytest.raises(ConfigError, match="more than one task is called wic"):
        with_tasks(catalog, [tasks["wic"], tasks["wic"]], encoder)
    with pytest.raises(ConfigError, match="adapter 'wic' on task 'wic', example 11"):
        with_scores(catalog, {"wic": {"wic": {11: 0.5}}})
    with pytest.raises(CatalogError, match="was built with the encoder"):
        with_tasks(catalog, [tasks["xsum"]], HashingEncoder(32))
    repository.store.down = True
    with pytest.raises(StoreUnavailable):
        with_adapters(catalog, repository)


# States


def test_a_changed_catalog_has_the_states_of_one_that_is_built_anew(tasks, encoder):
    *before, last = tasks.values()
    first = build_catalog(before, encoder, states=HashingStates())
    changed = with_tasks(first, [last], encoder, states=HashingStates())
    anew = build_catalog(list(tasks.values()), encoder, states=HashingStates())
    assert changed.version == anew.version
    assert anew.version != build_catalog(list(tasks.values()), encoder).version
    assert without_tasks(changed, [last.name]).version == first.version


def test_only_examples_that_are_new_are_read(tasks, encoder):
    catalog, states = build_catalog(list(tasks.values()), encoder, states=HashingStates()), HashingStates()
    with_tasks(catalog, [tasks["wic"]], encoder, states=states)
    assert states.read == [PROBE_TEXT]


def test_tasks_that_come_have_the_states_that_the_others_have(tasks, encoder):
    *before, last = tasks.values()
    plain, read = build_catalog(before, encoder), build_catalog(before, encoder, states=HashingStates(24))
    with pytest.raises(CatalogError, match="states of 'hashing-states-24', and tasks that come need theirs"):
        with_tasks(read, [last], encoder)
    with pytest.raises(CatalogError, match="those of 'hashing-states-32' are others"):
        with_tasks(read, [last], encoder, states=HashingStates(32))
    unasked = HashingStates()
    assert with_tasks(plain, [last], encoder, states=unasked).version == with_tasks(plain, [last], encoder).version
    assert not unasked.read


def test_an_example_that_has_no_state_is_named(tasks, encoder):
    class Refusing(HashingStates):
        def states(self, texts):
            found = super().states(texts)
            found[[i for i, text in enumerate(texts) if text == "wic question 3"]] = np.nan
            return found

    with pytest.raises(TaskError, match=r"wic.*validation\[3\]: 'hashing-states-24' has no state of this input"):
        build_catalog(list(tasks.values()), encoder, states=Refusing())
