import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fake_states import HashingStates

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.catalog import Catalog, CatalogTask, RankedAdapter, build_catalog, current_version, use_version
from lorauter.catalog.build import probed
from lorauter.catalog.catalog import FORMAT
from lorauter.catalog.parts import key_of
from lorauter.catalog.rerank import Reranker
from lorauter.encoder import HashingEncoder
from lorauter.errors import CatalogError, StoreUnavailable

ENCODER = HashingEncoder(64)
FILES = ("catalog.json", "routing", "examples", "adapters", "shared")


@pytest.fixture
def catalog(tmp_path, make_adapter, make_task) -> Catalog:
    """Three tasks, of which two have adapters."""
    repository = AdapterRepository(MemoryStore())
    for name in ("sst2", "wic"):
        repository.push(make_adapter(tmp_path / "pushed", name))
    tasks = [make_task("sst2"), make_task("wic"), make_task("agnews", "Grüße, 東京")]
    return build_catalog(tasks, ENCODER, repository=repository)


def key_of_file(catalog: Catalog, file: str) -> str:
    """Where a store has the head, or a part by its kind, of a catalog that has one of each."""
    if file == "catalog.json":
        return f"{catalog.version}/catalog.json"
    [segment] = catalog.segments
    if file in ("routing", "examples"):
        return key_of(segment.digests[file == "examples"])
    [digest] = json.loads(catalog._head)[file]
    return key_of(digest)


def rebuilt(catalog: Catalog, tasks: Sequence[CatalogTask], bend: Callable[[Any], Any] = lambda rows: rows) -> Catalog:
    """The same with other tasks in the places of its own."""
    rows = [bend(catalog.examples(place).embeddings) for place in range(len(tasks))]
    return Catalog.of(tasks, rows, catalog.probe, catalog.adapters, catalog.encoder, catalog.base_model)


@pytest.fixture
def other(catalog) -> Catalog:
    """Another catalog."""
    return dataclasses.replace(catalog, base_model="another")


@pytest.fixture
def memory(catalog) -> MemoryStore:
    """A store in which `catalog` is published."""
    memory = MemoryStore()
    catalog.save(memory)
    return memory


def test_a_catalog_is_the_same_after_it_was_published_and_read(store, catalog) -> None:
    assert current_version(store) is None
    version = catalog.save(store)
    again = Catalog.load(store)
    assert version == catalog.version == again.version == current_version(store)
    for name in ("tasks", "entries", "names", "adapters", "encoder", "base_model"):
        got, expected = getattr(again, name), getattr(catalog, name)
        assert (
            (list(got), got[:2]) == (list(expected), expected[:2]) if name in ("tasks", "entries") else got == expected
        )
    np.testing.assert_array_equal(again.probe, catalog.probe)
    np.testing.assert_array_equal(again.centroids, catalog.centroids)
    for place in range(3):
        np.testing.assert_array_equal(again.examples(place).embeddings, catalog.examples(place).embeddings)
    query = ENCODER.encode(["another wic question"])
    np.testing.assert_array_equal(again.index.search(query, 3), catalog.index.search(query, 3))


def test_a_folder_is_a_place_for_catalogs(tmp_path, catalog) -> None:
    assert current_version(tmp_path / "catalog") is None
    catalog.save(tmp_path / "catalog")
    assert Catalog.load(str(tmp_path / "catalog")).version == current_version(tmp_path / "catalog") == catalog.version


def test_a_rebuilt_or_reread_catalog_is_published_as_the_same_bytes(memory, catalog) -> None:
    built, reread = MemoryStore(), MemoryStore()
    anew = rebuilt(build_catalog([entry.task for entry in reversed(catalog.tasks)], ENCODER), catalog.tasks)
    anew = dataclasses.replace(anew, adapters=catalog.adapters, base_model=catalog.base_model)
    anew.save(built)
    Catalog.load(memory).save(reread)
    assert memory.objects == built.objects == reread.objects
    assert set(memory.objects) == {"CURRENT", *(key_of_file(catalog, file) for file in FILES)}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: rebuilt(c, c.tasks, lambda rows: rows * np.float32(0.5)),
        lambda c: rebuilt(c, c.tasks[1:]),
        lambda c: dataclasses.replace(c, probe=-c.probe),
        lambda c: dataclasses.replace(c, encoder="another"),
        lambda c: dataclasses.replace(c, base_model="another"),
        lambda c: dataclasses.replace(c, adapters={**c.adapters, "sst2": "0a1b2c3d"}),
        lambda c: rebuilt(c, (*c.tasks[:2], CatalogTask(c.tasks[2].task, ()))),
        lambda c: rebuilt(c, (*c.tasks[:2], CatalogTask(c.tasks[2].task, (RankedAdapter("wic", 0.5),)))),
        lambda c: rebuilt(c, (*c.tasks[:2], CatalogTask(dataclasses.replace(c.tasks[2].task, description="x"), ()))),
    ],
)
def test_the_version_follows_the_content(catalog, change) -> None:
    assert change(catalog).version != catalog.version
    assert dataclasses.replace(catalog).version == rebuilt(catalog, catalog.tasks).version == catalog.version


