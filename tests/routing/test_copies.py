"""Of adapters that compute the same one is used: the one that was tried, or, where it may not be, another."""

from collections.abc import Callable
from typing import Any

import pytest

from lorauter.adapters import AdapterManifest, MemoryStore
from lorauter.catalog import Catalog, build_catalog, with_adapter, with_copies, with_scores, without_adapters
from lorauter.encoder import HashingEncoder
from lorauter.errors import ConfigError
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions

ENCODER = HashingEncoder()
SCORES = {"sums": {"first": {0: 1.0, 1: 0.5}, "other": {0: 0.25, 1: 0.5}}}
COPIES = {"copy": "first", "another": "first"}


@pytest.fixture
def plain(make_task: Callable[..., Any]) -> Catalog:
    catalog = build_catalog([make_task("sums"), make_task("poems")], ENCODER)
    return with_adapter(catalog, *(AdapterManifest(n, "1" * 16, {}) for n in ("first", "copy", "another", "other")))


@pytest.fixture
def catalog(plain: Catalog) -> Catalog:
    return with_copies(plain, COPIES, SCORES)


def used(catalog: Catalog, preset: str = "default", **options: Any) -> dict[str, float]:
    """What a question of sums is answered with, and what each is worth."""
    config = RoutingConfig(preset=preset, top_k=4)  # type: ignore[arg-type]
    texts = ["sums first question"]
    [found] = Retriever(catalog, config).retrieve(ENCODER.encode(texts), texts, [RoutingOptions(**options)])
    if preset == "paper":
        return dict.fromkeys(found.tasks[0].adapters, 1.0)
    return {adapter.name: adapter.utility for adapter in found.adapters}


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_who_may_use_all_uses_what_was_tried_as_if_there_were_no_copy(
    plain: Catalog, catalog: Catalog, preset: str
) -> None:
    assert used(catalog, preset) == used(with_scores(plain, SCORES), preset)
    assert used(catalog, preset).keys() == {"first", "other"}


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"exclude_adapters": frozenset({"first"})}, {"another", "other"}),
        ({"allow_adapters": frozenset({"copy"})}, {"copy"}),
        ({"allow_adapters": frozenset({"copy", "another"})}, {"another"}),
        ({"allow_adapters": frozenset({"copy", "first"})}, {"first"}),
    ],
)
def test_one_copy_has_the_rank_of_what_may_not_be_used(
    catalog: Catalog, preset: str, options: dict[str, Any], names: set[str]
) -> None:
    mine = used(catalog, preset, **options)
    assert mine.keys() == names
    [one] = names - {"other"}
    assert mine[one] == used(catalog, preset)["first"]


def test_one_of_another_version_is_no_copy_any_more(catalog: Catalog) -> None:
    newer = with_adapter(catalog, AdapterManifest("copy", "2" * 16, {}))
    assert newer.copies == {"another": "first", "first": "first"}
    assert used(newer).keys() == {"first", "copy", "other"}
    renewed = with_adapter(catalog, AdapterManifest("first", "2" * 16, {}))
    assert renewed.copies == {"another": "first", "copy": "first"}
    assert used(renewed).keys() == {"first", "another", "other"}
    assert used(without_adapters(catalog, ["first"])).keys() == {"another", "other"}


def test_a_store_keeps_it(plain: Catalog, catalog: Catalog) -> None:
    store = MemoryStore()
    catalog.save(store)
    again = Catalog.load(store)
    assert (again.version, again.copies) == (catalog.version, {"another": "first", "copy": "first", "first": "first"})
    assert again.missing_in(store) == set()
    assert used(again) == used(catalog)
    assert with_copies(plain, {}, SCORES).version == with_scores(plain, SCORES).version


def test_a_copy_of_what_is_not_there_is_refused(plain: Catalog) -> None:
    with pytest.raises(ConfigError, match="gone"):
        with_copies(plain, {"copy": "gone"}, SCORES)
