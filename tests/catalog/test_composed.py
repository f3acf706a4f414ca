"""A catalog knows what was composed, for which task and of what, and says so when a source has changed."""

from dataclasses import replace

import pytest

from lorauter.adapters.provenance import PROVENANCE, Composition
from lorauter.adapters.repository import AdapterManifest, AdapterRepository
from lorauter.adapters.store import DirectoryStore, MemoryStore
from lorauter.adapters.weights import WEIGHTS_FILE
from lorauter.catalog import (
    Catalog,
    build_catalog,
    with_adapter,
    with_adapters,
    with_scores,
    with_tasks,
    without_adapters,
)
from lorauter.compositions.pool import wanting
from lorauter.encoder import HashingEncoder
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions
from lorauter.routing.router import Router

WORDS = {"sums": "add two numbers", "verses": "rhyme a stanza", "rain": "forecast the clouds", "cats": "purring pets"}
ENCODER = HashingEncoder()


@pytest.fixture
def tasks(make_task):
    return [make_task(name, *(f"{words} {name}{i}" for i in range(4)), domain=name) for name, words in WORDS.items()]


def composed_folder(folder, task, sources):
    """The same adapter, with a word on what it was composed of."""
    import json

    from safetensors.torch import load_file, save_file

    rows = [{"name": name, "version": version, "weights": [0.5, 0.5]} for name, version in sources.items()]
    provenance = {"task": task, "sources": rows, "score_before": -2.0, "score_after": -1.0}
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, metadata={PROVENANCE: json.dumps(provenance)})
    return folder


@pytest.fixture
def make_composed(make_adapter, tmp_path):
    def make(name, task, sources):
        return composed_folder(make_adapter(tmp_path, name), task, sources)

    return make


@pytest.fixture
def repository(make_adapter, tmp_path):
    repository = AdapterRepository(MemoryStore())
    for name in ("sums", "verses", "rain"):
        repository.push(make_adapter(tmp_path, name))
    return repository


def served(catalog, task):
    return next([a.name for a in entry.adapters] for entry in catalog.tasks if entry.name == task)


@pytest.fixture
def composed(repository, make_composed, tasks):
    """cats has what was composed for it; sums has its own among the sources of what was."""
    versions = build_catalog(tasks, ENCODER, repository=repository).adapters
    repository.push(make_composed("cats.composed", "cats", {"sums": versions["sums"], "rain": versions["rain"]}))
    repository.push(make_composed("sums.composed", "sums", dict(versions)))
    return build_catalog(tasks, ENCODER, repository=repository)


def test_a_manifest_says_what_an_adapter_was_composed_of(composed, repository) -> None:
    manifest = repository.manifest("cats.composed")
    assert manifest.provenance is not None
    assert [row["name"] for row in manifest.provenance["sources"]] == ["sums", "rain"]
    assert manifest.provenance["score_before"] < manifest.provenance["score_after"]
    again = AdapterManifest.from_json(manifest.to_json(), name="cats.composed")
    assert again == manifest
    assert "provenance" not in repository.manifest("sums").to_json()


def test_what_was_composed_comes_before_what_it_was_held_against(composed) -> None:
    assert served(composed, "cats") == ["cats.composed"]
    assert served(composed, "sums") == ["sums.composed", "sums"]
    assert served(composed, "rain") == ["rain"]
    assert composed.composed["cats.composed"].task == "cats"
    assert composed.stale == {}


def test_an_adapter_that_came_later_comes_before_it(composed, make_adapter, tmp_path, repository) -> None:
    changed = with_adapter(composed, repository.push(make_adapter(tmp_path, "cats")))
    assert served(changed, "cats") == ["cats", "cats.composed"]


def test_scores_say_nothing_of_what_was_made_of_the_same_examples(composed) -> None:
    scores = {"sums": {name: dict.fromkeys(range(4), value) for name, value in (("sums", 0.4), ("rain", 0.8))}}
    scored = with_scores(composed, {"sums": {**scores["sums"], "sums.composed": dict.fromkeys(range(4), 0.1)}})
    assert served(scored, "sums")[0] == "sums.composed"
    assert set(served(scored, "sums")) == {"sums.composed", "sums", "rain"}


