"""The words of tasks: how near a text is to each task's examples by TF-IDF over hashed words and word pairs.

Instructions and formats are worded alike within a task, which a sentence embedding blurs. Knows texts; knows
nothing of embeddings, adapters or routing.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BUCKETS = 1 << 15
_MAX_WORDS = 2000  # of a text; what stands at its head tells the task
Grams = NDArray[np.int64]
"""The buckets of a text's words and word pairs, each once."""

_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, eq=False)
class Lexicon:
    """The normalised mean of each task's TF-IDF vectors, sparse.

    Attributes:
        idf: (buckets,) float32.
        starts: (T + 1,) int64, where each task's entries begin.
        buckets, values: (entries,) int32 and float32.
    """

    idf: NDArray[np.float32]
    starts: NDArray[np.int64]
    buckets: NDArray[np.int32]
    values: NDArray[np.float32]

    @classmethod
    def fit(cls, texts: Sequence[Sequence[str]]) -> Lexicon:
        """Of the texts of each task."""
        return cls.fit_grams([[grams_of(text) for text in task] for task in texts])

    @classmethod
    def fit_grams(cls, grams: Sequence[Sequence[Grams]]) -> Lexicon:
        """The same, of texts that were taken apart before."""
        seen = np.zeros(_BUCKETS)
        for task in grams:
            for ids in task:
                seen[ids] += 1
        idf = (np.log((1 + sum(map(len, grams))) / (1 + seen)) + 1).astype(np.float32)
        starts, buckets, values = [0], [], []
        for task in grams:
            total = np.zeros(_BUCKETS, np.float32)
            for ids in task:
                total[ids] += _weights(ids, idf)
            used = np.flatnonzero(total)
            buckets.append(used.astype(np.int32))
            values.append(total[used] / max(float(np.linalg.norm(total)), 1e-12))
            starts.append(starts[-1] + len(used))
        return cls(idf, np.array(starts), np.concatenate(buckets), np.concatenate(values).astype(np.float32))

    def similarity(self, text: str, tasks: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """The cosine of a text to each of these tasks: (len(tasks),) float32."""
        return self.similarity_of_grams(grams_of(text), tasks)

    def similarity_of_grams(self, ids: Grams, tasks: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """The same, of a text that was taken apart before."""
        query = np.zeros(_BUCKETS, np.float32)
        query[ids] = _weights(ids, self.idf)
        spans = [slice(self.starts[task], self.starts[task + 1]) for task in tasks]
        return np.array([query[self.buckets[span]] @ self.values[span] for span in spans], np.float32)


def grams_of(text: str) -> Grams:
    """Take a text apart."""
    words = _WORDS.findall(text.lower(), 0, 64 * _MAX_WORDS)[:_MAX_WORDS]
    grams = {*words, *map(" ".join, pairwise(words))}
    return np.unique(np.fromiter((zlib.crc32(gram.encode()) % _BUCKETS for gram in grams), np.int64, len(grams)))


def _weights(ids: Grams, idf: NDArray[np.float32]) -> NDArray[np.float32]:
    weights = idf[ids]
    return weights / np.float32(max(float(np.linalg.norm(weights)), 1e-12))
