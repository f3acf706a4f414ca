"""Regimes: what a router may know of a query's own task. Knows names only."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from lorauter.errors import ConfigError

if TYPE_CHECKING:
    from lorauter.routing.options import RoutingOptions

REGIMES = ("in-domain", "semi-OOD", "OOD")
"""Task and adapter present; the task in the catalog, its adapters not in the pool; neither."""


def options_for(regime: str, task_name: str, own_adapters: Collection[str]) -> RoutingOptions:
    """The routing options that put a query of a task into a regime.

    Args:
        regime: one of REGIMES.
        own_adapters: the adapters that were made for the task.

    Raises:
        ConfigError: no such regime.
    """
    from lorauter.routing.options import RoutingOptions  # brings FAISS, which reports have no use for

    if regime not in REGIMES:
        raise ConfigError(f"regime {regime!r} is not one of {', '.join(REGIMES)}", setting="regime")
    return RoutingOptions(
        exclude_tasks=frozenset({task_name} if regime == "OOD" else ()),
        exclude_adapters=frozenset(() if regime == "in-domain" else own_adapters),
    )
