"""A cache of adapters on a local disk: verified, bounded, single-flight, and whole after any crash.

    <root>/<name>/<version>/{adapter_config.json, adapter_model.safetensors, entry.json}

An entry appears by one rename, after its files were verified and are on the disk for good; the folder's modification
time is its last use. However many threads ask for a version at once, it is downloaded once. Whoever asks names the
version: what is on the disk is served without a word to the store. One process owns a root at a time. Knows nothing
of Ray; `deployments.adapter_cache` puts one of these on every node, and `deployments.peers` has them lend each other
what they hold.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from lorauter.adapters.repository import AdapterManifest, AdapterRepository
from lorauter.errors import AdapterError, AdapterRejected, AdapterUnavailable, LorauterError
from lorauter.names import AdapterKey

_ENTRY_FILE = "entry.json"
_INCOMING = ".incoming"
_MOMENT_S = 5.0

Origin = Literal["store", "peer"]
Tier = Origin | Literal["disk"]
Room = Callable[[AdapterManifest], Path]
"""Told what is about to come, makes room for it, and gives the folder where it is to be."""


class Source(Protocol):
    """Where an adapter's files come from."""

    def fetch(self, key: AdapterKey, room: Room) -> tuple[AdapterManifest, Origin]:
        """Copy a version's files, verified, into the folder that `room` gives; says what they are, and whose.

        Raises:
            AdapterNotFound, AdapterRejected, AdapterUnavailable; and what `room` raises.
        """


@dataclass(frozen=True)
class LocalAdapter:
    """A version's files on this machine's disk. They stay until the cache needs their room.

    Attributes:
        tier: where they were when they were asked for.
    """

    manifest: AdapterManifest
    path: Path
    tier: Tier = field(default="disk", compare=False)

    @property
    def key(self) -> AdapterKey:
        """Name and version."""
        return self.manifest.key


@dataclass
class CacheCounters:
    """What the cache has done since it started. Sizes in bytes, times in seconds.

    `downloads` are the store's alone; what other caches lent are `peer_copies`.
    """

    hits: int = 0
    downloads: int = 0
    downloaded_bytes: int = 0
    download_seconds: float = 0.0
    peer_copies: int = 0
    peer_bytes: int = 0
    retries: int = 0
    evictions: int = 0


@dataclass
class _Entry:
    manifest: AdapterManifest
    path: Path
    last_used: float


