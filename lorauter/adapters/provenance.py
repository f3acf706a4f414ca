"""What a composed adapter says of itself: the task that it was composed for, and what of.

The provenance is JSON text in the metadata of the weights' file, beside the tensors, where PEFT does not look. Knows
nothing of how adapters are composed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorauter.errors import ConfigError
from lorauter.names import is_valid_name

PROVENANCE = "lorauter.composition"
"""The key among a weights file's metadata."""

_SUFFIX = ".composed"


def composed_name(task: str) -> str:
    """What the adapter that is composed for a task is called. Raises ConfigError: the task's name is too long."""
    name = task + _SUFFIX
    if not is_valid_name(name):
        raise ConfigError(f"{name!r} is no adapter's name; give task {task!r} a shorter one", setting="tasks")
    return name


@dataclass(frozen=True)
class Composition:
    """What a composed adapter is.

    Attributes:
        task: that it was composed for.
        sources: the versions of the adapters that went into it.
        score: by the task's metric on validation examples that its weights had not seen; None where that is not known.
    """

    task: str
    sources: Mapping[str, str]
    score: float | None = None

    @classmethod
    def of(cls, provenance: Mapping[str, Any] | None) -> Composition | None:
        """What matters of a provenance; None where there is none, or it makes no sense."""
        try:
            if provenance is None or not is_valid_name(provenance["task"]):
                return None
            score = float(provenance["right_after"]) if provenance.get("exact") is True else None
            if score is not None and not 0 <= score <= 1:
                return None
            sources = {str(row["name"]): str(row["version"]) for row in provenance["sources"]}
            return cls(provenance["task"], sources, score)
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    @classmethod
    def of_adapter(cls, name: str, provenance: Mapping[str, Any] | None) -> Composition | None:
        """The same of an adapter that is called as its task's compositions are: `TASK.composed`, and what may follow
        after a dot. Keys, and stores, give leave by names: who may write an adapter of another one cannot have it serve
        that task by saying so."""
        found = cls.of(provenance)
        return found if found is not None and f"{name}.".startswith(f"{found.task}{_SUFFIX}.") else None

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
