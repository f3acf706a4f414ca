"""What a store's versions of a catalog hold, when they were written, and what changed from one to the next.

Reads the versions' heads alone, and each once: a version never changes. Knows nothing of how a version becomes current.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorauter.adapters.store import ObjectStore
from lorauter.catalog.catalog import HEAD_FILE, current_version
from lorauter.catalog.versions import catalog_versions
from lorauter.errors import CatalogError, InvalidRequest, ObjectNotFound

_NAMES = 50  # that a change lists of each kind
_KEPT = 256  # versions whose contents are remembered


@dataclass(frozen=True)
class Contents:
    """What a version holds: of each task a hash of all that is known of it, and each adapter's version."""

    tasks: Mapping[str, str]
    adapters: Mapping[str, str]

    @classmethod
    def of(cls, raw: bytes) -> Contents:
        """Of a version's `catalog.json`. Raises ValueError, KeyError, TypeError, AttributeError: it is none."""
        head = json.loads(raw)
        tasks = {
            row["task"]["name"]: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
            for row in head["tasks"]
        }
        return cls(tasks, {str(name): str(version) for name, version in head["adapters"].items()})

    def changes_since(self, before: Contents) -> dict[str, Any]:
        """What was added, removed and changed, by kind: how many, and the first names."""
        return {
            "tasks": _difference(before.tasks, self.tasks),
            "adapters": _difference(before.adapters, self.adapters),
        }


@dataclass
class History:
    """The versions in a store, the newest first.

    Args:
        store: the catalog's.
    """

    store: ObjectStore
    _known: dict[str, Contents | None] = field(default_factory=dict)

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
                before = self._contents(versions[place + 1]) if place + 1 < len(versions) else None
                row |= {"tasks": len(contents.tasks), "adapters": len(contents.adapters)}
                row["changes"] = contents.changes_since(before) if before is not None else None
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
                self._known[version] = Contents.of(self.store.read(f"{version}/{HEAD_FILE}"))
            except ObjectNotFound:
                return None
            except (CatalogError, ValueError, KeyError, TypeError, AttributeError):
                self._known[version] = None
            while len(self._known) > _KEPT:
                del self._known[next(iter(self._known))]
        return self._known[version]


def _difference(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    kinds = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": [name for name in after if name in before and after[name] != before[name]],
    }
    return {kind: {"count": len(names), "names": sorted(names)[:_NAMES]} for kind, names in kinds.items()}
