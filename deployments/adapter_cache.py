"""AdapterCache: one Ray actor on every node that serves models; it alone pulls adapters onto the node's disk.

The actor is named and detached, and pinned to its node: replicas find it or start it, Ray restarts it when its
process dies, and the disk outlives it. `NodeCache` is a replica's way to the one on its own node.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.config import CacheSettings
from deployments.metrics import RayRecorder
from deployments.samplers import Sampling, disk_sampler
from lorauter.adapters import AdapterDiskCache, AdapterRepository, LocalAdapter, open_store
from lorauter.defaults import home
from lorauter.errors import AdapterUnavailable

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
        self._cache = AdapterDiskCache(
            AdapterRepository(open_store(spec.adapters)),
            root,
            budget_bytes=settings.disk_bytes,
            revalidate_s=settings.revalidate_s,
            downloads=settings.downloads,
        )
        self._sampling = Sampling(disk_sampler(self._cache, RayRecorder()))

    async def fetch(self, names: list[str]) -> list[LocalAdapter]:
        """Local copies of the adapters' current versions, all at once; the first failure is raised."""
        flights = [asyncio.shield(asyncio.wrap_future(self._cache.submit(name))) for name in names]
        return list(await asyncio.gather(*flights))

    async def prefetch(self, names: list[str]) -> None:
        """Start fetching; who needs the adapters will ask and be told of failures."""
        for name in names:
            self._cache.submit(name).add_done_callback(lambda flight: flight.exception())

    async def discard(self, name: str, version: str) -> None:
        """Forget a copy that turned out to be unusable."""
        self._cache.discard(name, version)

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


def start_cache(spec: CacheSpec) -> Any:
    """The actor handle of this node's cache, started if it is not there."""
    node = ray.get_runtime_context().get_node_id()
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
    """Actor handles of this cache on all nodes where it runs."""
    names = [row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["namespace"] == NAMESPACE]
    handles = []
    for name in names:
        if name.startswith(spec.prefix):
            try:
                handles.append(ray.get_actor(name, namespace=NAMESPACE))
            except ValueError:  # died meanwhile
                continue
    return handles


class NodeCache:
    """A replica's side: asks its node's cache, and starts it anew if it has died for good."""

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec
        self._actor = start_cache(spec)

    async def fetch(self, names: list[str]) -> list[LocalAdapter]:
        """See `AdapterCacheActor.fetch`."""
        for attempt in range(_ATTEMPTS):
            try:
                result: list[LocalAdapter] = await self._actor.fetch.remote(names)
                return result
            except RayActorError as error:
                if attempt == _ATTEMPTS - 1:
                    raise AdapterUnavailable(f"the node's cache is down: {error}", adapter=names[0]) from error
                await asyncio.sleep(0.2 * 2**attempt)
                self._actor = await asyncio.to_thread(start_cache, self._spec)
        raise AssertionError("unreachable")

    async def discard(self, name: str, version: str) -> None:
        """See `AdapterCacheActor.discard`."""
        await self._actor.discard.remote(name, version)
