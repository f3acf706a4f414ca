"""What the store's versions hold, and what changed from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorauter.adapters import MemoryStore
from lorauter.catalog import build_catalog, use_version, with_tasks, without_tasks
from lorauter.catalog.catalog import HEAD_FILE
from lorauter.catalog.history import History
from lorauter.encoder import HashingEncoder
from lorauter.errors import InvalidRequest

ENCODER = HashingEncoder(32)


@pytest.fixture
def kept(make_task: Callable[..., Any]) -> tuple[MemoryStore, list[str]]:
    """A store with three versions, the first one first."""
    store = MemoryStore()
    first = build_catalog([make_task("poems"), make_task("sums")], ENCODER)
    second = with_tasks(first, [make_task("rain"), make_task("sums", "another input")], ENCODER)
    third = without_tasks(second, ["poems"])
    versions = [catalog.save(store) for catalog in (first, second, third)]
    for when, version in enumerate(versions):
        store.times[f"{version}/{HEAD_FILE}"] = 1000.0 + when
    return store, versions


def told(row: dict[str, Any]) -> dict[str, list[str]]:
    return {way: names["names"] for way, names in row["changes"]["tasks"].items() if names["count"]}


def test_each_version_says_what_changed_since_the_one_before(kept: tuple[MemoryStore, list[str]]) -> None:
    store, versions = kept
    page = History(store).page(10)
    assert (page["total"], page["has_more"]) == (3, False)
    assert [row["id"] for row in page["data"]] == versions[::-1]
    assert [row["current"] for row in page["data"]] == [True, False, False]
    assert [(row["created"], row["tasks"], row["adapters"]) for row in page["data"]] == [
        (1002, 2, 0),
        (1001, 3, 0),
        (1000, 2, 0),
    ]
    newest, middle, oldest = page["data"]
    assert told(newest) == {"removed": ["poems"]}
    assert told(middle) == {"added": ["rain"], "changed": ["sums"]}
    assert oldest["changes"] is None


def test_versions_come_in_pages_and_a_step_back_changes_none(kept: tuple[MemoryStore, list[str]]) -> None:
    store, versions = kept
    history = History(store)
    use_version(store, versions[0])
    page = history.page(2)
    assert page["has_more"]
    assert told(page["data"][1]) == {"added": ["rain"], "changed": ["sums"]}
    [last] = history.page(2, after=versions[1])["data"]
    assert (last["id"], last["current"]) == (versions[0], True)
    with pytest.raises(InvalidRequest, match="after"):
        history.page(2, after="nothing")


def test_a_damaged_version_is_told_of_and_spoils_no_other(kept: tuple[MemoryStore, list[str]]) -> None:
    store, versions = kept
    store.write(f"{versions[1]}/{HEAD_FILE}", b'{"tasks": 3}')
    store.times[f"{versions[1]}/{HEAD_FILE}"] = 1001.0
    newest, damaged, oldest = History(store).page(10)["data"]
    assert "damaged" in damaged["problem"]
    assert newest["changes"] is None
    assert oldest["tasks"] == 2
