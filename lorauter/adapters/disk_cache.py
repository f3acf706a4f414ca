"""A cache of adapters on a local disk: verified, bounded, single-flight, and whole after any crash.

    <root>/<name>/<version>/{adapter_config.json, adapter_model.safetensors, entry.json}

An entry appears by one rename, after its files were verified and are on the disk for good; the folder's
modification time is its last use. However many threads ask for an adapter at once, it is downloaded once. One
process owns a root at a time. Knows nothing of Ray; `deployments.adapter_cache` puts one of these on every node,
and `deployments.peers` has them lend each other what they hold.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lorauter.adapters.repository import AdapterManifest, AdapterRepository
from lorauter.errors import AdapterNotFound, AdapterRejected, AdapterUnavailable, LorauterError

_ENTRY_FILE = "entry.json"
_INCOMING = ".incoming"

Origin = Literal["store", "peer"]


class Source(Protocol):
    """Where an adapter's files come from."""

    def fetch(self, manifest: AdapterManifest, target: Path) -> Origin:
        """Copy the files into the folder `target`, verified; says whose they are. Raises AdapterUnavailable."""


@dataclass(frozen=True)
class LocalAdapter:
    """An adapter's files on this machine's disk. They stay until the cache needs their room."""

    name: str
    version: str
    path: Path


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
        revalidate_s: for how long a manifest is trusted before the store is asked again, in seconds.
        attempts: downloads tried before an adapter is reported as unavailable; each rereads the manifest.
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
        revalidate_s: float = 10.0,
        attempts: int = 3,
        backoff_s: float = 0.2,
        downloads: int = 8,
        source: Source | None = None,
    ) -> None:
        self._repository = repository
        self._source = source
        self._root = root
        self._budget = budget_bytes
        self._revalidate_s = revalidate_s
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._lock = threading.RLock()  # a future that is done already calls back at once, in this thread
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._manifests: dict[str, tuple[AdapterManifest, float]] = {}
        self._in_flight: dict[str, Future[LocalAdapter]] = {}
        self._reserved = 0
        self._store_down_until = 0.0
        self._workers = ThreadPoolExecutor(downloads, thread_name_prefix="adapter-download")
        self.counters = CacheCounters()
        self._recover()

    @property
    def size_bytes(self) -> int:
        """Bytes of the adapters on disk."""
        with self._lock:
            return sum(entry.manifest.size for entry in self._entries.values())

    def resident(self) -> list[tuple[str, str]]:
        """Name and version of every adapter on disk, the least recently used first."""
        with self._lock:
            return [key for key, _ in sorted(self._entries.items(), key=lambda item: item[1].last_used)]

    def entry(self, name: str, version: str) -> tuple[AdapterManifest, Path] | None:
        """What is on disk of this version: its manifest, every hash in it, and its folder, which may be evicted."""
        with self._lock:
            entry = self._entries.get((name, version))
        return (entry.manifest, entry.path) if entry is not None else None

    def in_flight(self, name: str) -> Future[LocalAdapter] | None:
        """The `fetch` of an adapter that is under way. Do not cancel it."""
        with self._lock:
            return self._in_flight.get(name)

    def fetch(self, name: str) -> LocalAdapter:
        """The current version of an adapter, downloaded if need be.

        While the store is down, the newest version on disk is served. The files may be evicted later, when
        their room is needed: open them soon, and fetch again if they are gone.

        Raises:
            AdapterNotFound, AdapterRejected, AdapterUnavailable.
        """
        return self.submit(name).result()

    def submit(self, name: str) -> Future[LocalAdapter]:
        """`fetch` as a future, which all who ask for the same adapter meanwhile share: do not cancel it.

        What is on disk and lately validated is there at once, and waits for no download.
        """
        with self._lock:
            known = self._trusted(name)
        local = self._on_disk(known) if known is not None else None
        if local is not None:
            hit: Future[LocalAdapter] = Future()
            hit.set_result(local)
            return hit
        with self._lock:
            flight = self._in_flight.get(name)
            if flight is None or flight.done():  # waiters wake before callbacks run: a done one may still be here
                flight = self._in_flight[name] = self._workers.submit(self._fetch, name)
                flight.add_done_callback(lambda done: self._land(name, done))
        return flight

    def _land(self, name: str, flight: Future[LocalAdapter]) -> None:
        with self._lock:
            if self._in_flight.get(name) is flight:
                del self._in_flight[name]

    def close(self) -> None:
        """Wait for the downloads under way and start no more."""
        self._workers.shutdown(cancel_futures=True)

    def discard(self, name: str, version: str) -> None:
        """Drop an entry whose files turned out to be unusable, so that the next fetch downloads it anew."""
        with self._lock:
            entry = self._entries.pop((name, version), None)
            self._manifests.pop(name, None)
        if entry is not None:
            self._remove(entry.path)

    def _fetch(self, name: str) -> LocalAdapter:
        pause = self._backoff_s
        for attempt in range(1, self._attempts + 1):
            try:
                manifest = self._current_manifest(name)
                return self._on_disk(manifest) or self._download(manifest, self._source if attempt == 1 else None)
            except AdapterUnavailable:
                if attempt == self._attempts:
                    raise
                with self._lock:
                    self._manifests.pop(name, None)
                    self.counters.retries += 1
                time.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _current_manifest(self, name: str) -> AdapterManifest:
        with self._lock:
            known = self._trusted(name)
            store_is_down = time.monotonic() < self._store_down_until
        if known is None and store_is_down:  # one adapter has waited for it: the others on disk need not
            known = self._newest_on_disk(name)
        if known is not None:
            return known
        try:
            manifest = self._repository.manifest(name)
        except AdapterNotFound:
            with self._lock:
                self._manifests.pop(name, None)
            raise
        except AdapterUnavailable:
            self._store_down_until = time.monotonic() + self._revalidate_s
            newest = self._newest_on_disk(name)
            if newest is None:
                raise
            manifest = newest
        with self._lock:
            self._manifests[name] = manifest, time.monotonic()
        return manifest

    def _trusted(self, name: str) -> AdapterManifest | None:
        """The manifest that the store gave lately, if it did."""
        manifest, since = self._manifests.get(name, (None, 0.0))
        return manifest if time.monotonic() - since < self._revalidate_s else None

    def _newest_on_disk(self, name: str) -> AdapterManifest | None:
        with self._lock:
            entries = [entry for (owner, _), entry in self._entries.items() if owner == name]
        return max(entries, key=lambda entry: entry.last_used).manifest if entries else None

    def _on_disk(self, manifest: AdapterManifest) -> LocalAdapter | None:
        with self._lock:
            entry = self._entries.get((manifest.name, manifest.version))
            if entry is None:
                return None
            entry.last_used = time.time()
        if not _is_whole(entry.path, manifest):  # somebody emptied the folder behind our back
            self.discard(manifest.name, manifest.version)
            return None
        with suppress(OSError):
            os.utime(entry.path)
        with self._lock:
            self.counters.hits += 1
        return LocalAdapter(manifest.name, manifest.version, entry.path)

    def _download(self, manifest: AdapterManifest, source: Source | None) -> LocalAdapter:
        if manifest.size > self._budget:
            raise AdapterRejected(
                f"has {manifest.size} bytes, but the disk cache holds {self._budget}; raise cache.disk_bytes",
                adapter=manifest.name,
            )
        self._evict(reserve=manifest.size)
        started = time.monotonic()
        final = self._root / manifest.name / manifest.version
        try:
            with self._scratch() as folder:
                incoming = Path(folder) / "adapter"
                incoming.mkdir()
                origin: Origin = "store"
                if source is None:
                    self._repository.download(manifest, incoming)
                else:
                    origin = source.fetch(manifest, incoming)
                manifest = manifest.with_hashes(incoming)
                (incoming / _ENTRY_FILE).write_text(json.dumps(manifest.to_json()))
                _settle(incoming)
                final.parent.mkdir(exist_ok=True)
                self._remove(final)
                incoming.rename(final)
        except OSError as error:
            raise AdapterUnavailable(f"the disk cache failed: {error}", adapter=manifest.name) from error
        finally:
            with self._lock:
                self._reserved -= manifest.size
        with self._lock:
            self._entries[manifest.name, manifest.version] = _Entry(manifest, final, time.time())
            if origin == "peer":
                self.counters.peer_copies += 1
                self.counters.peer_bytes += manifest.size
            else:
                self.counters.downloads += 1
                self.counters.downloaded_bytes += manifest.size
                self.counters.download_seconds += time.monotonic() - started
        self._evict()
        return LocalAdapter(manifest.name, manifest.version, final)

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
                self._entries[path.parent.name, path.name] = _Entry(manifest, path, path.stat().st_mtime)
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
