"""How good each adapter is at each task, from few and noisy scores. Knows no adapters' weights and no queries.

An adapter's score on a task is its mean over the examples that it was tried on, shrunk towards what tasks of similar
inputs say of it: with n examples, mean m and the similar tasks' weighted mean p, (n m + k p) / (n + k).

Of forty adapters with twenty scores each, the luckiest beats the best: what an adapter is worth for a task therefore
counts for more where it was made for that task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lorauter.encoder import Embeddings

Scores = Mapping[str, Mapping[int, float]]
"""Of one task: `{adapter: {example: score}}`."""

PRIOR_EXAMPLES = 4.0
_SIMILARITY_TEMPERATURE = 0.05
_DECLARED = 0.5  # of the best score; chosen on four splits of the validation examples (0.3 to 1 do as well)
COMPOSED = 0.5
"""By how much what was composed for a task is worth more than the others that it was held against."""

_LEAST_BEST = 0.05  # a task's best score counts as no less: else noise would look like skill
_BLOCK = 256  # tasks compared with all others at once


def shrunken_scores(scores: Sequence[Scores], adapters: Sequence[str], centroids: Embeddings) -> NDArray[np.float64]:
    """The scores of T tasks.

    Args:
        scores: of each task.
        adapters: the columns.
        centroids: (T, d), the tasks' representations.

    Returns:
        (T, len(adapters)); NaN where an adapter was not tried.
    """
    column = {name: i for i, name in enumerate(adapters)}
    counts, sums = np.zeros((len(scores), len(adapters))), np.zeros((len(scores), len(adapters)))
    for row, task in enumerate(scores):
        for name, values in task.items():
            if name in column and values:
                counts[row, column[name]] = len(values)
                sums[row, column[name]] = sum(values.values())
    tried = counts > 0
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=tried)
    prior = means.copy()
    scored = np.flatnonzero(tried.any(axis=1))
    for rows in np.array_split(scored, max(1, len(scored) // _BLOCK)):
        nearness = np.exp((centroids[rows] @ centroids[scored].T - 1).astype(np.float64) / _SIMILARITY_TEMPERATURE)
        nearness[rows[:, None] == scored] = 0
        mass = nearness @ tried[scored]
        prior[rows] = np.divide(nearness @ means[scored], mass, out=means[rows], where=mass > 1e-12)
    shrunken = (counts * means + PRIOR_EXAMPLES * prior) / (counts + PRIOR_EXAMPLES)
    return np.where(tried, shrunken, np.nan)


def worths(scores: Sequence[float | None], declared: Sequence[bool]) -> NDArray[np.float64]:
    """What the adapters of one task are worth for it.

    Args:
        scores: of each, as `shrunken_scores` gives them; None where it was not tried.
        declared: whether each was made for the task.

    Returns:
        The scores relative to the best, and half as much again for an adapter that was made for the task; such a one
        counts as the best until it is tried. Where there are no scores, 1, 1/2, 1/4 and so on.
    """
    if all(score is None for score in scores):
        return np.asarray(0.5 ** np.arange(len(scores), dtype=np.float64))
    best = best_score(scores)
    relative = np.array([1.0 if score is None else score / best for score in scores])
    return np.asarray(relative + _DECLARED * np.asarray(declared, np.float64))


def best_score(scores: Iterable[float | None]) -> float:
    """The best of one task's scores, or what it counts as at least."""
    return max((score for score in scores if score is not None and score > _LEAST_BEST), default=_LEAST_BEST)
