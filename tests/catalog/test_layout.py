"""Tasks in two dimensions: near where they are alike, in the same places each time, and of many a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lorauter.catalog import Catalog, build_catalog
from lorauter.catalog.layout import Layout
from lorauter.encoder import HashingEncoder

ENCODER = HashingEncoder(32)


@pytest.fixture
def make_catalog(make_task: Callable[..., Any]) -> Callable[..., Catalog]:
    def make(**inputs: str) -> Catalog:
        return build_catalog([make_task(name, *texts.split("|")) for name, texts in inputs.items()], ENCODER)

    return make


def places(shown: dict[str, Any]) -> dict[str, Any]:
    return {row["id"]: np.array([row["x"], row["y"]]) for row in shown["data"]}


def test_an_embedding_is_placed_as_the_tasks_are(make_catalog: Callable[..., Catalog]) -> None:
    catalog = make_catalog(a="red green blue", b="red green grey", c="one two three", d="do re mi fa")
    shown = Layout.of(catalog, range(4)).to_json(catalog)
    assert (shown["total"], shown["catalog_version"]) == (4, catalog.version)
    at = places(shown)
    assert np.linalg.norm(at["a"] - at["b"]) < min(np.linalg.norm(at["a"] - at[other]) for other in "cd")
    projection = shown["projection"]
    for entry, centroid in zip(catalog.tasks, catalog.centroids, strict=True):
        own = np.array(projection["components"]) @ (centroid - np.array(projection["mean"]))
        assert own == pytest.approx(at[entry.name], abs=1e-4)
    assert shown == Layout.of(catalog, range(4)).to_json(catalog)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_few_tasks_have_places_too(make_catalog: Callable[..., Catalog], size: int) -> None:
    catalog = make_catalog(a="red green", b="one two")
    shown = Layout.of(catalog, range(size)).to_json(catalog)
    assert list(places(shown)) == ["a", "b"][:size]
    assert np.isfinite([*places(shown).values()]).all()
    assert np.array(shown["projection"]["components"]).shape == (2, 32)


def test_of_many_tasks_some_are_shown_and_those_that_are_named(make_catalog: Callable[..., Catalog]) -> None:
    catalog = make_catalog(**{f"t{i:02}": f"word{i} thing{i}" for i in range(30)})
    layout = Layout.of(catalog, range(29), most=5)
    assert list(places(layout.to_json(catalog))) == ["t00", "t07", "t14", "t21", "t28"]
    named = layout.to_json(catalog, {"t03", "t29", "nobody"})  # t29 does not count
    assert list(places(named)) == ["t00", "t03", "t07", "t14", "t21", "t28"]
    assert named["total"] == 29
