"""AdapterCache: one Ray actor on every node that serves models; it alone pulls adapters onto the node's disk.

The actor is named and detached, and pinned to its node: replicas find it or start it, Ray restarts it when its
process dies, and the disk outlives it. A node that joins gets its own with its first replica; one that leaves takes
its own along. Where the settings change, a cache of the new ones comes beside the old, which ends, disk and all, once
nobody has used it for a moment. `NodeCache` is a replica's way to the one on its own node; `deployments.peers` is the
caches' way to each other.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import threading
import time
import weakref
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.config import CacheSettings
from deployments.demand import Demand
from deployments.metrics import RayRecorder
from deployments.peers import Loan, PeerSource, Whereabouts, lend
from deployments.placement import REPORTED, holdings
from deployments.samplers import Sampling, disk_sampler
from deployments.startup import tells_why
from lorauter.adapters import AdapterDiskCache, AdapterRepository, LocalAdapter, open_store
from lorauter.adapters.disk_cache import Tier
from lorauter.defaults import DEFAULT, home
from lorauter.errors import AdapterUnavailable, LorauterError
from lorauter.names import AdapterKey

logger = logging.getLogger("lorauter.cache")

NAMESPACE = "lorauter"
_PREFIX = "adapter-cache-"
_ATTEMPTS = 5
_BEAT_S = 5.0  # between two words of everybody who uses a cache
_MARK = ".settings"  # the file in a cache's folder that says whose it is
_PREFETCHED = 1024  # adapters of which it is known that they came for a request that has yet to ask
_UNUSED_S = 20.0  # without a word, after which a cache is ended if there is another on its node


@dataclass(frozen=True)
class CacheSpec:
    """Which cache is meant: nodes hold one for each store and settings in use."""

    adapters: str
    settings: CacheSettings

    @property
    def stamp(self) -> str:
        """Tells it from caches of other stores and settings."""
        return hashlib.sha256(f"{self.adapters}\n{self.settings.model_dump_json()}".encode()).hexdigest()[:12]

    @property
    def prefix(self) -> str:
        """What the names of its actors begin with; the node's id follows."""
        return f"{_PREFIX}{self.stamp}-"


@tells_why
class AdapterCacheActor:
    """The actor's body; see `AdapterDiskCache` for what it promises."""

    def __init__(self, spec: CacheSpec) -> None:
        settings = spec.settings
        self._root, self._root_lock = _claim(cache_folder(settings), spec.stamp)
        repository = AdapterRepository(open_store(spec.adapters))
        self._peers = PeerSource(repository, lambda: _other_caches(spec))
        self._lending = asyncio.Semaphore(settings.downloads)
        self._cache = AdapterDiskCache(
            repository,
            self._root,
            budget_bytes=settings.disk_bytes,
            downloads=settings.downloads,
            source=self._peers,
        )
        self._demand = Demand()
        self._prefetched: dict[AdapterKey, Tier] = {}  # where that came from which was not asked for yet
        self._sampling = Sampling(disk_sampler(self._cache, RayRecorder()))
        self._used = time.monotonic()
        threading.Thread(target=_end_unused, args=(spec,), daemon=True, name="end-unused-caches").start()

    async def fetch(self, key: AdapterKey, *, patient: bool = True) -> LocalAdapter:
        """A local copy of a version; one that could not be had a moment ago is tried again for the patient alone.

        Raises AdapterError.
        """
        self._used = time.monotonic()
        if not patient and (failure := self._cache.failure(key)) is not None:
            raise failure.with_traceback(None)
        local = await asyncio.shield(asyncio.wrap_future(self._cache.submit(key)))
        self._demand.note(key, time.monotonic())
        return replace(local, tier=self._prefetched.pop(key, local.tier))

    async def prefetch(self, keys: list[AdapterKey]) -> None:
        """Start fetching; who needs the adapters will ask and be told of failures."""
        self._used = time.monotonic()
        for key in keys:
            if self._cache.failure(key) is None:
                self._cache.submit(key).add_done_callback(self._note_prefetched)

    def _note_prefetched(self, flight: Future[LocalAdapter]) -> None:
        if flight.exception() is None:  # what cannot be had is not in demand
            local = flight.result()
            self._demand.note(local.key, time.monotonic())
            if local.tier != "disk":
                self._prefetched[local.key] = local.tier
                if len(self._prefetched) > _PREFETCHED:
                    self._prefetched.pop(next(iter(self._prefetched)))

    async def wanted(self, number: int) -> dict[AdapterKey, float]:
        """The adapters most wanted here lately, with counts that halve with time."""
        return self._demand.top(number, time.monotonic())

    async def discard(self, key: AdapterKey) -> None:
        """Forget a copy that turned out to be unusable."""
        self._cache.discard(key)

    async def whereabouts(self, key: AdapterKey) -> Whereabouts | None:
        """Whether this cache has a version of an adapter, or is getting it in a way that a peer may wait for."""
        return Whereabouts("here") if self._cache.entry(key) is not None else self._peers.whereabouts(key)

    async def lend(self, key: AdapterKey) -> Loan | None:
        """A version's files, once it is here if it is under way; None where it is not. Starts no fetch."""
        flight = self._cache.in_flight(key)
        if flight is not None and self._cache.entry(key) is None:
            with suppress(LorauterError):
                await asyncio.shield(asyncio.wrap_future(flight))
        async with self._lending:
            local = self._cache.entry(key)
            return await asyncio.to_thread(lend, local) if local is not None else None

    async def holdings(self) -> bytes:
        """The adapters on the disk as a filter (see `deployments.placement`). Whoever uses the cache asks now and
        then."""
        self._used = time.monotonic()
        return holdings(map(str, self._cache.resident()[-REPORTED:]))

    async def clear_if_unused(self) -> bool:
        """Whether nobody has used this cache of late: then its disk is free, and its process may be ended."""
        unused = time.monotonic() - self._used > _UNUSED_S
        if unused:
            logger.info("nobody uses this cache any more, and there is another: it ends")
            await asyncio.to_thread(shutil.rmtree, self._root, ignore_errors=True)
        return unused

    async def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    async def stats(self) -> dict[str, Any]:
        """Counters, bytes on disk, and the resident adapters."""
        return {
            **asdict(self._cache.counters),
            "size_bytes": self._cache.size_bytes,
            "resident": self._cache.resident(),
        }


