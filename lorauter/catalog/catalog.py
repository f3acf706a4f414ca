"""The catalog: an immutable, versioned artifact that tells tasks apart and which adapters serve them.

Below the root of a store:

    CURRENT                     the version that readers take
    <version>/catalog.json      tasks, rankings, identities, and the hashes of the other files
    <version>/*.npy             embeddings
    <version>/rerank/*.npy      the reranker that was fitted to them
    <version>/index.faiss       the FAISS index over the tasks

The version is the hash of `catalog.json`, and so of everything. `lorauter.catalog.versions` makes one current.
Knows nothing of how embeddings and rankings come about, nor of routing.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from lorauter.adapters.store import ObjectStore, open_store
from lorauter.catalog.rerank import Reranker
from lorauter.encoder import Embeddings, Encoder
from lorauter.errors import BucketNotFound, CatalogError, ObjectNotFound
from lorauter.names import is_valid_name
from lorauter.tasks import Task

FORMAT = 3
HEAD_FILE = "catalog.json"
CURRENT_FILE = "CURRENT"
PROBE_TEXT = "The quick brown fox jumps over the lazy dog."
_MIN_PROBE_SIMILARITY = 0.99
_ARRAYS = ("centroids", "examples", "probe")


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
    """

    task: Task
    adapters: tuple[RankedAdapter, ...]
    scores: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    declared: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name


