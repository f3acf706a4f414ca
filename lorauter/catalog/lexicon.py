"""The words of tasks: how near a text is to each task's examples by TF-IDF over hashed words and word pairs.

Instructions and formats are worded alike within a task, which a sentence embedding blurs. What is kept of a task is how
often each word comes in its examples, each of which counts as a unit vector; the words' weights (IDF) come from
outside, and weigh what is kept when it is asked for, so that they may change. Knows texts; knows nothing of
embeddings, adapters or routing.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BUCKETS = 1 << 15
_MAX_WORDS = 2000  # of a text; what stands at its head tells the task
Grams = NDArray[np.int64]
"""The buckets of a text's words and word pairs, each once."""

_WORDS = re.compile(r"\w+|[^\w\s]")


class Words(NamedTuple):
    """A task's words: `buckets` (w,), each once, and their `weights` (w,) float32."""

    buckets: NDArray[np.uint16]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, grams: Sequence[Grams], idf: NDArray[np.float32]) -> Words:
        """Of a task's examples; `idf` tells the length of each."""
        if not sum(map(len, grams)):
            return cls(np.zeros(0, np.uint16), np.zeros(0, np.float32))
        shares = np.concatenate([np.full(len(ids), 1 / np.linalg.norm(idf[ids])) for ids in grams if len(ids)])
        buckets, places = np.unique(np.concatenate(grams), return_inverse=True)
        return cls(buckets.astype(np.uint16), np.bincount(places, shares).astype(np.float32))


def grams_of(text: str) -> Grams:
    """Take a text apart."""
    words = list(map(str.encode, _WORDS.findall(text.lower(), 0, 64 * _MAX_WORDS)[:_MAX_WORDS]))
    grams = {*words, *map(b" ".join, pairwise(words))}
    return np.unique(np.fromiter(map(zlib.crc32, grams), np.int64, len(grams)) % _BUCKETS)


def idf_of(grams: Iterable[Grams]) -> NDArray[np.float32]:
    """(buckets,): the rarer a word is among these texts, the more it says."""
    seen, texts = np.zeros(_BUCKETS), 0
    for ids in grams:
        seen[ids] += 1
        texts += 1
    return (np.log((1 + texts) / (1 + seen)) + 1).astype(np.float32)


class WordTable:
    """The words of tasks that many texts are compared to: says what `similarities` does, in less time.

    Args:
        tasks, idf: as `similarities` takes them.
    """

    def __init__(self, tasks: Sequence[Words], idf: NDArray[np.float32]) -> None:
        buckets, values, owners = _joined(tasks, idf)
        order = np.argsort(buckets, kind="stable")
        self._idf = idf
        self._values, self._owners = values[order], owners[order]
        self._starts = np.searchsorted(buckets[order], np.arange(_BUCKETS + 1))
        self._lengths = _lengths(values, owners, len(tasks))

    def similarities(self, grams: Grams) -> NDArray[np.float32]:
        """The cosines of a text to the tasks: (len(tasks),)."""
        starts, idf = self._starts[grams], self._idf[grams]
        counts = self._starts[grams + 1] - starts
        ends = np.cumsum(counts)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
        products = np.repeat(idf, counts) * self._values[places]
        dots = np.bincount(self._owners[places], products, len(self._lengths))
        return _cosines(dots, self._lengths, idf)


def similarities(grams: Grams, tasks: Sequence[Words], idf: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosines of a text to tasks: (len(tasks),)."""
    if not tasks:
        return np.zeros(0, np.float32)
    query = np.zeros(len(idf), np.float32)
    query[grams] = idf[grams]
    buckets, values, owners = _joined(tasks, idf)
    dots = np.bincount(owners, query[buckets] * values, len(tasks))
    return _cosines(dots, _lengths(values, owners, len(tasks)), query)


def _joined(
    tasks: Sequence[Words], idf: NDArray[np.float32]
) -> tuple[NDArray[np.uint16], NDArray[np.float32], NDArray[np.int64]]:
    """The words of tasks, one task after the other: buckets, weights, and whose each is."""
    buckets = np.concatenate([words.buckets for words in tasks])
    values = idf[buckets] * np.concatenate([words.weights for words in tasks])
    return buckets, values, np.repeat(np.arange(len(tasks)), [len(words.buckets) for words in tasks])


def _lengths(values: NDArray[np.float32], owners: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return np.sqrt(np.bincount(owners, values * values, count))


def _cosines(dots: NDArray[Any], lengths: NDArray[np.float64], query: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(dots / np.maximum(lengths * np.linalg.norm(query), 1e-12), np.float32)