def cache_folder(settings: CacheSettings) -> Path:
    """The folder below which a machine's caches are."""
    return home() / "adapters" if settings.directory == DEFAULT else Path(settings.directory).expanduser()


def _claim(base: Path, stamp: str) -> tuple[Path, FileLock]:
    """A folder below `base` that no living process owns: one that a cache of this stamp has had, so that a restart
    finds its own; else one that any has had, so that none is left behind; else a new one.

    The lock falls with the process, however it ends.
    """
    base.mkdir(parents=True, exist_ok=True)
    numbers = [path.name.removeprefix("cache-") for path in base.glob("cache-*")]
    last = max((int(number) for number in numbers if number.isdecimal()), default=-1)
    free: list[tuple[bool, bool, int, FileLock]] = []
    for number in count():
        lock = FileLock(base / f".lock-{number}")
        with suppress(Timeout):
            lock.acquire(blocking=False)
            mark = base / f"cache-{number}" / _MARK
            known = mark.read_text() if mark.is_file() else None
            free.append((known != stamp, known is None, number, lock))
            if number > last:
                break
    *_, chosen, owned = min(free, key=lambda item: item[:3])
    for *_, lock in free:
        if lock is not owned:
            lock.release()
    root = base / f"cache-{chosen}"
    root.mkdir(exist_ok=True)
    (root / _MARK).write_text(stamp)
    return root, owned


def _end_unused(spec: CacheSpec) -> None:
    """End the caches of other settings on this node that nobody uses, from now on."""
    while ray.is_initialized():
        time.sleep(_BEAT_S)
        with suppress(RayError, ValueError):  # it has ended meanwhile, or the cluster is about to
            node = ray.get_runtime_context().get_node_id()
            for name in _named():
                if name.startswith(_PREFIX) and name.endswith(node) and name != spec.prefix + node:
                    handle = ray.get_actor(name, namespace=NAMESPACE)
                    if ray.get(handle.clear_if_unused.remote(), timeout=_BEAT_S):
                        ray.kill(handle)


def _named() -> set[str]:
    """The names of all caches in the cluster."""
    return {row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE}


def start_cache(spec: CacheSpec, node: str | None = None) -> Any:
    """The actor handle of a node's cache, started if it is not there; of this node's, unless another is named."""
    node = node or ray.get_runtime_context().get_node_id()
    return (
        ray.remote(AdapterCacheActor)
        .options(
            name=spec.prefix + node,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=3,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(spec)
    )


def running_caches(spec: CacheSpec) -> list[Any]:
    """Actor handles of this cache on all nodes that are alive and where it runs."""
    named = _named()
    handles = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"] and (name := spec.prefix + node["NodeID"]) in named:
            with suppress(ValueError):  # died meanwhile
                handles.append(ray.get_actor(name, namespace=NAMESPACE))
    return handles


def _other_caches(spec: CacheSpec) -> list[Any]:
    """The same without the one that asks."""
    if not ray.is_initialized():  # a cache that runs on no cluster has no peers
        return []
    own = ray.get_runtime_context().get_actor_id()
    return [handle for handle in running_caches(spec) if handle._actor_id.hex() != own]


class NodeCache:
    """A replica's side: asks its node's cache, and starts it anew if it has died for good.

    While it lives, the cache is in use, whether or not anything is asked.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec
        self._actor = start_cache(spec)
        threading.Thread(target=_beat, args=(weakref.ref(self),), daemon=True, name="cache-in-use").start()

    async def fetch(self, key: AdapterKey, *, patient: bool = True) -> LocalAdapter:
        """See `AdapterCacheActor.fetch`."""
        for attempt in range(_ATTEMPTS):
            try:
                result: LocalAdapter = await self._actor.fetch.remote(key, patient=patient)
                return result
            except RayActorError as error:
                if attempt == _ATTEMPTS - 1:
                    raise AdapterUnavailable(f"the node's cache is down: {error}", adapter=key.name) from error
                await asyncio.sleep(0.2 * 2**attempt)
                self._actor = await asyncio.to_thread(start_cache, self._spec)
        raise AssertionError("unreachable")

    async def discard(self, key: AdapterKey) -> None:
        """See `AdapterCacheActor.discard`."""
        await self._actor.discard.remote(key)

    async def holdings(self) -> bytes:
        """The adapters on the node's disk as a filter. Raises RayError."""
        held: bytes = await self._actor.holdings.remote()
        return held

    def use(self) -> None:
        """Say that the cache is in use."""
        self._actor.holdings.remote()


def _beat(reference: weakref.ref[NodeCache]) -> None:
    while (cache := reference()) is not None and ray.is_initialized():
        cache.use()
        del cache
        time.sleep(_BEAT_S)
