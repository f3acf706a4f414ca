"""The catalog: an immutable, versioned artifact that tells tasks apart and which adapters serve them.

Below the root of a store:

    CURRENT                     the version that readers take
    <version>/catalog.json      identities, what was fitted, and of which parts it is made
    parts/<sha256>              segments of tasks (`lorauter.catalog.segments`) and of adapters, and what they share

The version is the hash of `catalog.json`, which has the hashes of the parts, and so of everything. Versions share the
parts in which they do not differ: a change writes the segment that it changes, and readers that have another version
read no more. `lorauter.catalog.versions` makes one current. Knows nothing of how embeddings and rankings come about,
nor of routing.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from lorauter.adapters.provenance import Composition
from lorauter.adapters.store import ObjectStore, open_store
from lorauter.catalog.index import TaskIndex
from lorauter.catalog.named import by_name, named
from lorauter.catalog.parts import Arrays, Parts, digest_of, pack
from lorauter.catalog.rerank import Candidates, Reranker, norms_of
from lorauter.catalog.sample import Sample, choose
from lorauter.catalog.segments import CatalogTask, Examples, RankedAdapter, Rows, Segment, TaskEntry, TaskRow, runs
from lorauter.catalog.whitening import StatesOf
from lorauter.encoder import Embeddings, Encoder
from lorauter.errors import BucketNotFound, CatalogError, ObjectNotFound
from lorauter.names import is_valid_name

__all__ = ["Catalog", "CatalogTask", "RankedAdapter", "TaskEntry"]

FORMAT = 4
HEAD_FILE = "catalog.json"
CURRENT_FILE = "CURRENT"
PROBE_TEXT = "The quick brown fox jumps over the lazy dog."
_MIN_PROBE_SIMILARITY = 0.99
_norms: WeakKeyDictionary[Segment, tuple[bytes, Embeddings]] = WeakKeyDictionary()  # of those in use, and under what


@dataclass(frozen=True, eq=False)
class Catalog:
    """Tasks with their representations and adapters.

    Attributes:
        segments: the tasks, run after run.
        probe: (d,) float32, the encoder's embedding of PROBE_TEXT; tells whether another encoder is the same.
        adapters: version of every adapter that was in the store when the catalog was built.
        encoder: name of the encoder, informational.
        base_model: base model of the adapters, informational.
        composed: of every adapter that was composed from others, for what task and of what.
        copies: of adapters that compute the same, the one among them that was tried; itself too.
        states: which model's hidden states the examples have; None where they have none.
        known_sample: a sample that this one's has much of.
    """

    segments: tuple[Segment, ...]
    probe: Embeddings
    adapters: Mapping[str, str]
    encoder: str
    base_model: str
    composed: Mapping[str, Composition] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    states: StatesOf | None = None
    known_sample: Callable[[], Sample | None] = lambda: None

    @classmethod
    def of(
        cls,
        tasks: Sequence[CatalogTask],
        examples: Sequence[Embeddings],
        probe: Embeddings,
        adapters: Mapping[str, str],
        encoder: str = "",
        base_model: str = "",
    ) -> Catalog:
        """Make one of tasks, in their order, and the (n, d) unit rows of each one's validation inputs."""
        rows = [TaskRow(entry, Examples.of(entry.task, of)) for entry, of in zip(tasks, examples, strict=True)]
        segments = (Segment.of(rows[start:end]) for start, end in runs([task.name for task in tasks]))
        return cls(tuple(segments), probe, adapters, encoder, base_model)

    def __len__(self) -> int:
        """How many tasks there are."""
        return self._starts[-1]

    @property
    def dimension(self) -> int:
        """d, the length of an embedding."""
        return int(self.segments[0].centroids.shape[1])

    @property
    def tasks(self) -> Sequence[CatalogTask]:
        """The tasks; each is read when it is asked for. Raises CatalogError, StoreError then."""
        return Rows(len(self), self.at, Segment.task)

    @property
    def entries(self) -> Sequence[TaskEntry]:
        """The tasks without their examples."""
        return Rows(len(self), self.at, Segment.entry)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(name for segment in self.segments for name in segment.names)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(map(len, self.segments))]

    def place(self, name: str) -> int | None:
        """Where a task is among the others; None where it is not."""
        return self._places.get(name)

    def at(self, place: int) -> tuple[Segment, int]:
        """The segment that has a task, and where."""
        at = bisect_right(self._starts, place) - 1
        return self.segments[at], place - self._starts[at]

    def examples(self, place: int) -> Examples:
        """A task's validation inputs. Raises CatalogError, StoreError."""
        segment, i = self.at(place)
        return segment.examples(i)

    @property
    def centroids(self) -> Embeddings:
        """(tasks, d) float32: the normalised means of their examples' embeddings, put together when asked for."""
        return np.concatenate([segment.centroids for segment in self.segments])

    def centroids_at(self, places: Iterable[int]) -> Embeddings:
        """(n, d): those of some tasks."""
        found = [segment.centroids[i] for segment, i in map(self.at, places)]
        return np.stack(found) if found else np.zeros((0, self.dimension), np.float32)

    def served_by(self, allows: Callable[[str], bool]) -> NDArray[np.bool_]:
        """(tasks,): which of them an adapter serves that is allowed."""
        return np.concatenate(
            [segment.served_by(np.fromiter(map(allows, segment.adapters), np.bool_)) for segment in self.segments]
        )

    @cached_property
    def index(self) -> TaskIndex:
        """Finds the tasks that are nearest to a query."""
        return TaskIndex(self.segments)

    def places(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Where tasks are, all of which are there."""
        return np.array([self._places[name] for name in names], np.int64)

    def nearest(self, queries: Embeddings, depth: int) -> NDArray[np.int64]:
        """See `TaskIndex.search`."""
        return self.index.search(queries, depth)

    def candidates(self, places: NDArray[np.int64]) -> Candidates:
        """What the reranker needs of tasks."""
        at = [self.at(place) for place in places.tolist()]
        return Candidates(
            np.stack([segment.centroids[i] for segment, i in at]),
            np.array([segment.lengths[i] for segment, i in at]),
            [segment.words(i) for segment, i in at],
            np.stack([segment.states[i] for segment, i in at if segment.states is not None]) if self.states else None,
        )

    @cached_property
    def sample(self) -> Sample:
        """What is global is fitted to it. Raises CatalogError, StoreError: it cannot be read."""
        keys = [(segment.names[i], int(segment.task_digests[i])) for segment, i in map(self.at, self._sampled[0])]
        return Sample.take(keys, lambda name: self.examples(self._places[name]), self.known_sample())

    @cached_property
    def sampled(self) -> frozenset[str]:
        """The tasks that the sample has."""
        return frozenset(segment.names[i] for segment, i in map(self.at, self._sampled[0]))

    @cached_property
    def _sampled(self) -> tuple[list[int], bool]:
        return choose(self.names, np.concatenate([segment.sizes for segment in self.segments]))

    def row(self, place: int) -> TaskRow:
        """All that is known of a task. Raises CatalogError, StoreError."""
        segment, i = self.at(place)
        return segment.row(i)

    def successor(
        self, segments: Sequence[Segment], adapters: Mapping[str, str], base: str, composed: Mapping[str, Composition]
    ) -> Catalog:
        """Another catalog of the same encoder, with much the same tasks. An adapter of another version is a copy no
        more."""
        sample = self.__dict__.get("sample")  # by itself, or each would hold the one before
        return replace(
            self,
            segments=tuple(segments),
            adapters=adapters,
            base_model=base,
            composed=composed,
            copies={name: of for name, of in self.copies.items() if adapters.get(name) == self.adapters[name]},
            known_sample=self.known_sample if sample is None else lambda: sample,
        )

    @cached_property
    def reranker(self) -> Reranker:
        """Fitted to the examples; read, where the catalog was read."""
        return Reranker.fit(self.sample, self)

    @cached_property
    def norms(self) -> Embeddings:
        """(tasks,): what the reranker says of each by itself (see `lorauter.catalog.rerank.norms_of`)."""
        precision = self.reranker.precision
        key = hashlib.sha256(precision.tobytes()).digest()
        for segment in self.segments:
            if segment not in _norms or _norms[segment][0] != key:
                _norms[segment] = key, norms_of(segment.centroids, segment.lengths, precision)
        return np.concatenate([_norms[segment][1] for segment in self.segments])

    @cached_property
    def version(self) -> str:
        """Identifies the content: 16 hexadecimal digits."""
        return hashlib.sha256(self._head).hexdigest()[:16]

    @cached_property
    def _head(self) -> bytes:
        head = {
            "format": FORMAT,
            "encoder": self.encoder,
            "dimension": self.dimension,
            "base_model": self.base_model,
            "counts": {"tasks": len(self), "adapters": len(self.adapters)},
            **({"states": self.states.model} if self.states else {}),
            "segments": [segment.digests for segment in self.segments],
            **{kind: list(files) for kind, files in self._own.items()},
        }
        return json.dumps(head, sort_keys=True, ensure_ascii=False, indent=1).encode()

    @cached_property
    def _own(self) -> dict[str, dict[str, bytes]]:
        """The parts that are no segments', by kind and digest."""
        composed = {
            name: {key: value for key, value in vars(of).items() if value is not None}
            for name, of in self.composed.items()
        }
        kinds: dict[str, list[Arrays]] = {
            "adapters": by_name(self.adapters),
            "composed": by_name(composed),
            **({"copies": by_name(self.copies)} if self.copies else {}),
            "sample": [] if self._sampled[1] else [self.sample.arrays()],
            "shared": [
                {
                    "probe": self.probe,
                    **({"states_probe": self.states.probe} if self.states else {}),
                    **self.reranker.arrays(),
                }
            ],
        }
        return {kind: {digest_of(raw): raw for raw in map(pack, of)} for kind, of in kinds.items()}

    @property
    def stale(self) -> dict[str, list[str]]:
        """Composed adapters of which sources are gone or have another version by now: `{adapter: [source, ...]}`."""
        changed = ((name, of.changed(self.adapters)) for name, of in self.composed.items())
        return {name: sources for name, sources in changed if sources}

    @cached_property
    def parts(self) -> frozenset[str]:
        """The digests of all parts."""
        return parts_of(json.loads(self._head))

    def read_whole(self, *, known: Catalog | None = None, keep: bool = False) -> None:
        """Read and verify the tasks' examples too.

        Args:
            known: a catalog that was read as a whole: what it has is left out.
            keep: hold them in memory.

        Raises:
            CatalogError, StoreError: they are not there, or damaged.
        """
        there = set() if known is None else set(known.segments)
        for segment in self.segments:
            if segment not in there:
                segment.read(keep=keep)

    def check_encoder(self, encoder: Encoder) -> None:
        """Raise CatalogError unless `encoder` embeds as the one that the catalog was built with."""
        self.check_probe(encoder.encode([PROBE_TEXT])[0], encoder.name)

    def check_probe(self, probe: Embeddings, encoder: str) -> None:
        """The same, given the (d,) embedding of PROBE_TEXT and the encoder's name."""
        if probe.shape != self.probe.shape or not float(probe @ self.probe) >= _MIN_PROBE_SIMILARITY:  # or NaN
            raise CatalogError(
                f"was built with the encoder {self.encoder!r} ({self.dimension} dimensions), which embeds otherwise "
                f"than {encoder!r} ({probe.shape[0]} dimensions); use that encoder or build the catalog anew",
                uri=self.version,
            )

    def check_states(self, of: StatesOf) -> None:
        """Raise CatalogError unless a model has the states, on PROBE_TEXT, that the catalog's examples are to have."""
        if self.states is None or not self.states.same(of):
            ours = f"the states of {self.states.model!r}" if self.states else "no states"
            raise CatalogError(
                f"was built with {ours}, and those of {of.model!r} are others; use that model, or build the catalog "
                "anew",
                uri=self.version,
            )

    def upload(self, store: ObjectStore, *, but: Collection[str] = ()) -> None:
        """Write every part but some, then the head, which makes nothing current. Raises StoreError, CatalogError."""

        def contents() -> Iterator[bytes]:
            for segment in self.segments:
                yield from segment.packed(but=but)
            for files in self._own.values():
                yield from (raw for digest, raw in files.items() if digest not in but)

        head = self._head
        if {digest for files in self._own.values() for digest in files} - self.parts:
            raise CatalogError("was written by other libraries, which make other bytes of it", uri=self.version)
        Parts(store).write(contents())
        store.write(f"{self.version}/{HEAD_FILE}", head)

    def missing_in(self, store: ObjectStore) -> set[str]:
        """The parts that a store has not. Raises StoreUnavailable."""
        return Parts(store).missing(self.parts)

    def save(self, to: str | Path | ObjectStore) -> str:
        """Publish over whatever version is current, as `lorauter.catalog.publish` does; returns the own version."""
        from lorauter.catalog.versions import publish

        store = _store(to)
        return publish(self, store, over=pointed_version(store))

    @classmethod
    def load(
        cls, source: str | Path | ObjectStore, *, version: str | None = None, known: Catalog | None = None
    ) -> Catalog:
        """Read the current version, or the one that is named, verifying every hash of what is read.

        The examples are read, and verified, when they are asked for.

        Args:
            known: another version, whose segments need not be read again.

        Raises:
            CatalogError: it is not there, or damaged.
            StoreError: the store fails, refuses, or has no such bucket.
        """
        store = _store(source)
        while True:
            pointer = version.encode() if version is not None else _pointer(store)
            try:
                return cls._pointed_at(store, pointer, known)
            except CatalogError:
                if version is not None or _pointer(store) == pointer:
                    raise  # else it was replaced, and deleted, while it was read

    @classmethod
    def _pointed_at(cls, store: ObjectStore, pointer: bytes | None, known: Catalog | None) -> Catalog:
        try:
            if pointer is None:
                raise ObjectNotFound(f"{store.uri}/{CURRENT_FILE}")
            version = pointer.decode().strip()
            if not is_valid_name(version):
                raise CatalogError(f"{version!r} is no version", uri=store.uri)
            return cls._from_head(read_head(store, version), store, version, known)
        except BucketNotFound:
            raise
        except ObjectNotFound as error:
            raise CatalogError(
                f"is not there or incomplete ({error}); build it with 'lorauter catalog build'", uri=store.uri
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CatalogError(f"is malformed: {error!r}", uri=store.uri) from error

    @classmethod
    def _from_head(cls, raw: bytes, store: ObjectStore, version: str, known: Catalog | None) -> Catalog:
        head, parts = json.loads(raw), Parts(store)
        adapters, composed = named(parts, head["adapters"]), named(parts, head["composed"])
        [shared] = parts.read_all(head["shared"])
        digests = [(routing, examples) for routing, examples in head["segments"]]
        there = {segment.digests: segment for segment in known.segments} if known is not None else {}
        new = [pair for pair in digests if pair not in there]
        for pair, routing in zip(new, parts.read_all([pair[0] for pair in new]), strict=True):
            there[pair] = Segment.stored(routing, pair, parts)
        if not digests:
            raise ValueError("it has no tasks")
        if unknown := {name for pair in digests for name in there[pair].adapters} - adapters.keys():
            raise CatalogError(f"has no version of {', '.join(sorted(unknown)[:5])}; build it anew", uri=store.uri)
        stored = head["sample"]
        catalog = cls(
            tuple(there[pair] for pair in digests),
            shared["probe"],
            adapters,
            head["encoder"],
            head["base_model"],
            {name: Composition(**of) for name, of in composed.items()},
            named(parts, head.get("copies", ())),
            StatesOf(head["states"], shared["states_probe"]) if "states" in head else None,
            (lambda: Sample.from_arrays(parts.read(stored[0]))) if stored else lambda: None,
        )
        catalog.__dict__.update(reranker=Reranker.from_arrays(shared), version=version, _head=raw)
        return catalog


def read_head(store: ObjectStore, version: str) -> bytes:
    """A version's `catalog.json`.

    Raises:
        CatalogError: it is damaged, or of another lorauter.
        StoreError: it is not to be had; ObjectNotFound: not there.
    """
    raw = store.read(f"{version}/{HEAD_FILE}")
    if hashlib.sha256(raw).hexdigest()[:16] != version:
        raise CatalogError("catalog.json does not have the version's hash; publish it again", uri=store.uri)
    found = json.loads(raw)["format"]
    if found != FORMAT:
        raise CatalogError(
            f"has format {found}, this lorauter reads {FORMAT}: build it anew with 'lorauter catalog build'",
            uri=store.uri,
        )
    return raw


def parts_of(head: Mapping[str, Any]) -> frozenset[str]:
    """The digests that a head has. Raises KeyError, TypeError."""
    if head["format"] < FORMAT:  # as they came before there were parts
        return frozenset()
    own = {digest for kind in ("adapters", "composed", "sample", "shared") for digest in head[kind]}
    own.update(head.get("copies", ()))
    return frozenset(own | {digest for pair in head["segments"] for digest in pair})


def read_adapters(store: ObjectStore, version: str) -> dict[str, str]:
    """The adapters of a version with theirs, and no more of it. Raises CatalogError, StoreUnavailable."""
    try:
        return named(Parts(store), json.loads(read_head(store, version))["adapters"])
    except ObjectNotFound:  # its removal, or its making, is under way
        return {}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CatalogError(f"version {version} is malformed: {error!r}", uri=store.uri) from error


def current_version(source: str | Path | ObjectStore) -> str | None:
    """The version that readers of a catalog take, or None where none was published.

    Raises:
        CatalogError: the pointer is no text.
        StoreUnavailable: the store fails.
    """
    store = _store(source)
    version = pointed_version(store)
    if version is not None and "\ufffd" in version:
        raise CatalogError(f"{CURRENT_FILE} is no text; 'lorauter catalog use' mends it", uri=store.uri)
    return version


def pointed_version(store: ObjectStore) -> str | None:
    """The same, whether it can be a version or not."""
    return version_in(_pointer(store))


def version_in(pointer: bytes | None) -> str | None:
    """What the pointer's content names."""
    return None if pointer is None else pointer.decode(errors="replace").strip()


def _pointer(store: ObjectStore) -> bytes | None:
    try:
        return store.read(CURRENT_FILE)
    except BucketNotFound:
        raise
    except ObjectNotFound:
        return None


def _store(source: str | Path | ObjectStore) -> ObjectStore:
    return open_store(source) if isinstance(source, str | Path) else source
