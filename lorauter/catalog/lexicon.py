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


class Texts(NamedTuple):
    """The words of n texts, text after text: their `grams`, and whose each is, `of` [0, n)."""

    grams: Grams
    of: NDArray[np.int64]
    n: int

    @classmethod
    def taken_apart(cls, texts: Sequence[str]) -> Texts:
        """All at once: to sort few numbers takes hardly longer than to begin."""
        hashes: list[int] = []
        counts = []
        for text in texts:
            words = list(map(str.encode, _WORDS.findall(text.lower(), 0, 64 * _MAX_WORDS)[:_MAX_WORDS]))
            of_words = list(map(zlib.crc32, words))
            hashes += of_words
            hashes += map(zlib.crc32, map(b" ".__add__, words[1:]), of_words)  # a pair's goes on from its first word's
            counts.append(max(0, 2 * len(words) - 1))
        keys = np.array(hashes, np.int64) % _BUCKETS + (_BUCKETS * np.arange(len(texts))).repeat(counts)
        keys.sort()
        first = np.ones(len(keys), np.bool_)
        np.not_equal(keys[1:], keys[:-1], out=first[1:])
        of, grams = np.divmod(keys[first], _BUCKETS)
        return cls(grams, of, len(texts))

    @classmethod
    def one(cls, grams: Grams) -> Texts:
        """A text that was taken apart."""
        return cls(grams, np.zeros(len(grams), np.int64), 1)


def grams_of(text: str) -> Grams:
    """Take a text apart."""
    return Texts.taken_apart([text]).grams


def idf_of(grams: Iterable[Grams]) -> NDArray[np.float32]:
    """(buckets,): the rarer a word is among these texts, the more it says."""
    seen, texts = np.zeros(_BUCKETS), 0
    for ids in grams:
        seen[ids] += 1
        texts += 1
    return (np.log((1 + texts) / (1 + seen)) + 1).astype(np.float32)


class WordTable:
    """The words of tasks that many texts are compared to: says what `similarities` does of each, in less time.

    Args:
        tasks, idf: as `similarities` takes them.
    """

    def __init__(self, tasks: Sequence[Words], idf: NDArray[np.float32]) -> None:
        buckets, values, owners = _joined(tasks, idf)
        order = np.argsort(buckets, kind="stable")
        self._owners, self._products = owners[order], idf[buckets[order]] * values[order]
        starts = np.searchsorted(buckets[order], np.arange(_BUCKETS + 1))
        self._starts, self._counts = starts[:-1], np.diff(starts)
        self._lengths, self._squares = _lengths(values, owners, len(tasks)), np.square(idf)

    def similarities(self, texts: Texts) -> NDArray[np.float32]:
        """The cosines of n texts to the tasks: (n, len(tasks)); each text's are the same whatever the others are."""
        (grams, of, n), tasks = texts, len(self._lengths)
        starts, counts = self._starts[grams], self._counts[grams]
        ends = counts.cumsum()
        places = np.arange(ends[-1] if len(ends) else 0) + (starts - (ends - counts)).repeat(counts)
        cells = (of * tasks).repeat(counts) + self._owners[places]
        dots = np.bincount(cells, self._products[places], n * tasks).reshape(n, tasks)
        return _cosines(dots, self._lengths, np.sqrt(np.bincount(of, self._squares[grams], n))[:, None])


def similarities(grams: Grams, tasks: Sequence[Words], idf: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosines of a text to tasks: (len(tasks),)."""
    if not tasks:
        return np.zeros(0, np.float32)
    query = np.zeros(len(idf), np.float32)
    query[grams] = idf[grams]
    buckets, values, owners = _joined(tasks, idf)
    dots = np.bincount(owners, query[buckets] * values, len(tasks))
    return _cosines(dots, _lengths(values, owners, len(tasks)), np.linalg.norm(query))


def _joined(
    tasks: Sequence[Words], idf: NDArray[np.float32]
) -> tuple[NDArray[np.uint16], NDArray[np.float32], NDArray[np.int64]]:
    """The words of tasks, one task after the other: buckets, weights, and whose each is."""
    buckets = np.concatenate([words.buckets for words in tasks])
    values = idf[buckets] * np.concatenate([words.weights for words in tasks])
    return buckets, values, np.repeat(np.arange(len(tasks)), [len(words.buckets) for words in tasks])


def _lengths(values: NDArray[np.float32], owners: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return np.sqrt(np.bincount(owners, values * values, count))


def _cosines(dots: NDArray[Any], lengths: NDArray[np.float64], of_texts: Any) -> NDArray[np.float32]:
    return np.asarray(dots / np.maximum(lengths * of_texts, 1e-12), np.float32)
