"""TaskRetriever: the task catalog as a service. Embeddings in, nearest tasks with their adapters out."""

from __future__ import annotations

from ray import serve

from deployments.calls import CatalogDescription, Retrieval
from deployments.logs import join_serve_logs
from deployments.scope import within_scope
from lorauter.catalog import Catalog
from lorauter.encoder import Embeddings
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.1}, health_check_period_s=5)
class TaskRetriever:
    """Holds the catalog.

    Args:
        catalog: folder or `s3://` URI.
        config: routing settings.
    """

    def __init__(self, catalog: str, config: RoutingConfig) -> None:
        join_serve_logs()
        self._retriever = Retriever(Catalog.load(catalog), config)

    async def retrieve(self, embeddings: Embeddings, texts: list[str], options: list[RoutingOptions]) -> Retrieval:
        """See `Retriever.retrieve`."""
        options = [within_scope(self._retriever.catalog, option) for option in options]
        found = self._retriever.retrieve(embeddings, texts, options)
        return Retrieval(self._retriever.catalog.version, found)

    async def check_probe(self, probe: Embeddings, encoder: str) -> None:
        """See `Catalog.check_probe`."""
        self._retriever.catalog.check_probe(probe, encoder)

    async def describe(self) -> CatalogDescription:
        """What the catalog holds."""
        catalog = self._retriever.catalog
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
        return CatalogDescription(catalog.version, tasks, sorted(catalog.adapters))