def test_scores_are_kept(catalog) -> None:
    ranked = (RankedAdapter("wic", 0.1 + 0.2), RankedAdapter("sst2"))
    entry = CatalogTask(catalog.tasks[0].task, ranked)
    store = MemoryStore()
    rebuilt(catalog, (entry, *catalog.tasks[1:])).save(store)
    assert Catalog.load(store).tasks[0] == entry


def test_the_scores_by_example_are_kept(catalog) -> None:
    scores = {"wic": {10: 0.1 + 0.2, 2: 1.0, 0: 0.0}, "sst2": {1: -0.5}}
    entry = dataclasses.replace(catalog.tasks[0], scores=scores)
    store = MemoryStore()
    changed = rebuilt(catalog, (entry, *catalog.tasks[1:]))
    assert changed.save(store) != catalog.version
    read = Catalog.load(store)
    assert read.tasks[0].scores == scores
    assert read.tasks[1].scores == {}
    shuffled = {name: dict(sorted(of.items())) for name, of in reversed(scores.items())}
    entry = dataclasses.replace(catalog.tasks[0], scores=shuffled)
    assert rebuilt(catalog, (entry, *catalog.tasks[1:])).version == changed.version


def test_the_reranker_is_kept_and_not_fitted_again(memory, catalog, monkeypatch) -> None:
    monkeypatch.setattr(Reranker, "fit", lambda *_: pytest.fail("was fitted again"))
    again = Catalog.load(memory)
    for name, array in catalog.reranker.arrays().items():
        np.testing.assert_array_equal(again.reranker.arrays()[name], array, err_msg=name)
    (query,) = ENCODER.encode(["another wic question"])
    ranked = [
        c.reranker.rank(query[None], ["another wic question"], c.candidates(np.arange(3))) for c in (catalog, again)
    ]
    np.testing.assert_array_equal(ranked[0].logits, ranked[1].logits)
    assert ranked[0].familiarity == ranked[1].familiarity
    assert again.tasks[int(ranked[1].logits.argmax())].name == "wic"


def test_the_examples_of_each_task_are_its_own(catalog) -> None:
    for place, entry in enumerate(catalog.tasks):
        rows = ENCODER.encode([example.input for example in entry.task.validation])
        np.testing.assert_array_equal(catalog.examples(place).embeddings, rows)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: c[: len(c) // 2], lambda c: b"", lambda c: None],
    ids=["a bit flipped", "half", "empty", "missing"],
)
def test_damage_to_any_file_is_noticed(memory, catalog, file, damage) -> None:
    key = key_of_file(catalog, file)
    content = damage(memory.objects.pop(key))
    if content is not None:
        memory.objects[key] = content
    with pytest.raises(CatalogError, match=key.rsplit("/", 1)[1]) as caught:
        Catalog.load(memory).read_whole()
    assert caught.value.uri == "memory://"
    if file == "examples":  # which are not read before they are asked for
        with pytest.raises(CatalogError, match=key):
            print(Catalog.load(memory).tasks[0])
        with pytest.raises(CatalogError, match=key):
            use_version(memory, catalog.version)


def test_an_old_version_stays_loadable(memory, catalog, other) -> None:
    other.save(memory)
    assert Catalog.load(memory).version == other.version != catalog.version
    assert Catalog.load(memory, version=catalog.version).base_model == catalog.base_model


@pytest.mark.parametrize("allowed", range(len(FILES) + 1))
def test_publishing_that_fails_midway_leaves_the_old_version(memory, catalog, other, break_writes, allowed) -> None:
    break_writes(memory, allowed)
    with pytest.raises(StoreUnavailable):
        other.save(memory)
    assert Catalog.load(memory).version == catalog.version


@pytest.mark.parametrize(
    ("current", "said"),
    [
        (None, "is not there or incomplete.*lorauter catalog build"),
        (b"0123456789abcdef", "is not there or incomplete"),
        (b"../../etc/passwd", "is no version"),
        (b"", "is no version"),
        (b"\xff\xfe", "malformed"),
    ],
)
def test_a_current_that_points_at_nothing_is_refused(memory, current, said) -> None:
    del memory.objects["CURRENT"]
    if current is not None:
        memory.objects["CURRENT"] = current
    with pytest.raises(CatalogError, match=said):
        Catalog.load(memory)


def without(head, key):
    return {name: value for name, value in head.items() if name != key}


@pytest.mark.parametrize("version", ["0123456789abcdef", "../x", "CURRENT"])
def test_a_version_that_is_not_there_is_refused(memory, version) -> None:
    with pytest.raises(CatalogError):
        Catalog.load(memory, version=version)


