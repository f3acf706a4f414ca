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
from typing import NamedTuple

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
    words = _WORDS.findall(text.lower(), 0, 64 * _MAX_WORDS)[:_MAX_WORDS]
    grams = {*words, *map(" ".join, pairwise(words))}
    return np.unique(np.fromiter((zlib.crc32(gram.encode()) % _BUCKETS for gram in grams), np.int64, len(grams)))


def idf_of(grams: Iterable[Grams]) -> NDArray[np.float32]:
    """(buckets,): the rarer a word is among these texts, the more it says."""
    seen, texts = np.zeros(_BUCKETS), 0
    for ids in grams:
        seen[ids] += 1
        texts += 1
    return (np.log((1 + texts) / (1 + seen)) + 1).astype(np.float32)


def similarities(grams: Grams, tasks: Sequence[Words], idf: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosines of a text to tasks: (len(tasks),)."""
    if not tasks:
        return np.zeros(0, np.float32)
    query = np.zeros(len(idf), np.float32)
    query[grams] = idf[grams]
    buckets = np.concatenate([words.buckets for words in tasks])
    values = idf[buckets] * np.concatenate([words.weights for words in tasks])
    owner = np.repeat(np.arange(len(tasks)), [len(words.buckets) for words in tasks])
    dots = np.bincount(owner, query[buckets] * values, len(tasks))
    lengths = np.sqrt(np.bincount(owner, values * values, len(tasks))) * np.linalg.norm(query)
    return np.asarray(dots / np.maximum(lengths, 1e-12), np.float32)