def test_it_is_as_from_plain_folders_and_after_changes(composed, make_task, make_adapter, tmp_path, tasks) -> None:
    plain = tmp_path / "plain"
    versions = {name: make_adapter(plain, name) for name in ("sums", "rain")}
    composed_folder(make_adapter(plain, "cats.composed"), "cats", dict.fromkeys(versions, "0" * 16))
    store = AdapterRepository(DirectoryStore(plain))
    catalog = build_catalog(tasks, ENCODER, repository=store)
    assert served(catalog, "cats") == ["cats.composed"]
    refreshed = with_adapters(catalog, store)  # which reads no folder again
    assert refreshed.composed == catalog.composed
    more = with_tasks(composed, [make_task("new", "what is new")], ENCODER)
    assert more.composed == composed.composed
    assert served(more, "sums") == ["sums.composed", "sums"]
    assert "cats.composed" not in without_adapters(composed, ["cats.composed"]).composed


def test_it_is_kept_in_the_store(composed, tmp_path, tasks, repository) -> None:
    composed.save(tmp_path / "catalog")
    again = Catalog.load(tmp_path / "catalog")
    assert again.composed == composed.composed
    assert again.version == composed.version == build_catalog(tasks, ENCODER, repository=repository).version


def test_a_source_that_changed_makes_it_stale(composed, make_adapter, tmp_path, repository) -> None:
    newer = repository.push(make_adapter(tmp_path / "newer", "rain", rank=3))
    changed = with_adapter(composed, newer)
    assert changed.stale == {"cats.composed": ["rain"], "sums.composed": ["rain"]}
    assert without_adapters(composed, ["verses"]).stale == {"sums.composed": ["verses"]}


def test_tasks_that_want_a_composition(composed, make_adapter, tmp_path, repository, tasks) -> None:
    assert wanting(composed) == []
    assert wanting(without_adapters(composed, ["cats.composed"])) == ["cats"]
    poor = with_scores(composed, {"rain": {"rain": dict.fromkeys(range(4), 0.1)}})
    assert wanting(poor) == ["rain"]
    changed = with_adapter(composed, repository.push(make_adapter(tmp_path / "newer", "verses", rank=3)))
    assert wanting(changed) == ["sums"]  # whose composition is stale


def test_it_serves_queries_of_its_task_and_says_that_it_was_composed(composed) -> None:
    router = Router(composed, ENCODER)
    [decision] = router.route(["purring pets cats1"])
    assert decision.adapters[0].name == "cats.composed"
    assert decision.to_json()["adapters"][0]["composed"] is True
    [plain] = router.route(["rhyme a stanza verses2"])
    assert plain.adapters[0].name == "verses"
    assert "composed" not in plain.to_json()["adapters"][0]


def test_it_is_of_no_use_to_unseen_tasks_and_takes_nothing_from_others(composed) -> None:
    bare = without_adapters(composed, composed.composed)
    text = "purring pets cats1"
    options = [RoutingOptions(exclude_tasks=frozenset({"cats"}))]
    found, before = (
        Retriever(catalog, RoutingConfig()).retrieve(ENCODER.encode([text]), [text], options)[0]
        for catalog in (composed, bare)
    )
    worth = {adapter.name: adapter.utility for adapter in found.adapters}
    assert 0 < worth.pop("sums.composed") <= 2 * found.familiarity  # as far as it is known after all
    assert worth == pytest.approx({adapter.name: adapter.utility for adapter in before.adapters})


def test_only_what_is_called_as_a_tasks_compositions_serves_it_by_saying_so(
    composed, repository, make_composed, tasks
) -> None:
    for name in ("mine", "a-verses.composed", "verses.composedly"):
        repository.push(make_composed(name, "verses", {"verses": composed.adapters["verses"]}))
        claimed = with_adapter(composed, repository.manifest(name))
        assert served(claimed, "verses") == ["verses"], name
        assert claimed.composed.keys() == composed.composed.keys()
    assert served(build_catalog(tasks, ENCODER, repository=repository), "verses") == ["verses"]
    assert served(with_adapters(composed, repository), "verses") == ["verses"]
    for name in ("verses.composed", "verses.composed.semi-OOD"):
        repository.push(make_composed(name, "verses", {"verses": composed.adapters["verses"]}))
        assert served(with_adapter(composed, repository.manifest(name)), "verses") == [name, "verses"]


def test_nonsense_for_a_provenance_is_none() -> None:
    for nonsense in (
        None,
        {},
        {"task": 3, "sources": []},
        {"task": "a", "sources": [1]},
        {"task": "a/b", "sources": []},
        {"task": "a", "sources": [], "exact": True, "right_after": 10**400},
    ):
        assert Composition.of(nonsense) is None


def test_a_replaced_adapter_that_is_not_composed_any_more(composed, make_adapter, tmp_path, repository) -> None:
    plain = repository.push(make_adapter(tmp_path / "plain", "cats.composed"))
    assert with_adapter(composed, plain).composed.keys() == {"sums.composed"}
    assert replace(composed, composed={}).stale == {}