def test_a_trailing_newline_in_current_does_no_harm(memory, catalog) -> None:
    memory.objects["CURRENT"] += b"\n"
    assert Catalog.load(memory).version == current_version(memory) == catalog.version


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda head: {**head, "format": FORMAT + 1}, f"has format {FORMAT + 1}, this lorauter reads {FORMAT}"),
        (lambda head: {**head, "format": 1}, f"has format 1, this lorauter reads {FORMAT}.*lorauter catalog build"),
        (lambda head: without(head, "segments"), "malformed.*segments"),
        (lambda head: without(head, "sample"), "malformed.*sample"),
        (lambda head: {**head, "segments": []}, "malformed"),
        (lambda head: {**head, "segments": [head["segments"][0][:1]]}, "malformed"),
        (lambda head: {**head, "segments": [head["segments"][0][::-1]]}, "malformed.*centroids"),
        (lambda head: {**head, "segments": ["0" * 64]}, "malformed"),
        (lambda head: {**head, "shared": []}, "malformed"),
        (lambda head: {**head, "shared": head["adapters"]}, "malformed.*probe"),
        (lambda head: {**head, "adapters": head["shared"]}, "malformed.*text"),
        (lambda head: {**head, "adapters": []}, "no version of sst2, wic"),
        (lambda head: {**head, "shared": ["0" * 64]}, "is not there or incomplete"),
        (lambda head: [], "malformed"),
        (lambda head: None, "malformed"),
    ],
)
def test_a_head_of_another_shape_is_refused(memory, catalog, change, said) -> None:
    head = json.loads(memory.objects[f"{catalog.version}/catalog.json"])
    raw = json.dumps(change(head)).encode()
    version = hashlib.sha256(raw).hexdigest()[:16]
    memory.objects[f"{version}/catalog.json"] = raw
    with pytest.raises(CatalogError, match=said):
        Catalog.load(memory, version=version)


def test_a_store_that_is_down_is_not_a_missing_catalog(memory, catalog) -> None:
    memory.down = True
    for ask in (lambda: Catalog.load(memory), lambda: current_version(memory), lambda: catalog.save(memory)):
        with pytest.raises(StoreUnavailable):
            ask()


class Bent:
    """An encoder of the same name and size that embeds otherwise."""

    name = ENCODER.name

    def __init__(self, bend) -> None:
        self._bend = bend

    def encode(self, texts):
        return self._bend(ENCODER.encode(texts))


@pytest.mark.parametrize(
    "encoder",
    [
        HashingEncoder(32),
        Bent(lambda rows: rows[:, ::-1]),
        Bent(lambda rows: -rows),
        Bent(lambda rows: rows * np.float32(0.9)),
        Bent(lambda rows: rows * np.float32("nan")),
    ],
    ids=["size", "order", "sign", "length", "NaN"],
)
def test_another_encoder_is_refused(catalog, encoder) -> None:
    with pytest.raises(CatalogError, match=r"built with the encoder 'hashing-64' \(64 dimensions\)") as caught:
        catalog.check_encoder(encoder)
    assert caught.value.uri == catalog.version


def test_the_same_encoder_fits_whatever_its_name_and_rounding(catalog) -> None:
    catalog.check_encoder(HashingEncoder(64))
    almost = Bent(lambda rows: rows.astype(np.float16).astype(np.float32))
    almost.name = "another-name"
    catalog.check_encoder(almost)


def test_states_are_stored_with_whose_they_are(make_task, store) -> None:
    tasks = [make_task(name, *(f"{name} question {i}" for i in range(6))) for name in ("one", "two", "three")]
    catalog = build_catalog(tasks, ENCODER, states=HashingStates())
    again = Catalog.load(store, version=catalog.save(store))
    again.read_whole()
    assert again.version == catalog.version
    assert again.states is not None
    assert again.states.model == "hashing-states-24"
    again.check_states(probed(HashingStates()))
    with pytest.raises(CatalogError, match="with the states of 'hashing-states-24', and those of 'hashing-states-32'"):
        again.check_states(probed(HashingStates(32)))
    for place in range(3):
        np.testing.assert_array_equal(again.examples(place).states, catalog.examples(place).states)
    [state] = HashingStates().states(["one question"])
    [query] = ENCODER.encode(["one question"])
    one, two = (
        of.reranker.rank(query[None], ["one question"], of.candidates(np.arange(3)), None, state[None])
        for of in (catalog, again)
    )
    np.testing.assert_array_equal(one.logits, two.logits)
    assert (one.familiarity, one.states.tolist()) == (two.familiarity, two.states.tolist())
    assert build_catalog(tasks, ENCODER).states is None


def test_a_catalog_without_states_has_none_of_any_model(make_task) -> None:
    catalog = build_catalog([make_task("one")], ENCODER)
    assert "states" not in json.loads(catalog._head)
    with pytest.raises(CatalogError, match="built with no states"):
        catalog.check_states(probed(HashingStates()))
