"""A store of six adapters, and caches over one folder."""

from pathlib import Path

import pytest
from cache_folders import NAMES

from lorauter.adapters.disk_cache import AdapterDiskCache
from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.names import AdapterKey


class Store(MemoryStore):
    """The fake, with a hand on its downloads: `before_download` runs first, in the downloading thread."""

    before_download = staticmethod(lambda key: None)

    def download(self, key: str, target: Path) -> None:
        self.before_download(key)
        super().download(key, target)


@pytest.fixture
def store(tmp_path, make_adapter) -> Store:
    """Holds the adapters a to f, all of the same size."""
    store = Store()
    for name in NAMES:
        AdapterRepository(store).push(make_adapter(tmp_path / "pushed", name))
    return store


@pytest.fixture
def one(store) -> int:
    """The size of one adapter in bytes."""
    return AdapterRepository(store).manifest("a").size


@pytest.fixture
def replace(store, tmp_path, make_adapter):
    """Pushes another version of an adapter, of the same size; returns that version."""
    return lambda name, alpha=7: (
        AdapterRepository(store).push(make_adapter(tmp_path / f"new{alpha}", name, lora_alpha=alpha)).version
    )


@pytest.fixture
def keys(store) -> dict[str, AdapterKey]:
    """The adapters by name; also one that nobody has."""
    found = {name: AdapterRepository(store).manifest(name).key for name in NAMES}
    store.reads.clear()
    return found


@pytest.fixture
def make_cache(store, tmp_path):
    """Makes caches over one folder, as one process after the other would."""
    caches = []

    def make(**settings) -> AdapterDiskCache:
        settings = {"budget_bytes": 10**9, "backoff_s": 0.001, **settings}
        caches.append(AdapterDiskCache(AdapterRepository(store), tmp_path / "cache", **settings))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
