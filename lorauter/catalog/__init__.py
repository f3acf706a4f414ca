"""The task catalog: built from tasks and adapters, changed bit by bit, published as one versioned artifact.

Each public name is loaded on first use: matching's scoring step runs where there is no FAISS.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorauter.catalog.build import build_catalog
    from lorauter.catalog.catalog import Catalog, CatalogTask, RankedAdapter, current_version
    from lorauter.catalog.change import (
        catalog_versions,
        named_adapters,
        prune_versions,
        use_version,
        with_adapter,
        with_adapters,
        with_scores,
        with_tasks,
        without_adapters,
        without_tasks,
    )

__all__ = [
    "Catalog",
    "CatalogTask",
    "RankedAdapter",
    "build_catalog",
    "catalog_versions",
    "current_version",
    "named_adapters",
    "prune_versions",
    "use_version",
    "with_adapter",
    "with_adapters",
    "with_scores",
    "with_tasks",
    "without_adapters",
    "without_tasks",
]

_CATALOG = {"Catalog", "CatalogTask", "RankedAdapter", "current_version"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorauter.catalog' has no attribute {name!r}")
    home = "catalog" if name in _CATALOG else "build" if name == "build_catalog" else "change"
    return getattr(import_module(f"lorauter.catalog.{home}"), name)
