"""AdapterListing: in TaskRetriever's place where there is no catalog. Every adapter of the store is served by its name.

Somebody has to say which version of an adapter is served. Without a catalog it is this, by the store's listing when it
starts and every few seconds after: for the whole service, whatever is asked of it. While the store is down, what it
listed last stands.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

from ray import serve

from deployments.calls import CatalogDescription
from deployments.logs import join_serve_logs
from deployments.replicas import ReplicaServer, by_name
from deployments.startup import tells_why
from lorauter.adapters import AdapterRepository, open_store
from lorauter.errors import InvalidRequest

logger = logging.getLogger("lorauter.listing")


class LiveListing:
    """The newest version of every adapter.

    Args:
        repository: the store's adapters.
        refresh_s: seconds between two listings.

    Raises:
        StoreError, AdapterUnavailable: the store cannot be listed.
    """

    def __init__(self, repository: AdapterRepository, *, refresh_s: float) -> None:
        self._repository = repository
        self._refresh_s = refresh_s
        self._stop = threading.Event()
        self.versions = repository.newest()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="adapter-listing")

    def start(self) -> None:
        """List the store from now on."""
        self._thread.start()

    def close(self) -> None:
        """List no more."""
        self._stop.set()

    def look(self) -> None:
        """List the store once. Raises nothing."""
        try:
            self.versions = self._repository.newest()
        except Exception as error:  # noqa: BLE001 (whatever is wrong with the store, what is served must stay)
            logger.warning("the adapters cannot be listed, those known stay: %s", error)

    def _watch(self) -> None:
        while not self._stop.wait(self._refresh_s):
            self.look()


@serve.deployment(name="TaskRetriever", max_ongoing_requests=256, max_queued_requests=1000, health_check_period_s=5)
@tells_why
class AdapterListing:
    """What the ingress asks of a catalog, as far as there is an answer without one.

    Args:
        adapters: the store: folder or `s3://` URI.
        refresh_s: seconds between two listings of it.
    """

    async def __init__(self, adapters: str, refresh_s: float) -> None:  # type: ignore[misc]  # Serve awaits it
        join_serve_logs()
        repository = AdapterRepository(open_store(adapters))
        self._live = await asyncio.to_thread(LiveListing, repository, refresh_s=refresh_s)
        self._live.start()
        asked = (self.decide, self.versions, self.check_probe, self.describe, self.examples, self.layout, self.history)
        self._server = ReplicaServer("TaskRetriever", by_name(*asked))

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Serve's hook: where the ingress calls this replica."""
        return await self._server.metadata()

    async def versions(self, names: Sequence[str]) -> dict[str, str]:
        """Which versions of adapters are served; without those that the store lacks."""
        versions = self._live.versions
        return {name: versions[name] for name in names if name in versions}

    async def decide(self, *_: Any) -> None:
        """There are no tasks. Raises InvalidRequest."""
        raise InvalidRequest(
            "nothing can be routed, as no catalog is configured; name an adapter as the model, see GET /v1/models",
            param="model",
        )

    async def check_probe(self, *_: Any) -> None:
        """Any encoder will do."""

    async def describe(self) -> CatalogDescription:
        """The adapters."""
        return CatalogDescription("none", [], sorted(self._live.versions))

    async def examples(self, *_: Any) -> dict[str, Any]:
        """There are no tasks."""
        return {}

    async def layout(self, *_: Any) -> dict[str, Any]:
        """The same."""
        projection: dict[str, list[Any]] = {"mean": [], "components": []}
        return {"object": "list", "catalog_version": "none", "data": [], "total": 0, "projection": projection}

    async def history(self, *_: Any) -> dict[str, Any]:
        """There are no versions."""
        return {"object": "list", "data": [], "total": 0, "has_more": False}

    def __del__(self) -> None:
        if live := getattr(self, "_live", None):
            live.close()