@dataclass(frozen=True, eq=False)
class Catalog:
    """Tasks with their representations and adapters.

    Attributes:
        tasks: T tasks.
        centroids: (T, d) float32; row t is the normalised mean of task t's example embeddings.
        examples: (N, d) float32 unit rows: every validation input, task after task in the order of `tasks`.
        probe: (d,) float32, the encoder's embedding of PROBE_TEXT; tells whether another encoder is the same.
        adapters: version of every adapter that was in the store when the catalog was built.
        encoder: name of the encoder, informational.
        base_model: base model of the adapters, informational.
        composed: of every adapter that was composed for a task from others, these with the versions that went into it.
    """

    tasks: tuple[CatalogTask, ...]
    centroids: Embeddings
    examples: Embeddings
    probe: Embeddings
    adapters: Mapping[str, str]
    encoder: str
    base_model: str
    composed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def dimension(self) -> int:
        """d, the length of an embedding."""
        return int(self.centroids.shape[1])

    @cached_property
    def index(self) -> faiss.Index:
        """A FAISS inner-product index over `centroids`."""
        index = faiss.IndexFlatIP(self.dimension)
        index.add(self.centroids)
        return index

    @property
    def task_examples(self) -> list[Embeddings]:
        """`examples`, task by task."""
        return np.split(self.examples, np.cumsum([len(entry.task.validation) for entry in self.tasks])[:-1])

    @cached_property
    def reranker(self) -> Reranker:
        """Fitted to the examples; read, where the catalog was read."""
        texts = [[example.input for example in entry.task.validation] for entry in self.tasks]
        return Reranker.fit(self.task_examples, texts)

    @cached_property
    def version(self) -> str:
        """Identifies the content: 16 hexadecimal digits."""
        return hashlib.sha256(self._files[HEAD_FILE]).hexdigest()[:16]

    @cached_property
    def _files(self) -> dict[str, bytes]:
        files = {f"{name}.npy": _npy(getattr(self, name)) for name in _ARRAYS}
        files |= {f"rerank/{name}.npy": _npy(array) for name, array in self.reranker.arrays().items()}
        files["index.faiss"] = faiss.serialize_index(self.index).tobytes()
        head = {
            "format": FORMAT,
            "encoder": self.encoder,
            "dimension": self.dimension,
            "base_model": self.base_model,
            "adapters": dict(self.adapters),
            "tasks": [
                {
                    "task": entry.task.to_json(),
                    "adapters": [vars(adapter) for adapter in entry.adapters],
                    "scores": {name: {str(i): s for i, s in sorted(of.items())} for name, of in entry.scores.items()},
                    "declared": list(entry.declared),
                }
                for entry in self.tasks
            ],
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        if self.composed:
            head["composed"] = {name: dict(sources) for name, sources in self.composed.items()}
        files[HEAD_FILE] = json.dumps(head, sort_keys=True, ensure_ascii=False, indent=1).encode()
        return files

    @property
    def stale(self) -> dict[str, list[str]]:
        """Composed adapters of which sources are gone or have another version by now: `{adapter: [source, ...]}`."""
        changed = {
            name: sorted(source for source, version in sources.items() if self.adapters.get(source) != version)
            for name, sources in self.composed.items()
        }
        return {name: sources for name, sources in changed.items() if sources}

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

    def upload(self, store: ObjectStore) -> None:
        """Write every file, which makes nothing current. Raises StoreError, CatalogError (it cannot be written)."""
        if hashlib.sha256(self._files[HEAD_FILE]).hexdigest()[:16] != self.version:
            raise CatalogError("was written by other libraries, which make other bytes of it", uri=self.version)
        for name, content in self._files.items():
            store.write(f"{self.version}/{name}", content)

    def is_whole_in(self, store: ObjectStore) -> bool:
        """Whether a store has every file. Raises StoreUnavailable."""
        names = {HEAD_FILE, "index.faiss", *(f"{name}.npy" for name in _ARRAYS)}
        names |= {f"rerank/{name}.npy" for name in self.reranker.arrays()}
        try:
            return {f"{self.version}/{name}" for name in names} <= store.files(self.version).keys()
        except ObjectNotFound:
            return False

    def save(self, to: str | Path | ObjectStore) -> str:
        """Publish over whatever version is current, as `lorauter.catalog.publish` does; returns the own version."""
        from lorauter.catalog.versions import publish

        store = _store(to)
        return publish(self, store, over=pointed_version(store))

    @classmethod
    def load(cls, source: str | Path | ObjectStore, *, version: str | None = None) -> Catalog:
        """Read the current version, or the one that is named, verifying every hash.

        Raises:
            CatalogError: it is not there, or damaged.
            StoreError: the store fails, refuses, or has no such bucket.
        """
        store = _store(source)
        while True:
            pointer = version.encode() if version is not None else _pointer(store)
            try:
                return cls._pointed_at(store, pointer)
            except CatalogError:
                if version is not None or _pointer(store) == pointer:
                    raise  # else it was replaced, and deleted, while it was read

    @classmethod
    def _pointed_at(cls, store: ObjectStore, pointer: bytes | None) -> Catalog:
        try:
            if pointer is None:
                raise ObjectNotFound(f"{store.uri}/{CURRENT_FILE}")
            version = pointer.decode().strip()
            if not is_valid_name(version):
                raise CatalogError(f"{version!r} is no version", uri=store.uri)
            raw = store.read(f"{version}/{HEAD_FILE}")
            if hashlib.sha256(raw).hexdigest()[:16] != version:
                raise CatalogError("catalog.json does not have the version's hash; publish it again", uri=store.uri)
            return cls._from_files(json.loads(raw), store, version)
        except BucketNotFound:
            raise
        except ObjectNotFound as error:
            raise CatalogError(
                f"is not there or incomplete ({error}); build it with 'lorauter catalog build'", uri=store.uri
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CatalogError(f"is malformed: {error!r}", uri=store.uri) from error

    @classmethod
    def _from_files(cls, head: dict[str, Any], store: ObjectStore, version: str) -> Catalog:
        if head["format"] != FORMAT:
            raise CatalogError(f"has format {head['format']}, this lorauter reads {FORMAT}", uri=store.uri)
        files = {}
        for name, digest in head["sha256"].items():
            files[name] = store.read(f"{version}/{name}")
            if hashlib.sha256(files[name]).hexdigest() != digest:
                raise CatalogError(f"{name} is damaged; publish the catalog again", uri=store.uri)
        catalog = cls(
            tasks=tuple(
                CatalogTask(
                    Task.from_json(row["task"], source=f"{store.uri}/{version}"),
                    tuple(RankedAdapter(**adapter) for adapter in row["adapters"]),
                    {name: {int(i): score for i, score in of.items()} for name, of in row["scores"].items()},
                    tuple(row["declared"]),
                )
                for row in head["tasks"]
            ),
            adapters=head["adapters"],
            encoder=head["encoder"],
            base_model=head["base_model"],
            composed={str(name): dict(sources) for name, sources in head.get("composed", {}).items()},
            **{name: _array(files[f"{name}.npy"]) for name in _ARRAYS},
        )
        rerank = {Path(name).stem: _array(raw) for name, raw in files.items() if name.startswith("rerank/")}
        catalog.__dict__["reranker"] = Reranker.from_arrays(rerank)
        catalog.__dict__["index"] = faiss.deserialize_index(np.frombuffer(files["index.faiss"], np.uint8))
        catalog.__dict__["version"] = version
        if unknown := {a.name for entry in catalog.tasks for a in entry.adapters} - catalog.adapters.keys():
            raise CatalogError(f"has no version of {', '.join(sorted(unknown)[:5])}; build it anew", uri=store.uri)
        return catalog


def read_adapters(store: ObjectStore, version: str) -> dict[str, str]:
    """The adapters of a version with theirs, and no more of it. Raises CatalogError, StoreUnavailable."""
    try:
        adapters = json.loads(store.read(f"{version}/{HEAD_FILE}"))["adapters"]
        return {str(name): str(of) for name, of in adapters.items()}
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


def _array(raw: bytes) -> Any:
    return np.load(io.BytesIO(raw), allow_pickle=False)


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
