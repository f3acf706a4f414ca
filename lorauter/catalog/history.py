"""What a store's versions of a catalog hold, when they were written, and what changed from one to the next.

Reads the versions' heads, and of what differs between two the segments in which they do; each once, as a version never
changes. Knows nothing of how a version becomes current.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorauter.adapters.store import ObjectStore
from lorauter.catalog.catalog import HEAD_FILE, current_version, read_head
from lorauter.catalog.parts import Arrays, Parts, text_in
from lorauter.catalog.versions import catalog_versions
from lorauter.errors import CatalogError, InvalidRequest, ObjectNotFound

_NAMES = 50  # that a change lists of each kind
_KEPT = 256  # versions of which it is remembered what they hold


class Contents(NamedTuple):
    """How many tasks and adapters a version holds, and the digests of the parts that have them."""

    tasks: int
    adapters: int
    segments: frozenset[str]
    adapter_parts: frozenset[str]


@dataclass
class History:
    """The versions in a store, the newest first.

    Args:
        store: the catalog's.
    """

    store: ObjectStore
    _known: dict[str, Contents | None] = field(default_factory=dict)
    _changes: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def page(self, limit: int, after: str | None = None) -> dict[str, Any]:
        """A page of the versions, each with what changed since the one that was written before it.

        Args:
            limit: versions at most.
            after: the one that the page begins after.

        Raises:
            InvalidRequest: there is no version `after`.
            CatalogError: what is current is not to be known.
            StoreError: the store fails.
        """
        current = current_version(self.store)
        written = dict(sorted(self._written(), key=lambda item: (-item[1], item[0] != current)))
        versions = list(written)
        if after is not None and after not in written:
            raise InvalidRequest("after is no id of this list", param="after")
        start = 0 if after is None else versions.index(after) + 1
        shown = versions[start : start + limit]
        rows = []
        for place, version in enumerate(shown, start):
            row: dict[str, Any] = {
                "id": version,
                "object": "catalog.version",
                "created": int(written[version]),
                "current": version == current,
            }
            contents = self._contents(version)
            if contents is None:
                row["problem"] = "it is incomplete or damaged"
            else:
                row |= {"tasks": contents.tasks, "adapters": contents.adapters}
                row["changes"] = self._difference(versions[place + 1], version) if place + 1 < len(versions) else None
            rows.append(row)
        return {"object": "list", "data": rows, "total": len(versions), "has_more": start + limit < len(versions)}

    def _written(self) -> Iterator[tuple[str, float]]:
        for version in catalog_versions(self.store):
            try:
                yield version, self.store.modified(f"{version}/{HEAD_FILE}")
            except ObjectNotFound:  # it is on its way in or out
                continue

    def _contents(self, version: str) -> Contents | None:
        """None where it cannot be read."""
        if version not in self._known:
            try:
                head = json.loads(read_head(self.store, version))
                segments = frozenset(routing for routing, _ in head["segments"])
                counts = head["counts"]
                self._known[version] = Contents(
                    int(counts["tasks"]), int(counts["adapters"]), segments, frozenset(head["adapters"])
                )
            except ObjectNotFound:
                return None
            except (CatalogError, ValueError, KeyError, TypeError, AttributeError):
                self._known[version] = None
            _shorten(self._known)
        return self._known[version]

    def _difference(self, before: str, after: str) -> dict[str, Any] | None:
        """What was added, removed and changed: how many, and the first names. None where it cannot be known."""
        if (before, after) not in self._changes:
            was, now = self._contents(before), self._contents(after)
            if was is None or now is None:
                return None
            try:
                self._changes[before, after] = {
                    "tasks": _difference(*self._differing(was.segments, now.segments, _tasks)),
                    "adapters": _difference(*self._differing(was.adapter_parts, now.adapter_parts, _adapters)),
                }
            except (CatalogError, ObjectNotFound):
                return None
            _shorten(self._changes)
        return self._changes[before, after]

    def _differing(
        self, was: frozenset[str], now: frozenset[str], rows: Callable[[Arrays], Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The rows of the parts that one version has and the other has not."""
        sides: list[dict[str, Any]] = []
        for digests in (was - now, now - was):
            parts = Parts(self.store).read_all(sorted(digests))
            sides.append({name: value for part in parts for name, value in rows(part).items()})
        return sides[0], sides[1]


def _tasks(segment: Arrays) -> Mapping[str, int]:
    """The tasks of a segment, with a digest of all that is known of each."""
    return dict(zip(text_in(segment, 0), segment["digests"].tolist(), strict=True))


def _adapters(part: Arrays) -> Mapping[str, str]:
    found: dict[str, str] = text_in(part, 0)
    return found


def _shorten(known: dict[Any, Any]) -> None:
    while len(known) > _KEPT:
        del known[next(iter(known))]


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": [name for name in after if name in before and after[name] != before[name]],
    }
    return {kind: {"count": len(names), "names": sorted(names)[:_NAMES]} for kind, names in kinds.items()}
