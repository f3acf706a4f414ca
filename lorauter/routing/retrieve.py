"""Retrieval: the catalog's tasks nearest to a query's embedding, each with the adapters it may lend.

Knows the catalog and its FAISS index; knows nothing of encoders, and does not weigh adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorauter.catalog.catalog import Catalog
from lorauter.encoder import Embeddings
from lorauter.errors import InvalidRequest
from lorauter.routing.options import RoutingConfig, RoutingOptions


@dataclass(frozen=True)
class RetrievedTask:
    """A task near a query: its cosine similarity, and the adapters that may serve it here, the best first."""

    name: str
    score: float
    adapters: tuple[str, ...]


class Retriever:
    """Searches one catalog."""

    def __init__(self, catalog: Catalog, config: RoutingConfig) -> None:
        self.catalog = catalog
        self._config = config
        self._index = catalog.index

    def retrieve(self, embeddings: Embeddings, options: Sequence[RoutingOptions]) -> list[tuple[RetrievedTask, ...]]:
        """The nearest tasks of n queries, the nearest first.

        At least `num_tasks` each, as far as there are; more where it takes more to find `top_k` tasks that have
        an adapter left to lend.

        Args:
            embeddings: (n, d) float32, unit rows.
            options: n of them.

        Raises:
            InvalidRequest: the embeddings have another dimension than the catalog, or NaN.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.catalog.dimension:
            raise InvalidRequest(
                f"embeddings of shape {embeddings.shape} do not fit the catalog's dimension {self.catalog.dimension}"
            )
        if not np.isfinite(embeddings).all():
            raise InvalidRequest("the embeddings hold NaN or infinity")
        total = len(self.catalog.tasks)
        excluded = max((len(option.exclude_tasks) for option in options), default=0)
        depth = min(total, max(self._config.num_tasks, *(self._top_k(o) for o in options)) + excluded) if options else 0
        results: list[tuple[RetrievedTask, ...]] = [()] * len(options)
        pending = list(range(len(options)))
        while pending:
            scores, ids = self._index.search(np.ascontiguousarray(embeddings[pending]), depth)
            unfilled = []
            for i, row_scores, row_ids in zip(pending, scores, ids, strict=True):
                results[i], filled = self._collect(row_scores, row_ids, options[i])
                if not filled and depth < total:
                    unfilled.append(i)
            pending, depth = unfilled, min(total, 4 * depth)
        return results

    def _top_k(self, options: RoutingOptions) -> int:
        return options.top_k or self._config.top_k

    def _collect(
        self, scores: Embeddings, ids: Embeddings, options: RoutingOptions
    ) -> tuple[tuple[RetrievedTask, ...], bool]:
        """The tasks that count for one query, and whether the search went deep enough."""
        found: list[RetrievedTask] = []
        wanted = self._top_k(options) if self.catalog.adapters else 0
        for score, task_id in zip(scores, ids, strict=True):
            entry = self.catalog.tasks[int(task_id)]
            if entry.name in options.exclude_tasks:
                continue
            adapters = tuple(adapter.name for adapter in entry.adapters if options.allows(adapter.name))
            wanted -= bool(adapters)
            if len(found) < self._config.num_tasks or adapters:
                found.append(RetrievedTask(entry.name, float(score), adapters))
            if len(found) >= self._config.num_tasks and wanted <= 0:
                return tuple(found), True
        return tuple(found), False
