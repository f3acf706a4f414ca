"""Compositions for a catalog's tasks, on the smallest pool and model there are; the fits are real ones."""

import pytest

from lorauter.adapters.provenance import composed_name
from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.catalog import build_catalog
from lorauter.compositions.pool import MAX_SOURCES, compose_for
from lorauter.compositions.starts import example_mixtures, likeliest_sources, made_for, mean_mixture, starts_of
from lorauter.encoder import HashingEncoder
from lorauter.errors import ConfigError
from lorauter.routing import RoutingConfig

WORDS = {"sums": "add two numbers", "verses": "rhyme a stanza", "rain": "forecast the clouds", "cats": "purring pets"}


@pytest.fixture
def tasks(make_task):
    return [make_task(name, *(f"{words} {name}{i}" for i in range(4))) for name, words in WORDS.items()]


@pytest.fixture
def catalog(tasks, make_adapter, tmp_path):
    repository = AdapterRepository(MemoryStore())
    for name in ("sums", "verses", "rain"):
        repository.push(make_adapter(tmp_path, name))
    return build_catalog(tasks, HashingEncoder(), repository=repository)


def test_fits_begin_where_the_router_is_without_what_is_barred(catalog) -> None:
    found = example_mixtures(catalog, RoutingConfig(), {"sums": ["sums"], "rain": []})
    assert found.keys() == {"sums", "rain"}
    assert len(found["sums"]) == 4
    assert not any("sums" in mixture for mixture in found["sums"])
    assert all(max(mixture, key=mixture.__getitem__) == "rain" for mixture in found["rain"])
    # A composition is known by them: what an encoder's threads change must not make it another one.
    assert all(weight == round(weight, 4) for of in found.values() for mixture in of for weight in mixture.values())


def test_a_fit_may_begin_with_the_tasks_own_adapter_unless_that_is_barred(catalog) -> None:
    barred = {"sums": ["sums"], "rain": []}
    mixtures = example_mixtures(catalog, RoutingConfig(), barred)
    starts = starts_of(catalog, RoutingConfig(), barred, mixtures)
    assert starts["rain"][0] == mean_mixture(mixtures["rain"])
    assert {"rain": 1.0} in starts["rain"]
    assert any(max(start, key=start.__getitem__) != "rain" for start in starts["rain"])
    assert starts["sums"][0] == mean_mixture(mixtures["sums"])
    assert not any("sums" in start for start in starts["sums"])


def test_where_nothing_serves_any_task_fits_begin_with_the_base_model(tasks, make_adapter, tmp_path) -> None:
    repository = AdapterRepository(MemoryStore())
    repository.push(make_adapter(tmp_path, "nobodys"))
    catalog = build_catalog(tasks, HashingEncoder(), repository=repository)
    mixtures = example_mixtures(catalog, RoutingConfig(), {"rain": []})
    assert mixtures == {"rain": [{}] * 4}
    assert starts_of(catalog, RoutingConfig(), {"rain": []}, mixtures) == {"rain": [{}]}


def test_what_was_made_for_a_task_is_what_is_not_barred(catalog) -> None:
    assert made_for(catalog, "rain", ()) == ["rain"]
    assert made_for(catalog, "rain", ["rain"]) == made_for(catalog, "cats", ()) == []


def test_the_sources_of_a_large_pool_are_those_of_use(catalog) -> None:
    sources = likeliest_sources(catalog, RoutingConfig(), {"rain": [], "sums": ["sums"]}, 1)
    assert sources["rain"] == ["rain"]
    assert sources["sums"] != ["sums"]
    assert MAX_SOURCES >= 40


def test_a_composition_has_its_tasks_name() -> None:
    assert composed_name("sst2") == "sst2.composed"
    with pytest.raises(ConfigError, match="shorter"):
        composed_name("a" * 128)


def test_a_task_that_is_not_there_is_told(catalog, tmp_path) -> None:
    with pytest.raises(ConfigError, match="no task called nonsense"):
        compose_for(catalog, ["nonsense"], lambda name: None, tmp_path, model="default")
