"""Has a running service's catalog name adapters, and waits until it does."""

from __future__ import annotations

import time

import httpx

from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import Catalog, with_adapter


def catalog_adapters(url: str, adapters: str, *names: str) -> str:
    """Publish a catalog, beside the store `adapters`, with the newest versions of some, and wait for all replicas.

    Returns:
        The catalog's version.
    """
    catalog, repository = f"{adapters.removesuffix('adapters')}catalog", AdapterRepository(open_store(adapters))
    changed = Catalog.load(catalog)
    for name in names:
        changed = with_adapter(changed, repository.manifest(name))
    changed.save(catalog)
    wait_for_catalog(url, changed.version)
    return changed.version


def wait_for_catalog(url: str, version: str) -> None:
    """Until so many answers in a row are of this version that all replicas have it."""
    deadline = time.monotonic() + 180
    served: list[bool] = []
    with httpx.Client(base_url=url, timeout=120) as client:
        while served[-15:] != [True] * 15:
            assert time.monotonic() < deadline, "the catalog does not take over"
            served.append(client.get("/v1/tasks").json()["catalog_version"] == version)
            time.sleep(0 if served[-1] else 0.1)
