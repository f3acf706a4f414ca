"""What a composed adapter says of itself: the task that it was composed for, and what of.

The provenance is JSON text in the metadata of the weights' file, beside the tensors, where PEFT does not look. Knows
nothing of how adapters are composed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorauter.names import is_valid_name

PROVENANCE = "lorauter.composition"
"""The key among a weights file's metadata."""


@dataclass(frozen=True)
class Composition:
    """The task that an adapter was composed for, and the versions of the adapters that went into it."""

    task: str
    sources: Mapping[str, str]

    @classmethod
    def of(cls, provenance: Mapping[str, Any] | None) -> Composition | None:
        """What matters of a provenance; None where there is none, or it makes no sense."""
        try:
            if provenance is None or not is_valid_name(provenance["task"]):
                return None
            return cls(provenance["task"], {str(row["name"]): str(row["version"]) for row in provenance["sources"]})
        except (KeyError, TypeError):
            return None

    def changed(self, versions: Mapping[str, str]) -> list[str]:
        """The sources that are gone, or have another version by now."""
        return sorted(name for name, version in self.sources.items() if versions.get(name) != version)


def provenance_in(metadata: Mapping[str, str] | None) -> dict[str, Any] | None:
    """The provenance among a weights file's metadata, if it has one that can be read."""
    try:
        found = json.loads((metadata or {})[PROVENANCE])
    except (KeyError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
