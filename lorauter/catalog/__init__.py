"""The task catalog: built from tasks and adapters, published as one versioned artifact."""

from lorauter.catalog.build import build_catalog
from lorauter.catalog.catalog import Catalog, CatalogTask, RankedAdapter, current_version

__all__ = ["Catalog", "CatalogTask", "RankedAdapter", "build_catalog", "current_version"]
