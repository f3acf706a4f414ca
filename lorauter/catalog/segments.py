"""Segments: a catalog's tasks in runs of some hundreds, each of which is stored as two parts.

A task that changes rewrites its segment and no other. Where one segment ends and the next begins follows from the
tasks' names alone (content-defined chunking), so a catalog that was changed is cut as one that was built anew. The part
`routing` is held in memory: names, rankings, centroids, words, mean states. The part `examples` is read when it is
asked for: validation examples with their embeddings and states, scores by example. A catalog's segments have states, or
none has. Knows nothing of how they come about.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lorauter.catalog.lexicon import Grams, Words, grams_of, idf_of
from lorauter.catalog.parts import Arrays, Parts, digest_of, pack, text_in, texts_of
from lorauter.catalog.shown import ShownExamples
from lorauter.catalog.whitening import States, mean_state
from lorauter.encoder import Embeddings, normalised
from lorauter.tasks import Answers, Task

_LEAST = 256  # names in a segment, but for the last one
_MEAN = 256  # more than that
Row = TypeVar("Row")


@dataclass(frozen=True)
class RankedAdapter:
    """An adapter that serves a task. `score` is that of `lorauter.catalog.utility`, if it was tried on the task."""

    name: str
    score: float | None = None


@dataclass(frozen=True)
class CatalogTask:
    """A task, and the adapters that serve it, the best first.

    Attributes:
        scores: `{adapter: {validation example: score}}`, of all that were tried on it.
        declared: adapters that were made for it, by their name or a mapping.
        shown: what its examples do before a query, if that was found out.
    """

    task: Task
    adapters: tuple[RankedAdapter, ...]
    scores: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    declared: tuple[str, ...] = ()
    shown: ShownExamples | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name


@dataclass(frozen=True)
class TaskEntry:
    """What routing and listings need to know of a task: all but its examples, of which it says how many there are."""

    name: str
    domain: str
    metric: str
    description: str
    examples: int
    answers: Answers | None
    adapters: tuple[RankedAdapter, ...]
    declared: tuple[str, ...]
    shown: ShownExamples | None


class Examples(NamedTuple):
    """A task's n validation inputs: `embeddings` (n, d) float32, unit rows, their words, and their states, if the
    catalog has any."""

    embeddings: Embeddings
    grams: tuple[Grams, ...]
    states: States | None = None

    @classmethod
    def of(cls, task: Task, embeddings: Embeddings, states: States | None = None) -> Examples:
        """Those of a task, which are embedded."""
        return cls(embeddings, tuple(grams_of(example.input) for example in task.validation), states)


class TaskRow(NamedTuple):
    """A task with all that a segment stores of it."""

    entry: CatalogTask
    examples: Examples


class Segment:
    """Some tasks of a catalog, in their order; never changed.

    Args:
        routing: the part of that name.
        digests: of the two parts.
        examples: gives the other part, each time that it is asked for.
        source: for messages.
    """

    def __init__(
        self, routing: Arrays, digests: tuple[str, str], examples: Callable[[], Arrays], source: str = "a catalog"
    ) -> None:
        self.digests = digests
        self._routing = routing
        self._examples = examples
        self._source = source
        self.centroids: Embeddings = routing["centroids"]
        self.lengths: NDArray[np.float32] = routing["lengths"]
        self.task_digests: NDArray[np.uint64] = routing["digests"]
        self.sizes: NDArray[np.int64] = routing["sizes"]
        self.states: States | None = routing.get("states")
        self.names: tuple[str, ...] = tuple(text_in(routing, 0))
        self.adapters: tuple[str, ...] = tuple(text_in(routing, 1))
        arrays = (self.centroids, self.lengths, self.sizes, self.task_digests, self.states)
        lengths = {len(self.names), *(len(array) for array in arrays if array is not None)}
        if len(lengths) != 1 or not self.names:
            raise ValueError("its arrays are of different tasks")

    @classmethod
    def of(cls, rows: Sequence[TaskRow]) -> Segment:
        """Make one; the same rows make the same bytes."""
        entries = [row.entry for row in rows]
        names = sorted({name for e in entries for name in (*(a.name for a in e.adapters), *e.declared, *e.scores)})
        place = {name: i for i, name in enumerate(names)}
        embeddings = [row.examples.embeddings for row in rows]
        grams = [ids for row in rows for ids in row.examples.grams]
        idf = idf_of(grams)
        words = [Words.of(row.examples.grams, idf) for row in rows]
        means = np.stack([of.mean(axis=0) for of in embeddings])
        ranked = [[place[adapter.name] for adapter in entry.adapters] for entry in entries]
        scores = [[np.nan if a.score is None else a.score for a in entry.adapters] for entry in entries]
        told, kept = [_told(entry) for entry in entries], [_kept(entry) for entry in entries]
        routing = {
            **texts_of([[entry.name for entry in entries], names, *told]),
            "centroids": normalised(means),
            "lengths": np.linalg.norm(means, axis=1).astype(np.float32),
            "sizes": np.array(list(map(len, embeddings)), np.int64),
            "ranked": np.array(list(chain(*ranked)), np.int32),
            "ranked_ends": np.cumsum([len(of) for of in ranked], dtype=np.int64),
            "declared": np.array([a.name in e.declared for e in entries for a in e.adapters], np.bool_),
            "scores": np.array(list(chain(*scores)), np.float64),
            "buckets": np.concatenate([of.buckets for of in words]),
            "weights": np.concatenate([of.weights for of in words]),
            "words_ends": np.cumsum([len(of.buckets) for of in words], dtype=np.int64),
            "digests": np.array([_digest(row.entry, row.examples) for row in rows], np.uint64),
        }
        examples = {
            **texts_of(kept),
            "embeddings": np.concatenate(embeddings),
            "grams": np.concatenate(grams).astype(np.uint16),
            "grams_ends": np.cumsum(list(map(len, grams)), dtype=np.int64),
        }
        states = [row.examples.states for row in rows if row.examples.states is not None]
        if states:
            routing["states"] = np.stack([mean_state(of) for of in states])
            examples["states"] = np.concatenate(states)
        packed = pack(routing), pack(examples)
        return cls(routing, (digest_of(packed[0]), digest_of(packed[1])), lambda: examples)

    @classmethod
    def stored(cls, routing: Arrays, digests: tuple[str, str], parts: Parts) -> Segment:
        """One of a store, whose other part is read from there. Raises ValueError, KeyError, TypeError: it is none."""
        return cls(routing, digests, lambda: parts.read(digests[1]), parts.store.uri)

    def __len__(self) -> int:
        return len(self.names)

    def packed(self, *, but: Collection[str] = ()) -> Iterator[bytes]:
        """The two parts as files, but some. Raises CatalogError, StoreError where one has to be read for it."""
        if self.digests[0] not in but:
            yield pack(self._routing)
        if self.digests[1] not in but:
            yield pack(self._examples())

    def read(self, *, keep: bool = False) -> None:
        """Read the examples, to verify them or to hold them from now on. Raises CatalogError, StoreError."""
        examples = self._examples()
        if keep:
            self._examples = lambda: examples

    def ranked(self, i: int) -> tuple[tuple[RankedAdapter, ...], list[bool]]:
        """The adapters that serve a task, the best first, and which of them were made for it."""
        span = _span(self._routing["ranked_ends"], i)
        places, scores = self._routing["ranked"][span].tolist(), self._routing["scores"][span].tolist()
        adapters = (
            RankedAdapter(self.adapters[place], None if math.isnan(score) else score)
            for place, score in zip(places, scores, strict=True)
        )
        return tuple(adapters), self._routing["declared"][span].tolist()

    def answers(self, i: int) -> Answers | None:
        """A task's answers, if they are known."""
        answers = text_in(self._routing, i + 2)["answers"]
        return tuple(answers) if isinstance(answers, list) else answers

    def declared(self, i: int) -> tuple[str, ...]:
        """The adapters that were made for a task, those that it does not rank among them."""
        return tuple(text_in(self._routing, i + 2)["declared"])

    def shown(self, i: int) -> ShownExamples | None:
        """What a task's examples do before a query, if that was found out."""
        shown = text_in(self._routing, i + 2).get("shown")
        return None if shown is None else ShownExamples.from_json(shown)

    def words(self, i: int) -> Words:
        """A task's words."""
        span = _span(self._routing["words_ends"], i)
        return Words(self._routing["buckets"][span], self._routing["weights"][span])

    def entry(self, i: int) -> TaskEntry:
        """A task without its examples."""
        told = text_in(self._routing, i + 2)
        return TaskEntry(
            self.names[i],
            told["domain"],
            told["metric"],
            told["description"],
            int(self.sizes[i]),
            self.answers(i),
            self.ranked(i)[0],
            self.declared(i),
            self.shown(i),
        )

    def task(self, i: int) -> CatalogTask:
        """A task with its examples. Raises CatalogError, StoreError: they cannot be read."""
        entry, kept, told = self.entry(i), text_in(self._examples(), i), text_in(self._routing, i + 2)
        task = Task.from_json({**told, **kept, "name": entry.name, "answers": None}, source=self._source)
        return CatalogTask(
            replace(task, answers=entry.answers),  # which were held against its examples when it came
            entry.adapters,
            {name: {int(example): s for example, s in of.items()} for name, of in kept["scores"].items()},
            entry.declared,
            entry.shown,
        )

    def examples(self, i: int) -> Examples:
        """A task's validation inputs. Raises as `task`."""
        part, span = self._examples(), _span(self._ends, i)
        ends, grams = part["grams_ends"], part["grams"]
        return Examples(
            part["embeddings"][span],
            tuple(grams[_span(ends, n)].astype(np.int64) for n in range(span.start, span.stop)),
            part["states"][span] if "states" in part else None,
        )

    def row(self, i: int) -> TaskRow:
        """All of a task. Raises as `task`."""
        return TaskRow(self.task(i), self.examples(i))

    def served_by(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(tasks,): which of them any of some adapters serves; `allowed` goes by places in `adapters`."""
        ends = self._routing["ranked_ends"]
        counts = np.concatenate([[0], np.cumsum(allowed[self._routing["ranked"]])])
        return np.asarray(counts[ends] > counts[np.concatenate([[0], ends[:-1]])])

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.sizes)


class Rows(Sequence[Row]):
    """Something of each of a catalog's tasks, made when it is asked for.

    Args:
        size: how many tasks there are.
        at: the segment that has a task, and where.
        make: gives it.
    """

    def __init__(
        self, size: int, at: Callable[[int], tuple[Segment, int]], make: Callable[[Segment, int], Row]
    ) -> None:
        self._size = size
        self._at = at
        self._make = make

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, place: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(place, slice):
            return tuple(self[i] for i in range(*place.indices(self._size)))
        if not -self._size <= place < self._size:
            raise IndexError(place)
        return self._make(*self._at(int(place) % self._size))


def runs(names: Sequence[str], *, least: int | None = None, mean: int | None = None) -> list[tuple[int, int]]:
    """Where to cut sorted names: (start, end) of each run, by the names alone and hardly by those far away."""
    least, mean = least or _LEAST, mean or _MEAN
    cuts = [0]
    for i, name in enumerate(names):
        if i + 1 - cuts[-1] >= least and name_hash(name) % mean == 0:
            cuts.append(i + 1)
    if cuts[-1] != len(names):
        cuts.append(len(names))
    return list(pairwise(cuts))


def name_hash(name: str) -> int:
    """A number that says nothing of a name, in [0, 2^64)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _span(ends: NDArray[np.int64], i: int) -> slice:
    return slice(int(ends[i - 1]) if i else 0, int(ends[i]))


def _told(entry: CatalogTask) -> dict[str, Any]:
    task = entry.task.to_json()
    return {
        **{key: task[key] for key in ("domain", "metric", "description")},
        "answers": task.get("answers"),
        "declared": list(entry.declared),
        **({} if entry.shown is None else {"shown": entry.shown.to_json()}),
    }


def _kept(entry: CatalogTask) -> dict[str, Any]:
    task = entry.task.to_json()
    scores = {name: {str(i): score for i, score in sorted(of.items())} for name, of in entry.scores.items()}
    return {"validation": task["validation"], "test": task["test"], "scores": scores}


def _digest(entry: CatalogTask, examples: Examples) -> int:
    content = hashlib.sha256(json.dumps([_told(entry), _kept(entry)], sort_keys=True).encode())
    content.update(repr([(adapter.name, adapter.score) for adapter in entry.adapters]).encode())
    content.update(np.ascontiguousarray(examples.embeddings).tobytes())
    if examples.states is not None:
        content.update(np.ascontiguousarray(examples.states).tobytes())
    return int.from_bytes(content.digest()[:8], "big")
