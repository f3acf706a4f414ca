"""What of the adapter cache needs no cluster; tests/integration has the rest."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import deployments.adapter_cache
from deployments.adapter_cache import AdapterCacheActor, CacheSpec, _claim
from deployments.config import CacheSettings
from lorauter.adapters import AdapterRepository, open_store
from lorauter.errors import AdapterError, AdapterNotFound, AdapterUnavailable
from lorauter.names import AdapterKey


def keys(pool: str, *names: str) -> list[AdapterKey]:
    return [AdapterRepository(open_store(pool)).manifest(name).key for name in names]


@pytest.fixture
def pool(tmp_path: Path, make_adapter: Callable[..., Path]) -> str:
    """The URI of a store with three adapters."""
    uri = str(tmp_path / "pool")
    for name in ("a", "b", "c"):
        AdapterRepository(open_store(uri)).push(make_adapter(tmp_path / "source", name))
    return uri


def test_each_claimant_has_a_folder_and_a_free_one_is_found_again(tmp_path: Path) -> None:
    first, first_lock = _claim(tmp_path / "base", "a")
    second, second_lock = _claim(tmp_path / "base", "a")
    assert {first, second} == {tmp_path / "base" / "cache-0", tmp_path / "base" / "cache-1"}
    first_lock.release()
    again, again_lock = _claim(tmp_path / "base", "a")
    assert again == first
    for lock in (second_lock, again_lock):
        lock.release()


def test_a_restart_finds_its_own_folder_and_new_settings_take_over_one_that_is_free(tmp_path: Path) -> None:
    old, old_lock = _claim(tmp_path, "old")
    new, new_lock = _claim(tmp_path, "new")
    old_lock.release()
    shutil.rmtree(old)  # as a cache that ends does
    new_lock.release()
    again, again_lock = _claim(tmp_path, "new")
    assert again == new
    again_lock.release()
    newest, lock = _claim(tmp_path, "newest")
    assert newest == new, "no folder is left behind"
    lock.release()


def test_a_spec_has_its_own_prefix_by_store_and_settings() -> None:
    other = {"directory": "/d", "disk_bytes": 1, "downloads": 1}
    specs = [
        CacheSpec("s3://bucket/a", CacheSettings()),
        CacheSpec("s3://bucket/b", CacheSettings()),
        *[CacheSpec("s3://bucket/a", CacheSettings.model_validate({name: value})) for name, value in other.items()],
    ]
    assert set(CacheSettings.model_fields) == other.keys()
    prefixes = [spec.prefix for spec in specs]
    assert len(set(prefixes)) == len(specs)
    assert CacheSpec("s3://bucket/a", CacheSettings()).prefix == prefixes[0]
    assert not any(one.startswith(other) for one in prefixes for other in prefixes if one is not other)


@pytest.fixture
def actor(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., AdapterCacheActor]]:
    """`actor(**settings)`: the actor's body, in this process."""
    monkeypatch.setenv("LORAUTER_HOME", str(tmp_path / "home"))
    made: list[AdapterCacheActor] = []

    def make(**settings: object) -> AdapterCacheActor:
        made.append(AdapterCacheActor(CacheSpec(pool, CacheSettings.model_validate(settings))))
        return made[-1]

    yield make
    for one in made:
        one._cache.close()
        one._root_lock.release()


def test_the_actor_keeps_one_copy_for_all_who_ask(
    actor: Callable[..., AdapterCacheActor], pool: str, tmp_path: Path
) -> None:
    a, b, c = keys(pool, "a", "b", "c")
    nowhere = AdapterKey("nowhere", a.version)

    async def scenario() -> None:
        cache = actor()
        found = await asyncio.gather(*[cache.fetch(key) for _ in range(10) for key in (a, b)])
        assert len({local.path for local in found}) == 2
        assert all(local.path.is_relative_to(tmp_path / "home" / "adapters" / "cache-0") for local in found)
        await cache.prefetch([c, nowhere])
        local = await cache.fetch(c)
        stats = await cache.stats()
        assert stats["downloads"] == 3
        assert set(stats["resident"]) == {a, b, c}
        assert stats["size_bytes"] == stats["downloaded_bytes"] > 0
        assert await cache.wanted(9) == pytest.approx({a: 10, b: 10, c: 2}, rel=1e-2), "what there is not, is not"
        assert set(await cache.wanted(2)) == {a, b}
        await cache.discard(c)
        assert not local.path.exists()
        with pytest.raises(AdapterNotFound, match="nowhere"):
            await cache.fetch(nowhere)

    asyncio.run(scenario())


def test_what_could_not_be_had_a_moment_ago_is_tried_again_for_the_patient_alone(
    actor: Callable[..., AdapterCacheActor], pool: str
) -> None:
    [a] = keys(pool, "a")
    [weights] = Path(pool).glob("a/*/adapter_model.safetensors")
    whole = weights.read_bytes()

    async def scenario() -> None:
        cache = actor()
        weights.write_bytes(whole[:10])
        for _ in range(2):
            with pytest.raises(AdapterUnavailable, match="damaged"):
                await cache.fetch(a, patient=False)
            await cache.prefetch([a])
        assert (await cache.stats())["retries"] == 2, "those of one fetch"
        weights.write_bytes(whole)
        with pytest.raises(AdapterUnavailable, match="damaged"):
            await cache.fetch(a, patient=False)
        assert (await cache.fetch(a)).key == a
        assert (await cache.fetch(a, patient=False)).key == a

    asyncio.run(scenario())


def test_a_cache_that_nobody_uses_any_more_frees_its_disk(
    actor: Callable[..., AdapterCacheActor], pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [a] = keys(pool, "a")

    async def scenario() -> None:
        cache = actor()
        local = await cache.fetch(a)
        assert not await cache.clear_if_unused()
        monkeypatch.setattr(deployments.adapter_cache, "_UNUSED_S", 0.05)
        await asyncio.sleep(0.1)
        await cache.holdings()
        assert not await cache.clear_if_unused()
        await asyncio.sleep(0.1)
        await cache.stats()
        assert await cache.clear_if_unused(), "who looks at figures does not use it"
        assert not local.path.exists()
        assert (await cache.fetch(a)).path.is_dir(), "somebody may ask in the last moment"

    asyncio.run(scenario())


def test_the_actors_settings_reach_its_cache(
    actor: Callable[..., AdapterCacheActor], pool: str, tmp_path: Path
) -> None:
    cache = actor(directory=str(tmp_path / "elsewhere"), disk_bytes=10)
    [a] = keys(pool, "a")
    with pytest.raises(AdapterError, match="disk_bytes"):
        asyncio.run(cache.fetch(a))
    assert (tmp_path / "elsewhere" / "cache-0").is_dir()


def test_a_folder_below_the_users_home(
    actor: Callable[..., AdapterCacheActor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    actor(directory="~/adapters")
    assert (tmp_path / "user" / "adapters" / "cache-0").is_dir()
    assert not (tmp_path / "~").exists()


def test_who_asks_first_is_told_where_an_adapter_came_from(actor: Callable[..., AdapterCacheActor], pool: str) -> None:
    a, b = keys(pool, "a", "b")

    async def scenario() -> None:
        cache = actor()
        assert (await cache.fetch(a)).tier == "store"
        assert (await cache.fetch(a)).tier == "disk"
        await cache.prefetch([b])  # as the ingress does, on behalf of a request that has yet to ask
        while b not in (await cache.stats())["resident"]:
            await asyncio.sleep(0.01)
        assert (await cache.fetch(b)).tier == "store"
        assert (await cache.fetch(b)).tier == "disk"

    asyncio.run(scenario())
