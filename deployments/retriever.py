"""TaskRetriever: the task catalog as a service. Embeddings in, nearest tasks with their adapters out.

A catalog that is published while it serves takes over without a request being lost; see `deployments.live_catalog`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.calls import CatalogDescription, Retrieval
from deployments.live_catalog import LiveCatalog
from deployments.logs import join_serve_logs
from lorauter.adapters import open_store
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.defaults import home
from lorauter.encoder import Embeddings
from lorauter.routing import RoutingConfig, RoutingOptions

_PROBE_S = 600.0  # an encoder may have to be downloaded first


@serve.deployment(
    max_ongoing_requests=256, max_queued_requests=256, ray_actor_options={"num_cpus": 0.1}, health_check_period_s=5
)
class TaskRetriever:
    """Holds the catalog.

    Args:
        catalog: folder or `s3://` URI.
        config: routing settings.
        embedder: handle of QueryEmbedder; a catalog of another encoder is refused.
        refresh_s: seconds between two looks at what is published.
    """

    def __init__(self, catalog: str, config: RoutingConfig, embedder: DeploymentHandle[Any], refresh_s: float) -> None:
        join_serve_logs()

        def probe() -> tuple[Embeddings, str]:
            [vector] = embedder.embed.remote([PROBE_TEXT]).result(timeout_s=_PROBE_S)
            return vector, embedder.name.remote().result(timeout_s=_PROBE_S)

        def load() -> LiveCatalog:
            keep = home() / "catalogs" / f"used-{hashlib.sha256(catalog.encode()).hexdigest()[:16]}"
            return LiveCatalog(open_store(catalog), config, probe, refresh_s=refresh_s, keep=keep)

        with ThreadPoolExecutor(1) as other_thread:  # in this one, a loop runs, and handles cannot be waited for
            self._live = other_thread.submit(load).result()
        self._live.start()

    async def retrieve(self, embeddings: Embeddings, texts: list[str], options: list[RoutingOptions]) -> Retrieval:
        """See `Retriever.retrieve`; one catalog answers all of it."""
        retriever = self._live.retriever
        found = retriever.retrieve(embeddings, texts, options)
        named = {name for one in found for name in one.adapter_names}
        return Retrieval(retriever.catalog.version, found, _of(retriever.catalog.adapters, named))

    async def versions(self, names: list[str]) -> dict[str, str]:
        """Which versions of adapters are served; without those that the catalog does not know."""
        return _of(self._live.retriever.catalog.adapters, names)

    async def check_probe(self, probe: Embeddings, encoder: str) -> None:
        """See `Catalog.check_probe`."""
        self._live.retriever.catalog.check_probe(probe, encoder)

    async def describe(self) -> CatalogDescription:
        """What the catalog holds, and what is published in vain."""
        catalog = self._live.retriever.catalog
        tasks = [
            {
                "id": entry.name,
                "object": "task",
                "domain": entry.task.domain,
                "metric": entry.task.metric,
                "description": entry.task.description,
                "validation_examples": len(entry.task.validation),
                "adapters": [vars(adapter) for adapter in entry.adapters],
            }
            for entry in catalog.tasks
        ]
        return CatalogDescription(catalog.version, tasks, sorted(catalog.adapters), self._live.refused)

    def __del__(self) -> None:
        if live := getattr(self, "_live", None):
            live.close()


def _of(versions: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    return {name: versions[name] for name in names if name in versions}
