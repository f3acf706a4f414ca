"""What a caller may see of the adapters: name patterns, and routing options that keep to them.

A task that none of a caller's adapters serves is hidden as a whole: it is routed as if the catalog lacked it.
Knows nothing of keys or HTTP.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Hashable, Iterable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from lorauter.catalog import Catalog
from lorauter.catalog.index import TaskSubset
from lorauter.routing.options import RoutingOptions

Permitted = tuple[str, ...] | None
"""Patterns of adapter names (`*`, `?`, `[...]`); None permits all."""


def permits(permitted: Permitted, adapter: str) -> bool:
    """Whether an adapter's name fits one of the patterns."""
    return permitted is None or _compiled(permitted).match(adapter) is not None


@lru_cache(maxsize=4096)
def _compiled(permitted: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, permitted)) or r"(?!)")


class ScopedOptions(RoutingOptions):
    """A request's routing options, kept to the adapters that its caller may use.

    Attributes:
        permitted: patterns, one of which an adapter's name has to fit, whatever the request allows.
    """

    permitted: tuple[str, ...]

    @classmethod
    def of(cls, options: RoutingOptions, permitted: tuple[str, ...]) -> ScopedOptions:
        """The same options for a caller."""
        return cls(**options.plain(), permitted=permitted)

    def among(self, catalog: Catalog) -> TaskSubset | None:
        """The tasks that the caller may see; None is all of them."""
        known = _subsets.setdefault(catalog, {})
        if self.permitted not in known:
            seen = visible_places(catalog, self.permitted)
            known[self.permitted] = None if seen.all() else TaskSubset(seen)
        return known[self.permitted]

    def allows(self, adapter: str) -> bool:
        """Whether an adapter may be used."""
        return permits(self.permitted, adapter) and super().allows(adapter)

    @property
    def allows_all(self) -> bool:
        """Whether every adapter may be used."""
        return False

    def may_show(self, declared: Collection[str]) -> bool:
        """Whether the examples of a task may be shown: one of the adapters that were made for it has to be the
        caller's, or the task's name where there is none. One that was merely tried on it lets the caller be routed to
        it, no more.
        """
        return not is_hidden(declared, self.permitted)

    @property
    def adapters_key(self) -> Hashable:
        """The same for options that allow the same adapters."""
        return self.permitted, super().adapters_key


_subsets: WeakKeyDictionary[Catalog, dict[tuple[str, ...], TaskSubset | None]] = WeakKeyDictionary()  # by identity


def is_hidden(adapters: Iterable[str], permitted: Permitted) -> bool:
    """Whether a task with these adapters is to be hidden: none of them is permitted, though not all adapters are."""
    return permitted is not None and "*" not in permitted and not any(permits(permitted, name) for name in adapters)


def visible_places(catalog: Catalog, permitted: Permitted) -> NDArray[np.bool_]:
    """Which of a catalog's tasks are not hidden: (tasks,)."""
    if not is_hidden((), permitted):
        return np.ones(len(catalog), np.bool_)
    return catalog.served_by(lambda name: permits(permitted, name))


def visible_tasks(tasks: Iterable[dict[str, Any]], permitted: Permitted) -> list[dict[str, Any]]:
    """Of tasks as JSON objects those that a caller may see, each with the adapters that it may use."""
    if permitted is None:
        return list(tasks)
    return [
        {**task, "adapters": [adapter for adapter in adapters if permits(permitted, adapter["name"])]}
        for task in tasks
        for adapters in [task.get("adapters", [])]
        if not is_hidden((adapter["name"] for adapter in adapters), permitted)
    ]


def visible(answer: dict[str, Any], permitted: Permitted) -> dict[str, Any]:
    """An answer as a caller may see it: the catalog's version changes with what is not the caller's too."""
    return answer if permitted is None else {**answer, "catalog_version": None}
