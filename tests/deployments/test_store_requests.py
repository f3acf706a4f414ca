"""What a service asks its store for, by a real S3 server: nothing that grows with the adapters in use."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lorauter.adapters.s3
from deployments.adapter_listing import AdapterListing, LiveListing
from deployments.host_adapters import HostAdapters
from deployments.live_catalog import LiveCatalog
from deployments.retriever import TaskRetriever
from lorauter.adapters import AdapterDiskCache, AdapterRepository, LocalAdapter, LoraWeights, open_store
from lorauter.catalog import Catalog, build_catalog, with_adapters
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.encoder import HashingEncoder
from lorauter.names import AdapterKey
from lorauter.routing import RoutingConfig
from lorauter.tasks import Task

LOOKS = 30  # a minute at 2 s


class NodeFiles:
    """A node's cache without its actor."""

    def __init__(self, cache: AdapterDiskCache) -> None:
        self.cache = cache

    async def fetch(self, key: AdapterKey, *, patient: bool = True) -> LocalAdapter:
        return await asyncio.wrap_future(self.cache.submit(key))

    async def discard(self, key: AdapterKey) -> None:
        self.cache.discard(key)


@pytest.fixture
def requests(s3: Any) -> Iterator[Counter[str]]:
    """Every request to the store from now on, by operation."""
    counted: Counter[str] = Counter()

    def count(model: Any, **_: Any) -> None:
        counted[model.name] += 1

    lorauter.adapters.s3._shared_client()  # which makes them all
    clients = (lorauter.adapters.s3._client or {}).values()
    for client in clients:
        client.meta.events.register("before-call.s3", count)
    yield counted
    for client in clients:
        client.meta.events.unregister("before-call.s3", count)


@pytest.fixture
def publish(s3: Any, tmp_path: Path, make_adapter: Callable[..., Path], make_task: Callable[..., Task]) -> Any:
    """`publish(n)`: n adapters and their catalog in a bucket of their own; returns the URI."""

    def make(n: int) -> str:
        uri: str = s3.bucket(f"requests-{n}-{tmp_path.name.replace('_', '-')[-20:]}")
        repository = AdapterRepository(open_store(f"{uri}/adapters"))
        for i in range(n):
            repository.push(make_adapter(tmp_path / f"of-{n}", f"a{i}"))
        build_catalog([make_task("a0"), make_task("a1")], HashingEncoder(32), repository=repository).save(
            f"{uri}/catalog"
        )
        return uri

    return make


def live_catalog(uri: str, keep: Path) -> LiveCatalog:
    encoder = HashingEncoder(32)

    def probe() -> Any:
        return encoder.encode([PROBE_TEXT])[0], encoder.name

    return LiveCatalog(open_store(f"{uri}/catalog"), RoutingConfig(), probe, refresh_s=2, keep=keep)


def tiers(uri: str, disk: Path) -> tuple[AdapterDiskCache, HostAdapters[Any]]:
    cache = AdapterDiskCache(AdapterRepository(open_store(f"{uri}/adapters")), disk, budget_bytes=1 << 30)
    return cache, HostAdapters(NodeFiles(cache), read, budget_bytes=5000)  # room for some


def read(local: LocalAdapter) -> LoraWeights:
    return LoraWeights.load(local.path, name=local.key.name, version=local.key.version)


def test_a_minute_takes_as_many_requests_whatever_the_number_of_adapters_in_use(
    publish: Any, requests: Counter[str], tmp_path: Path
) -> None:
    minutes = []
    for n in (3, 30):
        uri = publish(n)
        live = live_catalog(uri, tmp_path / f"keep-{n}")
        cache, host = tiers(uri, tmp_path / f"disk-{n}")

        async def minute(live: LiveCatalog = live, host: HostAdapters[Any] = host) -> None:
            for _ in range(LOOKS):
                live.look()
                for key in live.retriever.catalog.adapters.items():
                    await host.get(AdapterKey(*key))

        asyncio.run(minute())  # each comes once
        assert host.counters.evictions > 0 or n == 3
        requests.clear()
        asyncio.run(minute())
        minutes.append(dict(requests))
        cache.close()
    assert minutes == [{"GetObject": LOOKS}] * 2, "the pointer to the current version"


def test_without_a_catalog_a_minute_takes_as_many_listings(publish: Any, requests: Counter[str]) -> None:
    minutes = []
    for n in (3, 30):
        listing = LiveListing(AdapterRepository(open_store(f"{publish(n)}/adapters")), refresh_s=2)
        requests.clear()
        for _ in range(LOOKS):
            listing.look()
        assert len(listing.versions) == n
        minutes.append(dict(requests))
    assert minutes == [{"ListObjectsV2": LOOKS}] * 2


def test_what_models_there_are_is_told_without_asking_the_store(
    publish: Any, requests: Counter[str], tmp_path: Path
) -> None:
    """`GET /v1/models`, `/v1/models/{model}` and `/v1/tasks`, however many ask, with a catalog and without one."""
    uri = publish(3)
    catalogued: Any = object.__new__(TaskRetriever.func_or_class)
    catalogued._live = live_catalog(uri, tmp_path / "keep")
    listed: Any = object.__new__(AdapterListing.func_or_class)
    listed._live = LiveListing(AdapterRepository(open_store(f"{uri}/adapters")), refresh_s=2)
    requests.clear()

    async def ask(part: Any) -> list[str]:
        for _ in range(10):
            described = await part.describe()
            assert set(await part.versions(["a0", "a7"])) == {"a0"}
        return list(described.adapters)

    for part in (catalogued, listed):
        assert asyncio.run(ask(part)) == ["a0", "a1", "a2"]
    assert not requests


def test_a_replaced_adapter_is_served_once_the_catalog_says_so_and_never_before(
    publish: Any, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    uri = publish(3)
    live = live_catalog(uri, tmp_path / "keep")
    cache, host = tiers(uri, tmp_path / "disk")
    repository = AdapterRepository(open_store(f"{uri}/adapters"))

    def served(name: str) -> str:
        key = AdapterKey(name, live.retriever.catalog.adapters[name])
        version: str = asyncio.run(host.get(key)).key[1]
        return version

    old = served("a1")
    new = repository.push(make_adapter(tmp_path / "new", "a1", rank=3)).version
    live.look()
    assert served("a1") == old, "pushed, and not in the catalog"
    with_adapters(Catalog.load(f"{uri}/catalog"), repository).save(f"{uri}/catalog")
    live.look()
    assert served("a1") == new
    repository.remove("a1")
    with_adapters(Catalog.load(f"{uri}/catalog"), repository).save(f"{uri}/catalog")
    live.look()
    with pytest.raises(KeyError):
        served("a1")
    cache.close()