class AdapterDiskCache:
    """Adapters of one repository, kept on disk up to a byte budget, the least recently used leaving first.

    Args:
        repository: where adapters come from.
        root: the cache's folder; made if missing.
        budget_bytes: bytes of adapter files to keep at most.
        attempts: downloads tried before an adapter is reported as unavailable.
        backoff_s: the first pause between attempts, in seconds; it doubles.
        downloads: adapters downloaded at the same time.
        source: is asked for an adapter's files at the first attempt; further ones, and all without it, go to the
            repository.
    """

    def __init__(
        self,
        repository: AdapterRepository,
        root: Path,
        *,
        budget_bytes: int,
        attempts: int = 3,
        backoff_s: float = 0.2,
        downloads: int = 8,
        source: Source | None = None,
    ) -> None:
        self._repository = repository
        self._source = source
        self._root = root
        self._budget = budget_bytes
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._lock = threading.RLock()  # a future that is done already calls back at once, in this thread
        self._entries: dict[AdapterKey, _Entry] = {}
        self._in_flight: dict[AdapterKey, Future[LocalAdapter]] = {}
        self._failures: dict[AdapterKey, tuple[AdapterError, float]] = {}
        self._reserved = 0
        self._workers = ThreadPoolExecutor(downloads, thread_name_prefix="adapter-download")
        self.counters = CacheCounters()
        self._recover()

    @property
    def size_bytes(self) -> int:
        """Bytes of the adapters on disk."""
        with self._lock:
            return sum(entry.manifest.size for entry in self._entries.values())

    def resident(self) -> list[AdapterKey]:
        """Every adapter on disk, the least recently used first."""
        with self._lock:
            return [key for key, _ in sorted(self._entries.items(), key=lambda item: item[1].last_used)]

    def entry(self, key: AdapterKey) -> LocalAdapter | None:
        """What is on disk of a version, every hash in its manifest; it may be evicted."""
        with self._lock:
            entry = self._entries.get(key)
        return LocalAdapter(entry.manifest, entry.path) if entry is not None else None

    def in_flight(self, key: AdapterKey) -> Future[LocalAdapter] | None:
        """The `fetch` of a version that is under way. Do not cancel it."""
        with self._lock:
            return self._in_flight.get(key)

    def failure(self, key: AdapterKey) -> AdapterError | None:
        """Why a version could not be had, if it was tried a moment ago: who can do without it need not wait again."""
        with self._lock:
            error, since = self._failures.get(key, (None, 0.0))
        return error if time.monotonic() - since < _MOMENT_S else None

    def fetch(self, key: AdapterKey) -> LocalAdapter:
        """A version of an adapter, downloaded if need be.

        The files may be evicted later, when their room is needed: open them soon, and fetch again if they are gone.

        Raises:
            AdapterNotFound, AdapterRejected, AdapterUnavailable.
        """
        return self.submit(key).result()

    def submit(self, key: AdapterKey) -> Future[LocalAdapter]:
        """`fetch` as a future, which all who ask for the same version meanwhile share: do not cancel it.

        What is on disk is there at once, and waits for no download.
        """
        local = self._on_disk(key)
        if local is not None:
            hit: Future[LocalAdapter] = Future()
            hit.set_result(local)
            return hit
        with self._lock:
            flight = self._in_flight.get(key)
            if flight is None or flight.done():  # waiters wake before callbacks run: a done one may still be here
                flight = self._in_flight[key] = self._workers.submit(self._fetch, key)
                flight.add_done_callback(lambda done: self._land(key, done))
        return flight

    def _land(self, key: AdapterKey, flight: Future[LocalAdapter]) -> None:
        now, error = time.monotonic(), None if flight.cancelled() else flight.exception()
        with self._lock:
            if self._in_flight.get(key) is flight:
                del self._in_flight[key]
            self._failures = {k: of for k, of in self._failures.items() if k != key and now - of[1] < _MOMENT_S}
            if isinstance(error, AdapterError):
                self._failures[key] = error.with_traceback(None), now

    def close(self) -> None:
        """Wait for the downloads under way and start no more."""
        self._workers.shutdown(cancel_futures=True)

    def discard(self, key: AdapterKey) -> None:
        """Drop an entry whose files turned out to be unusable, so that the next fetch downloads it anew."""
        with self._lock:
            entry = self._entries.pop(key, None)
        if entry is not None:
            self._remove(entry.path)

    def _fetch(self, key: AdapterKey) -> LocalAdapter:
        pause = self._backoff_s
        for attempt in range(1, self._attempts + 1):
            try:
                return self._on_disk(key) or self._download(key, self._source if attempt == 1 else None)
            except AdapterUnavailable:
                if attempt == self._attempts:
                    raise
                with self._lock:
                    self.counters.retries += 1
                time.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _on_disk(self, key: AdapterKey) -> LocalAdapter | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            entry.last_used = time.time()
        if not _is_whole(entry.path, entry.manifest):  # somebody emptied the folder behind our back
            self.discard(key)
            return None
        with suppress(OSError):
            os.utime(entry.path)
        with self._lock:
            self.counters.hits += 1
        return LocalAdapter(entry.manifest, entry.path)

    def _download(self, key: AdapterKey, source: Source | None) -> LocalAdapter:
        started = time.monotonic()
        final = self._root / key.name / key.version
        reserved = 0
        try:
            with self._scratch() as folder:
                incoming = Path(folder) / "adapter"
                incoming.mkdir()

                def room(manifest: AdapterManifest) -> Path:
                    nonlocal reserved
                    self._check_size(manifest)
                    self._evict(reserve=manifest.size - reserved)
                    reserved = manifest.size
                    return incoming

                origin: Origin = "store"
                if source is None:
                    manifest = self._repository.fetch(key, room)
                else:
                    manifest, origin = source.fetch(key, room)
                manifest = manifest.with_hashes(incoming)
                (incoming / _ENTRY_FILE).write_text(json.dumps(manifest.to_json()))
                _settle(incoming)
                final.parent.mkdir(exist_ok=True)
                self._remove(final)
                incoming.rename(final)
        except OSError as error:
            raise AdapterUnavailable(f"the disk cache failed: {error}", adapter=key.name) from error
        finally:
            with self._lock:
                self._reserved -= reserved
        with self._lock:
            self._entries[key] = _Entry(manifest, final, time.time())
            if origin == "peer":
                self.counters.peer_copies += 1
                self.counters.peer_bytes += manifest.size
            else:
                self.counters.downloads += 1
                self.counters.downloaded_bytes += manifest.size
                self.counters.download_seconds += time.monotonic() - started
        self._evict()
        return LocalAdapter(manifest, final, origin)

    def _check_size(self, manifest: AdapterManifest) -> None:
        if manifest.size > self._budget:
            raise AdapterRejected(
                f"has {manifest.size} bytes, but the disk cache holds {self._budget}; raise cache.disk_bytes",
                adapter=manifest.name,
            )

    def _evict(self, *, reserve: int = 0) -> None:
        """Drop what was used least recently until the entries fit the budget.

        To reserve bytes for a download makes room beside all downloads under way. As these may together exceed
        the budget, each calls again, reserving nothing, once it is an entry.
        """
        evicted = []
        with self._lock:
            self._reserved += reserve
            used = sum(entry.manifest.size for entry in self._entries.values())
            used += self._reserved if reserve else 0
            for key, entry in sorted(self._entries.items(), key=lambda item: item[1].last_used):
                if used <= self._budget:
                    break
                used -= entry.manifest.size
                evicted.append(self._entries.pop(key))
            self.counters.evictions += len(evicted)
        for entry in evicted:
            self._remove(entry.path)

    def _remove(self, path: Path) -> None:
        """Delete an entry's folder; it leaves its place by a rename, so no half entry is ever found there."""
        try:
            with self._scratch() as folder:
                path.rename(Path(folder) / "leaving")
        except OSError:  # it is gone already, or the disk is too full for another folder
            shutil.rmtree(path, ignore_errors=True)

    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A folder for what is on its way in or out, on the file system of the entries."""
        incoming = self._root / _INCOMING
        incoming.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=incoming, ignore_cleanup_errors=True)

    def _recover(self) -> None:
        """Take over what an earlier process left: whole entries are kept, anything else is deleted."""
        try:
            shutil.rmtree(self._root / _INCOMING, ignore_errors=True)
            (self._root / _INCOMING).mkdir(parents=True)
        except OSError as error:
            raise LorauterError(f"the cache folder {self._root} cannot be used: {error}") from error
        for path in sorted(self._root.glob("[!.]*/*")):
            try:
                manifest = AdapterManifest.from_json(
                    json.loads((path / _ENTRY_FILE).read_bytes()), name=path.parent.name
                )
                if manifest.version != path.name or not _is_whole(path, manifest):
                    raise ValueError("the folder does not hold what it says")
                self._entries[manifest.key] = _Entry(manifest, path, path.stat().st_mtime)
            except (OSError, ValueError, LorauterError):
                self._remove(path)
        self._evict()


def _settle(folder: Path) -> None:
    """Have a folder's files on the disk before it gets its name: a crash of the machine then leaves no torn ones."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_whole(path: Path, manifest: AdapterManifest) -> bool:
    try:
        return all((path / name).stat().st_size == file.size for name, file in manifest.files.items())
    except OSError:
        return False
