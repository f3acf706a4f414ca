import numpy as np
import pytest

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.catalog import RankedAdapter, build_catalog
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.encoder import HashingEncoder
from lorauter.errors import AdapterRejected, ConfigError, StoreUnavailable

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
    np.testing.assert_array_equal(catalog.examples, np.concatenate(rows))
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
    repository.store.objects["wic/adapter.json"] = b"{}"
    with pytest.raises(AdapterRejected, match="'wic'"):
        build_catalog(tasks, ENCODER, repository=repository)
    repository.store.down = True
    with pytest.raises(StoreUnavailable):
        build_catalog(tasks, ENCODER, repository=repository)


def test_other_folders_in_the_store_are_passed_over(tasks, repository) -> None:
    repository.store.write("notes/readme.txt", b"not an adapter")
    assert sorted(build_catalog(tasks, ENCODER, repository=repository).adapters) == ["spare", "sst2", "wic"]
