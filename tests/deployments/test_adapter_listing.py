from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.adapter_listing import AdapterListing, LiveListing
from deployments.app import assemble
from deployments.config import AppConfig
from lorauter.adapters import AdapterRepository, MemoryStore
from lorauter.errors import InvalidRequest, StoreUnavailable


def test_the_newest_versions_are_served_and_those_known_while_the_store_is_down(
    tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    store = MemoryStore()
    repository = AdapterRepository(store)
    old = repository.push(make_adapter(tmp_path / "old", "a")).version
    listing = LiveListing(AdapterRepository(store), refresh_s=60)
    assert listing.versions == {"a": old}
    new = repository.push(make_adapter(tmp_path / "new", "a", rank=3)).version
    assert listing.versions == {"a": old}, "until it looks"
    listing.look()
    assert listing.versions == {"a": new}
    store.down = True
    listing.look()
    assert listing.versions == {"a": new}
    with pytest.raises(StoreUnavailable):
        LiveListing(AdapterRepository(store), refresh_s=60)


def test_it_looks_by_itself(tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    store = MemoryStore()
    listing = LiveListing(AdapterRepository(store), refresh_s=0.01)
    listing.start()
    AdapterRepository(store).push(make_adapter(tmp_path, "a"))
    while not listing.versions:
        pass
    listing.close()


@pytest.mark.parametrize(
    ("given", "catalog"),
    [
        ({}, "default"),
        ({"adapters": "default"}, "default"),
        ({"adapters": "s3://b/a"}, None),
        ({"adapters": "s3://b/a", "catalog": None}, None),
        ({"adapters": "s3://b/a", "catalog": "s3://b/c"}, "s3://b/c"),
        ({"catalog": None}, None),
    ],
)
def test_other_adapters_than_the_examples_have_no_catalog_unless_one_is_named(
    given: dict[str, str | None], catalog: str | None
) -> None:
    assert AppConfig.parse(dict(given)).catalog == catalog


def test_without_a_catalog_the_app_has_the_listing_in_its_place_and_nothing_to_edit(tmp_path: Path) -> None:
    config = AppConfig.parse({"adapters": str(tmp_path)})
    app = assemble(config, {"TaskRetriever": {"num_replicas": 3}})
    _, _, retriever, _, editor = app._bound_deployment.init_args
    assert retriever._bound_deployment.name == "TaskRetriever"
    assert retriever._bound_deployment.num_replicas == 3
    assert retriever._bound_deployment.init_args == (str(tmp_path), config.catalog_refresh_s)
    assert editor is None


def test_who_wants_to_be_routed_is_told() -> None:
    part: Any = object.__new__(AdapterListing.func_or_class)
    with pytest.raises(InvalidRequest, match="no catalog is configured"):
        asyncio.run(part.decide(None, ["x"], [None]))
