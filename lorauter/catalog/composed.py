"""Composed adapters in a catalog: each is one of the adapters that were made for its task, and the first of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorauter.catalog.catalog import Catalog, RankedAdapter


@dataclass(frozen=True)
class Composed:
    """An adapter that was composed for a task, its version, and those of its sources."""

    name: str
    version: str
    sources: Mapping[str, str]


def with_composed(catalog: Catalog, composed: Mapping[str, Composed]) -> Catalog:
    """The catalog with compositions, `{task: composition}`, before all other adapters of their tasks."""
    tasks = tuple(
        replace(
            entry,
            adapters=(RankedAdapter(composed[entry.name].name), *entry.adapters),
            declared=(composed[entry.name].name, *entry.declared),
        )
        if entry.name in composed
        else entry
        for entry in catalog.tasks
    )
    adapters = {**catalog.adapters, **{of.name: of.version for of in composed.values()}}
    changed = replace(
        catalog,
        tasks=tasks,
        adapters={name: adapters[name] for name in sorted(adapters)},
        composed={**catalog.composed, **{of.name: dict(of.sources) for of in composed.values()}},
    )
    # Made of the tasks' examples alone, which are the same.
    for name in ("index", "reranker"):
        changed.__dict__[name] = getattr(catalog, name)
    return changed
