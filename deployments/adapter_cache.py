"""AdapterCache: one Ray actor on every node that serves models; it alone pulls adapters onto the node's disk.

The actor is named and detached, and pinned to its node: replicas find it or start it, Ray restarts it when its
process dies, and the disk outlives it. A node that joins gets its own with its first replica; one that leaves takes
its own along. `NodeCache` is a replica's way to the one on its own node; `deployments.peers` is the caches' way to
each other.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.config import CacheSettings
from deployments.demand import Demand
from deployments.metrics import RayRecorder
from deployments.peers import Loan, PeerSource, Whereabouts, lend
from deployments.samplers import Sampling, disk_sampler
from lorauter.adapters import AdapterDiskCache, AdapterRepository, LocalAdapter, open_store
from lorauter.defaults import home
from lorauter.errors import AdapterUnavailable, LorauterError
from lorauter.names import AdapterKey

NAMESPACE = "lorauter"
_ATTEMPTS = 5


@dataclass(frozen=True)
class CacheSpec:
    """Which cache is meant: nodes hold one for each store and settings in use."""

    adapters: str
    settings: CacheSettings

    @property
    def prefix(self) -> str:
        """What the names of its actors begin with; the node's id follows."""
        stamp = hashlib.sha256(f"{self.adapters}\n{self.settings.model_dump_json()}".encode()).hexdigest()[:12]
        return f"adapter-cache-{stamp}-"


class AdapterCacheActor:
    """The actor's body; see `AdapterDiskCache` for what it promises."""

    def __init__(self, spec: CacheSpec) -> None:
        settings = spec.settings
        base = home() / "adapters" if settings.directory == "default" else Path(settings.directory).expanduser()
        root, self._root_lock = _claim(base)
        repository = AdapterRepository(open_store(spec.adapters))
        self._peers = PeerSource(repository, lambda: _other_caches(spec))
        self._lending = asyncio.Semaphore(settings.downloads)
        self._cache = AdapterDiskCache(
            repository,
            root,
            budget_bytes=settings.disk_bytes,
            downloads=settings.downloads,
            source=self._peers,
        )
        self._demand = Demand()
        self._sampling = Sampling(disk_sampler(self._cache, RayRecorder()))

    async def fetch(self, key: AdapterKey) -> LocalAdapter:
        """A local copy of a version. Raises AdapterError."""
        local = await asyncio.shield(asyncio.wrap_future(self._cache.submit(key)))
        self._demand.note(key, time.monotonic())
        return local

    async def prefetch(self, keys: list[AdapterKey]) -> None:
        """Start fetching; who needs the adapters will ask and be told of failures."""
        for key in keys:
            self._cache.submit(key).add_done_callback(self._note_prefetched)

    def _note_prefetched(self, flight: Future[LocalAdapter]) -> None:
        if flight.exception() is None:  # what cannot be had is not in demand
            self._demand.note(flight.result().key, time.monotonic())

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


def _claim(base: Path) -> tuple[Path, FileLock]:
    """A folder below `base` that no living process owns: the first one free, so that a restart finds its own.

    The lock falls with the process, however it ends.
    """
    base.mkdir(parents=True, exist_ok=True)
    for number in range(1000):
        lock = FileLock(base / f".lock-{number}")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        return base / f"cache-{number}", lock
    raise RuntimeError(f"all cache folders in {base} are taken")


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
    named = {row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE}
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
    """A replica's side: asks its node's cache, and starts it anew if it has died for good."""

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec
        self._actor = start_cache(spec)

    async def fetch(self, key: AdapterKey) -> LocalAdapter:
        """See `AdapterCacheActor.fetch`."""
        for attempt in range(_ATTEMPTS):
            try:
                result: LocalAdapter = await self._actor.fetch.remote(key)
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

    async def resident(self) -> list[AdapterKey]:
        """The adapters on the node's disk, the least recently used first. Raises RayError."""
        stats: dict[str, Any] = await self._actor.stats.remote()
        resident: list[AdapterKey] = stats["resident"]
        return resident
