"""Retrieval: the catalog's tasks nearest to a query, reranked, and what each adapter is worth for it.

Knows the catalog, its FAISS index, its reranker and its scores; knows nothing of encoders, and does not weigh
adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorauter.catalog.catalog import Catalog, CatalogTask
from lorauter.catalog.rerank import Ranking, softmax
from lorauter.catalog.utility import PRIOR_EXAMPLES, best_score, worths
from lorauter.encoder import Embeddings
from lorauter.errors import InvalidRequest
from lorauter.routing.options import RoutingConfig, RoutingOptions
from lorauter.tasks import Answers

_COSINE_LOGIT = 20.0  # a logit is that many cosines where tasks are not reranked
# Which task's adapters serve an unknown task is told by its words alone: of thirteen similarities that were fitted to
# the scores of tasks that were left out, no other helped.
_KINDRED_LOGIT = 50.0  # a logit is that many cosines of words
_NEIGHBOUR_TEMPERATURE = 0.2  # of the cosines that make a task's examples a query's neighbours
_SELECTED_TASKS = 8  # likeliest tasks whose single examples are looked at
_MAX_ADAPTERS = 64


@dataclass(frozen=True)
class RetrievedTask:
    """A task near a query.

    Attributes:
        score: cosine similarity.
        adapters: that may serve it here, the best first.
        probability: that the query is one of it, if it is one of any.
        answers: its answers, if they are known.
    """

    name: str
    score: float
    adapters: tuple[str, ...]
    probability: float = 0.0
    answers: Answers | None = None


@dataclass(frozen=True)
class AdapterUtility:
    """What an adapter is expected to be worth, as `lorauter.catalog.utility.worths` counts it."""

    name: str
    utility: float


@dataclass(frozen=True)
class Retrieved:
    """What was found for one query.

    Attributes:
        tasks: the likeliest first.
        adapters: those that may be used here, the most useful first; none of no use.
        familiarity: the probability that the query is one of any of the catalog's tasks.
        stranger: whether it is stranger than nearly every query of a task that the catalog lacks.
    """

    tasks: tuple[RetrievedTask, ...] = ()
    adapters: tuple[AdapterUtility, ...] = ()
    familiarity: float = 0.0
    stranger: bool = False

    @property
    def adapter_names(self) -> set[str]:
        """All adapters that are named in it."""
        return {name for task in self.tasks for name in task.adapters} | {adapter.name for adapter in self.adapters}


class Retriever:
    """Searches one catalog."""

    def __init__(self, catalog: Catalog, config: RoutingConfig) -> None:
        self.catalog = catalog
        self.config = config
        self._index = catalog.index
        self._examples = catalog.task_examples
        self._worth = [_worths(entry) for entry in catalog.tasks]
        self._scores = [_matrix(entry) for entry in catalog.tasks] if config.selection == "similar" else []
        self._reranker = catalog.reranker

    def retrieve(
        self, embeddings: Embeddings, texts: Sequence[str], options: Sequence[RoutingOptions]
    ) -> list[Retrieved]:
        """What there is for n queries.

        At least `num_tasks` tasks each, as far as there are; more where it takes more to find `top_k` tasks that
        have an adapter left to lend.

        Args:
            embeddings: (n, d) float32, unit rows.
            texts: n of them.
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
        results = [Retrieved()] * len(options)
        subsets = [option.among(self.catalog) for option in options]
        wanted = [self._wanted(option) for option in options]
        alike: dict[int, list[int]] = {}
        for i, subset in enumerate(subsets):
            alike.setdefault(id(subset), []).append(i)
        for pending in alike.values():
            subset = subsets[pending[0]]
            total, params = (len(self.catalog.tasks), None) if subset is None else (subset.size, subset.search)
            while pending and total:
                depth = min(total, max(wanted[i] + len(options[i].exclude_tasks) for i in pending))
                queries = np.ascontiguousarray(embeddings[pending])
                scores, ids = self._index.search(queries, depth, params=params)
                unfilled = []
                for i, row_scores, row_ids in zip(pending, scores, ids, strict=True):
                    excluded = options[i].exclude_tasks
                    kept = [j for j, t in enumerate(row_ids) if self.catalog.tasks[t].name not in excluded]
                    kept = kept[: wanted[i]]  # as many whatever is excluded and whoever shares the batch
                    results[i] = self._judge(embeddings[i], texts[i], row_ids[kept], row_scores[kept], options[i])
                    if wanted[i] < total and not self._filled(results[i], options[i]):
                        unfilled.append(i)
                        wanted[i] *= 4
                pending = unfilled
        return results

    def _wanted(self, options: RoutingOptions) -> int:
        config = self.config.asked(options)
        return max(config.num_tasks, config.candidates * config.rerank, self._top_k(options))

    def _top_k(self, options: RoutingOptions) -> int:
        return options.top_k or self.config.asked(options).top_k

    def _filled(self, result: Retrieved, options: RoutingOptions) -> bool:
        """Whether the search went deep enough."""
        lending = sum(bool(task.adapters) for task in result.tasks) if self.catalog.adapters else self._top_k(options)
        config = self.config.asked(options)
        if config.composition == "utility":
            lending = max(lending, len(result.adapters))
        return len(result.tasks) >= config.num_tasks and lending >= self._top_k(options)

    def _judge(
        self, embedding: Embeddings, text: str, ids: NDArray[np.int64], scores: Embeddings, options: RoutingOptions
    ) -> Retrieved:
        if not len(ids):
            return Retrieved()
        ranking = self._reranker.rank(embedding, text, ids, scores)
        config = self.config.asked(options)
        logits = ranking.logits if config.rerank else _COSINE_LOGIT * scores.astype(np.float64)
        order = np.argsort(-logits, kind="stable")
        probabilities = softmax(logits)[order]
        own, kindred = (chances[order] for chances in _chances(ranking, logits, config))
        ids, scores = ids[order], scores[order]
        tasks: list[RetrievedTask] = []
        lent = 0
        for task_id, score, probability in zip(ids, scores, probabilities, strict=True):
            entry = self.catalog.tasks[task_id]
            adapters = tuple(adapter.name for adapter in entry.adapters if options.allows(adapter.name))
            if len(tasks) < config.num_tasks or (adapters and lent < self._top_k(options)):
                found = RetrievedTask(entry.name, float(score), adapters, float(probability), entry.task.answers)
                tasks.append(found)
                lent += bool(adapters)
        return Retrieved(
            tuple(tasks),
            self._utilities(embedding, ids, own, kindred, options),
            ranking.familiarity,
            ranking.familiarity < self._reranker.stranger,
        )

    def _utilities(
        self,
        embedding: Embeddings,
        ids: NDArray[np.int64],
        own: NDArray[np.float64],
        kindred: NDArray[np.float64],
        options: RoutingOptions,
    ) -> tuple[AdapterUtility, ...]:
        """Each adapter's worth for a task, times the chance of the task, summed.

        What was composed for a task is of use to that task alone: on unseen ones it does worse than what it is of.
        """
        totals: dict[str, float] = {}
        for place, (task_id, known, chance) in enumerate(zip(ids, own, own + kindred, strict=True)):
            names, worth = self._worth[task_id]
            if self._scores and place < _SELECTED_TASKS and self._scores[task_id] is not None:
                worth = self._worths_nearby(embedding, task_id)
            for name, value in zip(names, worth, strict=True):
                share = known if name in self.catalog.composed else chance
                totals[name] = totals.get(name, 0.0) + float(share) * float(value)
        allowed = [(name, total) for name, total in totals.items() if total > 0 and options.allows(name)]
        allowed.sort(key=lambda item: (-item[1], item[0]))
        return tuple(AdapterUtility(name, total) for name, total in allowed[:_MAX_ADAPTERS])

    def _worths_nearby(self, embedding: Embeddings, task_id: int) -> NDArray[np.float64]:
        """The worths of a task's adapters with more weight on examples that resemble the query.

        Of n examples that an adapter met, each counts by softmax(cosine / temperature) among them, in place of 1 / n.
        """
        values, tried, counts = self._scores[task_id]
        _, worth = self._worth[task_id]
        nearness = np.exp((self._examples[task_id] @ embedding - 1).astype(np.float64) / _NEIGHBOUR_TEMPERATURE)
        mass = tried @ nearness
        nearby = np.divide(values @ nearness, mass, out=np.zeros_like(mass), where=mass > 0)
        share = counts / (counts + PRIOR_EXAMPLES)
        means = np.divide(values.sum(axis=1), counts, out=np.zeros_like(mass), where=counts > 0)
        return np.asarray(worth + share * (nearby - means))


def _chances(
    ranking: Ranking, logits: NDArray[np.float64], config: RoutingConfig
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each candidate, the probability that its adapters are those to use: as the query is one of it, and as it is
    one of a task that the catalog lacks and that is most like it."""
    own = softmax(logits)
    if not config.rerank:
        return own, np.zeros_like(own)
    return ranking.familiarity * own, (1 - ranking.familiarity) * softmax(_KINDRED_LOGIT * ranking.words)


def _worths(entry: CatalogTask) -> tuple[list[str], NDArray[np.float64]]:
    names = [adapter.name for adapter in entry.adapters]
    return names, worths([adapter.score for adapter in entry.adapters], [name in entry.declared for name in names])


def _matrix(entry: CatalogTask) -> Any:
    """Of a task's ranked adapters the scores by example relative to the best score, which were made, and how many;
    None without any."""
    if not entry.scores:
        return None
    values = np.zeros((len(entry.adapters), len(entry.task.validation)))
    tried = np.zeros(values.shape)
    for row, adapter in enumerate(entry.adapters):
        for example, score in entry.scores.get(adapter.name, {}).items():
            values[row, example], tried[row, example] = score, 1
    return values / best_score(adapter.score for adapter in entry.adapters), tried, tried.sum(axis=1)
