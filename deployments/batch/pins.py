"""What a job is pinned to as it begins: a version of the catalog, and by it a version of every adapter.

The job goes on with these whatever is published meanwhile. What is deleted meanwhile it misses, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployments.batch.config import BatchConfig
from lorauter.adapters import open_store
from lorauter.catalog import current_version
from lorauter.catalog.catalog import HEAD_FILE, read_adapters
from lorauter.errors import ConfigError, ObjectNotFound


def pin(config: BatchConfig) -> dict[str, Any]:
    """The pins of a job that begins now, as its manifest has them: `{"uri", "version", "adapters": {name: version}}`.

    Raises:
        ConfigError, CatalogError: there is no catalog, or it is damaged.
        StoreError: it cannot be reached.
    """
    version = current_version(config.catalog)
    if version is None:
        raise ConfigError(f"there is no catalog at {config.catalog}", setting="catalog")
    pins = {"uri": config.catalog, "version": version}
    check_pins(pins)
    return {**pins, "adapters": read_adapters(open_store(config.catalog), version)}


def check_pins(pins: Mapping[str, Any]) -> None:
    """Raise ConfigError where the version of the catalog was deleted, as may be since a job has begun."""
    try:
        open_store(pins["uri"]).fingerprint(f"{pins['version']}/{HEAD_FILE}")
    except ObjectNotFound as error:
        raise ConfigError(
            f"the job is pinned to version {pins['version']} of the catalog {pins['uri']}, which is not there any more "
            "('lorauter catalog prune' deletes old ones); publish the same catalog again to finish the job, or choose "
            "another output to begin anew",
            setting="catalog",
        ) from error
