"""Composition: from the tasks near a query to weighted adapters, and the decision that says so.

Knows nothing of embeddings or catalogs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorauter.routing.options import RoutingConfig, RoutingOptions
from lorauter.routing.retrieve import RetrievedTask


@dataclass(frozen=True)
class TaskScore:
    """A task and its cosine similarity to the query."""

    name: str
    score: float


@dataclass(frozen=True)
class AdapterWeight:
    """An adapter and its share in the mixture."""

    name: str
    weight: float


@dataclass(frozen=True)
class RoutingDecision:
    """How a query is to be answered.

    Attributes:
        catalog_version: the catalog that it was decided on; None where adapters were chosen by hand.
        tasks: the nearest tasks, the nearest first.
        adapters: the mixture, the heaviest first; the weights sum to 1. Empty means the base model alone.
    """

    catalog_version: str | None
    tasks: tuple[TaskScore, ...]
    adapters: tuple[AdapterWeight, ...]

    def to_json(self) -> dict[str, Any]:
        """As the HTTP API and the command line show it."""
        return {
            "catalog_version": self.catalog_version,
            "tasks": [vars(task) for task in self.tasks],
            "adapters": [vars(adapter) for adapter in self.adapters],
        }


def compose(
    retrieved: Sequence[RetrievedTask],
    options: RoutingOptions,
    config: RoutingConfig,
    *,
    catalog_version: str,
) -> RoutingDecision:
    """Weigh the best adapters of the nearest tasks.

    The `top_k` nearest tasks that have an adapter lend their best one, with weights softmax(score / temperature)
    (LORAUTER, arXiv 2601.21795, section 3.3). An adapter that serves several of them gets their weights' sum; one
    whose weight underflows to 0 is left out.
    """
    lending = [task for task in retrieved if task.adapters][: options.top_k or config.top_k]
    weights: dict[str, float] = {}
    if lending:
        temperature = options.temperature or config.temperature
        best = max(task.score for task in lending)
        shares = [math.exp((task.score - best) / temperature) for task in lending]
        for task, share in zip(lending, shares, strict=True):
            weights[task.adapters[0]] = weights.get(task.adapters[0], 0.0) + share / sum(shares)
    return RoutingDecision(
        catalog_version,
        tuple(TaskScore(task.name, task.score) for task in retrieved[: config.num_tasks]),
        tuple(AdapterWeight(n, w) for n, w in sorted(weights.items(), key=lambda item: -item[1]) if w),
    )
