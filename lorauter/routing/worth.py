"""What tasks' adapters are worth for queries, for many at once: their worths for a task, times the chance of the task,
summed.

Knows segments and scores; knows nothing of who may use what, nor of how likely a task is.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorauter.catalog.catalog import CatalogTask
from lorauter.catalog.segments import Segment
from lorauter.catalog.shown import ShownExamples
from lorauter.catalog.utility import COMPOSED, PRIOR_EXAMPLES, best_score, worths
from lorauter.encoder import Embeddings
from lorauter.tasks import Answers

_OWN = 0.5  # how much more what was made for a task is worth where a query is of it: scores are few, and noisy
_NEIGHBOUR_TEMPERATURE = 0.2  # of the cosines that make a task's examples a query's neighbours

Floats = NDArray[np.float64]


class KnownTask(NamedTuple):
    """A task's name, its adapters, their worths and what they are worth more for a query that is of it; its answers, if
    they are known; the adapters that were made for it, and what its examples do, as a segment has them."""

    task: str
    names: tuple[str, ...]
    worth: tuple[float, ...]
    more: tuple[float, ...]
    answers: Answers | None
    declared: tuple[str, ...]
    shown: ShownExamples | None

    @classmethod
    def of(cls, segment: Segment, i: int, composed: Container[str]) -> KnownTask:
        """What was composed for a task has beaten the others that it ranks before, and takes nothing from them."""
        adapters, declared = segment.ranked(i)
        names = tuple(adapter.name for adapter in adapters)
        others = [i for i, name in enumerate(names) if name not in composed]
        found = worths([adapters[i].score for i in others], [declared[i] for i in others])
        best, first = found.max(initial=1.0), min(others, default=len(names))
        worth = np.where(np.arange(len(names)) < first, best + COMPOSED, best / 2)
        worth[others] = found
        more = np.where(np.arange(len(names)) < first, _OWN, 0.0)
        more[others] = [_OWN * declared[i] for i in others]
        return cls(
            segment.names[i],
            names,
            tuple(worth.tolist()),
            tuple(more.tolist()),
            segment.answers(i),
            segment.declared(i),
            segment.shown(i),
        )


class Worths:
    """The worths of some tasks' adapters.

    What was composed for a task is of use to that task alone: on unseen ones it does worse than what it is of.

    Attributes:
        places: of the tasks in their catalog.
        tasks: what is known of each.
        names: of their adapters, in their order.
    """

    def __init__(self, places: Sequence[int], tasks: Sequence[KnownTask], composed: Container[str]) -> None:
        self.places, self.tasks = places, tasks
        self.names = sorted({name for of in tasks for name in of.names})
        column = {name: i for i, name in enumerate(self.names)}
        self._columns = np.array([column[name] for of in tasks for name in of.names], np.int64)
        counts = [len(of.names) for of in tasks]
        self._rows, self._ends = np.repeat(np.arange(len(tasks)), counts), np.cumsum(counts).tolist()
        worth = np.array([value for of in tasks for value in of.worth])
        self._if_own = worth + [value for of in tasks for value in of.more]
        self._serves_others = np.array([name not in composed for of in tasks for name in of.names], np.bool_)
        self._if_kindred = worth * self._serves_others

    def expected(self, own: Floats, kindred: Floats) -> Floats:
        """(n, names): what each adapter is worth for n queries.

        Args:
            own: (n, tasks), the chance of each task, that a query is of it.
            kindred: the same that it is of another, to which this one is the most alike.
        """
        each = own[:, self._rows] * self._if_own + kindred[:, self._rows] * self._if_kindred
        cells = np.arange(len(own))[:, None] * len(self.names) + self._columns
        found = np.bincount(cells.ravel(), each.ravel(), len(own) * len(self.names))
        return found.astype(np.float64, copy=False).reshape(len(own), len(self.names))

    def correct(self, expected: Floats, task: int, own: float, kindred: float, by: Floats) -> None:
        """Of one query: a task's adapters are worth so much more for it, in their order there, than for others."""
        span = slice(self._ends[task] - len(by), self._ends[task])
        expected[self._columns[span]] += (own + kindred * self._serves_others[span]) * by


class Scored(NamedTuple):
    """Of a task's ranked adapters the scores by example relative to the best score, which were made, and how many."""

    values: Floats
    tried: Floats
    counts: Floats

    @classmethod
    def of(cls, entry: CatalogTask) -> Scored | None:
        """None without any."""
        if not entry.scores:
            return None
        values = np.zeros((len(entry.adapters), len(entry.task.validation)))
        tried = np.zeros(values.shape)
        for row, adapter in enumerate(entry.adapters):
            for example, score in entry.scores.get(adapter.name, {}).items():
                values[row, example], tried[row, example] = score, 1
        return cls(values / best_score(adapter.score for adapter in entry.adapters), tried, tried.sum(axis=1))

    def nearby(self, examples: Embeddings, embedding: Embeddings) -> Floats:
        """By how much adapters are worth more with more weight on examples that resemble the query.

        Of n examples that an adapter met, each counts by softmax(cosine / temperature) among them, in place of 1 / n.
        """
        nearness = np.exp((examples @ embedding - 1).astype(np.float64) / _NEIGHBOUR_TEMPERATURE)
        mass = self.tried @ nearness
        nearby = np.divide(self.values @ nearness, mass, out=np.zeros_like(mass), where=mass > 0)
        share = self.counts / (self.counts + PRIOR_EXAMPLES)
        means = np.divide(self.values.sum(axis=1), self.counts, out=np.zeros_like(mass), where=self.counts > 0)
        return np.asarray(share * (nearby - means))
