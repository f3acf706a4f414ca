"""What is known of showing a task's examples before a query of it: whether it helps, and what they take of a prompt.

Knows nothing of how that is found out (`lorauter.evaluation.left_out`), nor of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from lorauter.catalog.catalog import Catalog
    from lorauter.catalog.segments import Segment, TaskEntry

By = Literal["mixture", "base"]


@dataclass(frozen=True)
class Help:
    """What examples did for a task's left-out examples.

    Attributes:
        by: what answers best with them, the router's mixture or the base model alone; None where the mixture without
            them does.
        gain: of the task's metric over the mixture without them, by the better of both.
        error: the standard error of `gain`.
    """

    by: By | None
    gain: float
    error: float


@dataclass(frozen=True)
class ShownExamples:
    """The same with the adapters that were made for the task, and without them.

    Attributes:
        count: how many were shown.
        own: None where no adapter was made for the task.
        others: as it is where those may not be used.
        tokens: that each of the task's examples takes in a prompt.
    """

    count: int
    own: Help | None
    others: Help
    tokens: tuple[int, ...]

    def help(self, *, own: bool) -> Help | None:
        """Where adapters that were made for the task may be used, or not; None where that was not found out."""
        return self.own if own else self.others

    def helps(self) -> dict[str, Any]:
        """What it comes to, for people."""
        own = None if self.own is None else vars(self.own)
        return {"count": self.count, "own": own, "others": vars(self.others)}

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {**self.helps(), "tokens": list(self.tokens)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShownExamples:
        """Raises KeyError, TypeError where it is none."""
        own = None if data["own"] is None else Help(**data["own"])
        return cls(data["count"], own, Help(**data["others"]), tuple(data["tokens"]))


_looked: WeakKeyDictionary[Segment, _Look] = WeakKeyDictionary()  # of those in use


class _Look(NamedTuple):
    most: int
    known: int
    unknown: tuple[str, ...]


def unchecked(catalog: Catalog) -> tuple[int, list[str]]:
    """How many examples a catalog's tasks were asked after, and the tasks of which nobody knows what that does: they
    came later, or an adapter was made for them since. None where most were never asked.
    """
    found = [_looked.get(segment) or _looked.setdefault(segment, _look(segment)) for segment in catalog.segments]
    names = [name for of in found for name in of.unknown]
    return max(of.most for of in found), names if len(names) < sum(of.known for of in found) else []


def _look(segment: Segment) -> _Look:
    entries = [entry for i in range(len(segment)) if (entry := segment.entry(i)).examples > 1]
    unknown = tuple(entry.name for entry in entries if not _is_known(entry))
    most = max((entry.shown.count for entry in entries if entry.shown is not None), default=0)
    return _Look(most, len(entries) - len(unknown), unknown)


def _is_known(entry: TaskEntry) -> bool:
    return entry.shown is not None and (entry.shown.own is not None or not entry.declared)
