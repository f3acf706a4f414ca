"""How good each adapter is at each task, from few and noisy scores. Knows no adapters' weights and no queries.

An adapter's score on a task is its mean over the examples that it was tried on, shrunk towards what tasks of similar
inputs say of it: with n examples, mean m and the similar tasks' weighted mean p, (n m + k p) / (n + k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lorauter.encoder import Embeddings

Scores = Mapping[str, Mapping[int, float]]
"""Of one task: `{adapter: {example: score}}`."""

PRIOR_EXAMPLES = 4.0
_SIMILARITY_TEMPERATURE = 0.05
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
