"""Nearest tasks by cosine: a FAISS index of a kind that fits how many there are, and searches in a part of it.

Up to some thousands of tasks every centroid is compared (`IndexFlatIP`). Beyond, tasks lie in lists around pivots, of
which a search looks into the nearest (`IndexIVFScalarQuantizer` of halves). The pivots are means of some tasks, chosen
by a hash of their names: most tasks may change and move no other, and two who load the same catalog have the same
index. Knows centroids, no texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import faiss
import numpy as np
from numpy.typing import NDArray

from lorauter.catalog.segments import Segment, name_hash
from lorauter.encoder import Embeddings, normalised

MOST_FLAT = 20_000
_LISTS_PER_ROOT = 4  # lists are so many times the root of the tasks
_SHARE = 8  # of the lists, one in so many is looked into
_TRAINED = 8  # tasks to a pivot, that it is fitted to
_STEPS = 2
_Assigned = WeakKeyDictionary[Segment, tuple[bytes, NDArray[np.int64]]]
_assigned: _Assigned = WeakKeyDictionary()  # of each segment that is in use, the pivots and its tasks' lists


class TaskSubset:
    """Some of the tasks, searched as if the others were not there, in time for those alone. Made once for many.

    Args:
        mask: (tasks,) bool: which of them, in the catalog's order.
    """

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self.mask = mask
        self.size = int(mask.sum())
        self._bits = np.packbits(mask, bitorder="little")

    @property
    def selector(self) -> Any:
        """What FAISS takes."""
        return faiss.IDSelectorBitmap(self._bits)  # type: ignore[arg-type,call-arg]


class TaskIndex:
    """An index over all tasks of some segments."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.size = sum(map(len, segments))
        dimension = segments[0].centroids.shape[1]
        self._lists = 0
        self.faiss: Any
        if self.size <= MOST_FLAT:
            self.faiss = faiss.IndexFlatIP(dimension)
            for segment in segments:
                self.faiss.add(segment.centroids)
            return
        self._lists = 1 << int(_LISTS_PER_ROOT * self.size**0.5).bit_length() - 1
        pivots = _pivots(segments, self._lists)
        self._quantizer = faiss.IndexFlatIP(dimension)
        self._quantizer.add(pivots)
        self.faiss = faiss.IndexIVFScalarQuantizer(
            self._quantizer,
            dimension,
            self._lists,
            faiss.ScalarQuantizer.QT_fp16,
            faiss.METRIC_INNER_PRODUCT,
            False,  # not the differences from the pivots
        )
        self.faiss.train(pivots)
        key, start = hashlib.sha256(pivots.tobytes()).digest(), 0
        for segment in segments:
            ids = np.arange(start, start + len(segment), dtype=np.int64)
            lists = _lists_of(segment, pivots, key)
            self.faiss.add_core(len(ids), faiss.swig_ptr(segment.centroids), faiss.swig_ptr(ids), faiss.swig_ptr(lists))
            start += len(segment)

    def search(self, queries: Embeddings, depth: int, subset: TaskSubset | None = None) -> NDArray[np.int64]:
        """The places of the nearest tasks of n queries, the nearest first: (n, depth), -1 where there are no more."""
        depth = min(depth, self.size if subset is None else subset.size)
        queries = np.ascontiguousarray(queries)
        if not depth:
            return np.zeros((len(queries), 0), np.int64)
        if not self._lists:
            params = None if subset is None else faiss.SearchParameters(sel=subset.selector)  # type: ignore[call-arg]
        else:
            # Where fewer are there to be found, they are farther, and what is looked at of a list is less.
            share = self.size / (subset.size if subset else self.size) / _SHARE
            probes = min(self._lists, max(1, round(self._lists * max(share, 4 * depth / self.size))))
            options = {} if subset is None else {"sel": subset.selector}
            params = faiss.SearchParametersIVF(nprobe=probes, **options)  # type: ignore[call-arg]
        ids: NDArray[np.int64] = self.faiss.search(queries, depth, params=params)[1]
        return ids


def _pivots(segments: Sequence[Segment], count: int) -> Embeddings:
    """(count, d): what Lloyd's algorithm makes of the first tasks in two steps, begun at the very first."""
    names = [(name_hash(name), name, segment, i) for segment in segments for i, name in enumerate(segment.names)]
    names.sort(key=lambda item: item[:2])
    some = np.stack([segment.centroids[i] for _, _, segment, i in names[: count * _TRAINED]])
    pivots = some[:count]
    for _ in range(_STEPS):
        sums = pivots * np.float32(1e-3)  # where a pivot is nearest to none
        np.add.at(sums, (some @ pivots.T).argmax(axis=1), some)
        pivots = normalised(sums)
    return pivots


def _lists_of(segment: Segment, pivots: Embeddings, key: bytes) -> NDArray[np.int64]:
    """The nearest pivot of each task; `key` tells pivots from others."""
    known = _assigned.get(segment)
    if known is None or known[0] != key:
        known = _assigned[segment] = key, (segment.centroids @ pivots.T).argmax(axis=1).astype(np.int64)
    return known[1]
