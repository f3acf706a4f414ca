"""What a caller may see of the adapters: name patterns, and routing options that keep to them.

A task that none of a caller's adapters serves is hidden as a whole: it is routed as if the catalog lacked it.
Knows nothing of keys or HTTP.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from lorauter.catalog import Catalog
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
        own = {name: getattr(options, name) for name in RoutingOptions.model_fields}
        return cls(**own, permitted=permitted)

    def allows(self, adapter: str) -> bool:
        """Whether an adapter may be used."""
        return permits(self.permitted, adapter) and super().allows(adapter)


def is_hidden(adapters: Iterable[str], permitted: Permitted) -> bool:
    """Whether a task with these adapters is to be hidden: none of them is permitted, though not all adapters are."""
    return permitted is not None and "*" not in permitted and not any(permits(permitted, name) for name in adapters)


def _hidden_tasks(catalog: Catalog, permitted: tuple[str, ...]) -> frozenset[str]:
    known = _hidden.setdefault(catalog, {})
    if permitted not in known:
        known[permitted] = frozenset(
            entry.name for entry in catalog.tasks if is_hidden((adapter.name for adapter in entry.adapters), permitted)
        )
    return known[permitted]


_hidden: WeakKeyDictionary[Catalog, dict[tuple[str, ...], frozenset[str]]] = WeakKeyDictionary()  # by identity


def within_scope(catalog: Catalog, options: RoutingOptions) -> RoutingOptions:
    """The options with the tasks excluded that their caller is not to see."""
    if not isinstance(options, ScopedOptions):
        return options
    hidden = _hidden_tasks(catalog, options.permitted)
    return options.model_copy(update={"exclude_tasks": options.exclude_tasks | hidden}) if hidden else options


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
