"""Composed adapters in a catalog: each is one of the adapters that were made for its task, and the first of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorauter.catalog.catalog import Catalog, RankedAdapter
from lorauter.catalog.segments import Segment, TaskRow


@dataclass(frozen=True)
class Composed:
    """An adapter that was composed for a task, its version, and those of its sources."""

    name: str
    version: str
    sources: Mapping[str, str]


def with_composed(catalog: Catalog, composed: Mapping[str, Composed]) -> Catalog:
    """The catalog with compositions, `{task: composition}`, before all other adapters of their tasks."""

    def row(place: int) -> TaskRow:
        entry, examples = catalog.row(place)
        if of := composed.get(entry.name):
            adapters, declared = (RankedAdapter(of.name), *entry.adapters), (of.name, *entry.declared)
            entry = replace(entry, adapters=adapters, declared=declared)
        return TaskRow(entry, examples)

    segments, start = [], 0
    for segment in catalog.segments:
        places = range(start, start := start + len(segment))
        segments.append(segment if composed.keys().isdisjoint(segment.names) else Segment.of(list(map(row, places))))
    adapters = {**catalog.adapters, **{of.name: of.version for of in composed.values()}}
    changed = replace(
        catalog,
        segments=tuple(segments),
        adapters={name: adapters[name] for name in sorted(adapters)},
        composed={**catalog.composed, **{of.name: dict(of.sources) for of in composed.values()}},
    )
    # Made of the tasks' examples alone, which are the same.
    for name in ("index", "reranker"):
        changed.__dict__[name] = getattr(catalog, name)
    return changed
