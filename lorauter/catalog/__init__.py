"""The task catalog: built from tasks and adapters, changed bit by bit, published as one versioned artifact.

Each public name is loaded on first use: matching's scoring step runs where there is no FAISS.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorauter.catalog.build import build_catalog
    from lorauter.catalog.catalog import Catalog, CatalogTask, RankedAdapter, current_version
    from lorauter.catalog.change import (
        with_adapter,
        with_adapters,
        with_copies,
        with_scores,
        with_shown,
        with_tasks,
        without_adapters,
        without_tasks,
    )
    from lorauter.catalog.versions import (
        catalog_versions,
        change_catalog,
        named_adapters,
        prune_versions,
        publish,
        use_version,
    )

__all__ = [
    "Catalog",
    "CatalogTask",
    "RankedAdapter",
    "build_catalog",
    "catalog_versions",
    "change_catalog",
    "current_version",
    "named_adapters",
    "prune_versions",
    "publish",
    "use_version",
    "with_adapter",
    "with_adapters",
    "with_copies",
    "with_scores",
    "with_shown",
    "with_tasks",
    "without_adapters",
    "without_tasks",
]

_HOMES = {
    "build": {"build_catalog"},
    "catalog": {"Catalog", "CatalogTask", "RankedAdapter", "current_version"},
    "versions": {"catalog_versions", "change_catalog", "named_adapters", "prune_versions", "publish", "use_version"},
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorauter.catalog' has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "change")
    return getattr(import_module(f"lorauter.catalog.{home}"), name)
