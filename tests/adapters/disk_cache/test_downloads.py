"""What is fetched, how often, and what becomes of a fetch that fails."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cache_folders import NAMES, names, on_disk, whole

from lorauter.adapters.disk_cache import AdapterDiskCache
from lorauter.adapters.repository import MANIFEST_FILE, AdapterRepository
from lorauter.adapters.store import DirectoryStore
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE, LoraWeights
from lorauter.errors import AdapterNotFound, AdapterRejected, AdapterUnavailable, StoreUnavailable
from lorauter.names import AdapterKey


def test_an_adapter_is_downloaded_once_and_can_be_loaded(store, make_cache, tmp_path, one, keys) -> None:
    cache = make_cache()
    first, second = cache.fetch(keys["a"]), cache.fetch(keys["a"])
    assert first == second
    assert first.key == keys["a"]
    LoraWeights.load(first.path, name=first.key.name, version=first.key.version)
    assert on_disk(tmp_path / "cache") == whole("a")
    counters = cache.counters
    assert (counters.hits, counters.downloads, counters.downloaded_bytes) == (1, 1, one)
    assert counters.download_seconds > 0
    assert (cache.size_bytes, cache.resident()) == (one, [keys["a"]])


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_twenty_threads_that_ask_at_once_cause_one_download(store, make_cache, down, keys) -> None:
    asked, tried = threading.Barrier(20, timeout=10), []

    def slowly(key: str) -> None:
        tried.append(key)
        time.sleep(0.1)
        if down:
            raise StoreUnavailable("down", uri="memory://")

    store.before_download = slowly
    cache = make_cache(attempts=1)

    def ask(_: int) -> object:
        asked.wait()
        try:
            return cache.fetch(keys["a"]).path
        except AdapterUnavailable as error:
            return error

    with ThreadPoolExecutor(20) as pool:
        answers = set(pool.map(ask, range(20)))
    assert len(answers) == 1
    assert len(tried) == len(set(tried)) == (1 if down else 2)


def test_different_adapters_are_downloaded_side_by_side(store, make_cache, keys) -> None:
    together = threading.Barrier(2, timeout=10)
    store.before_download = lambda key: together.wait() if key.endswith(WEIGHTS_FILE) else None
    with ThreadPoolExecutor(2) as pool:
        assert {local.key.name for local in pool.map(make_cache().fetch, [keys["a"], keys["b"]])} == {"a", "b"}


def test_no_more_downloads_run_at_once_than_allowed(store, make_cache, keys) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def count(key: str) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    store.before_download = count
    cache = make_cache(downloads=2)
    assert {future.result().key.name for future in [cache.submit(keys[name]) for name in NAMES]} == set(NAMES)
    assert most == 2


def test_the_least_recently_used_leaves_first(make_cache, tmp_path, one, keys) -> None:
    cache = make_cache(budget_bytes=3 * one)
    for name in ("a", "b", "c", "a", "d"):
        cache.fetch(keys[name])
    assert names(cache) == ["c", "a", "d"]
    assert on_disk(tmp_path / "cache") == whole("a", "c", "d")
    assert (cache.size_bytes, cache.counters.evictions) == (3 * one, 1)
    cache.fetch(keys["b"])
    assert names(cache) == ["a", "d", "b"]


def test_a_large_adapter_takes_the_room_of_several(store, make_cache, tmp_path, make_adapter, one, keys) -> None:
    pushed = AdapterRepository(store).push(make_adapter(tmp_path / "large", "large", rank=8))
    large = pushed.size
    assert one < large < 2 * one
    cache = make_cache(budget_bytes=3 * one)
    for key in (keys["a"], keys["b"], keys["c"], pushed.key):
        cache.fetch(key)
    assert (names(cache), cache.size_bytes) == (["c", "large"], one + large)


def test_the_budget_holds_when_all_come_at_once(store, make_cache, tmp_path, one, keys) -> None:
    store.before_download = lambda key: time.sleep(0.02)
    cache = make_cache(budget_bytes=2 * one)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(cache.fetch, keys.values()))
    assert cache.size_bytes == 2 * one
    assert on_disk(tmp_path / "cache") == whole(*names(cache))


def test_an_adapter_larger_than_the_budget_is_refused_and_evicts_nothing(make_cache, one, keys) -> None:
    cache = make_cache(budget_bytes=one)
    cache.fetch(keys["a"])
    tight = make_cache(budget_bytes=one - 1)
    with pytest.raises(AdapterRejected, match=r"raise cache\.disk_bytes"):
        tight.fetch(keys["b"])
    with pytest.raises(AdapterRejected, match=f"has {one} bytes, but the disk cache holds {one - 1}"):
        tight.fetch(keys["a"])


@pytest.mark.parametrize(("failures", "attempts"), [(0, 1), (1, 3), (2, 3)])
def test_a_failing_download_is_tried_again(store, make_cache, tmp_path, failures, attempts, keys) -> None:
    left = [None] * failures

    def fail(key: str) -> None:
        if left:
            left.pop()
            raise StoreUnavailable("hiccup", uri="memory://")

    store.before_download = fail
    cache = make_cache(attempts=attempts)
    assert cache.fetch(keys["a"]).path.is_dir()
    assert cache.counters.retries == failures
    assert on_disk(tmp_path / "cache") == whole("a")


def test_after_the_last_attempt_the_adapter_is_unavailable_until_the_store_is_back(store, make_cache, tmp_path, keys):
    store.down = True
    cache = make_cache(attempts=3)
    with pytest.raises(AdapterUnavailable, match="down") as caught:
        cache.fetch(keys["a"])
    assert (caught.value.adapter, cache.counters.retries) == ("a", 2)
    assert on_disk(tmp_path / "cache") == set()
    store.down = False
    assert cache.fetch(keys["a"]).key == keys["a"]


def test_the_pauses_between_attempts_double(store, make_cache, keys) -> None:
    store.down = True
    started = time.monotonic()
    with pytest.raises(AdapterUnavailable):
        make_cache(attempts=4, backoff_s=0.02).fetch(keys["a"])
    assert 0.02 + 0.04 + 0.08 <= time.monotonic() - started < 2


def test_failed_downloads_give_their_room_back(store, make_cache, one, keys) -> None:
    cache = make_cache(budget_bytes=2 * one, attempts=1)
    cache.fetch(keys["a"])
    store.before_download = lambda key: (_ for _ in ()).throw(StoreUnavailable("x", uri="memory://"))
    for _ in range(5):
        with pytest.raises(AdapterUnavailable):
            cache.fetch(keys["b"])
    del store.before_download
    for name in ("b", "a"):
        cache.fetch(keys[name])
    assert (sorted(names(cache)), cache.counters.evictions) == (["a", "b"], 0)


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: bytes([c[0] ^ 1]) + c[1:]], ids=["truncated", "a bit flipped"]
)
def test_a_damaged_object_never_becomes_an_entry(store, make_cache, tmp_path, damage, keys) -> None:
    key = AdapterRepository(store).manifest("a").files[WEIGHTS_FILE].key
    sound = store.objects[key]
    store.objects[key] = damage(sound)
    cache = make_cache()
    with pytest.raises(AdapterUnavailable, match="is damaged"):
        cache.fetch(keys["a"])
    assert (on_disk(tmp_path / "cache"), cache.resident(), cache.size_bytes) == (set(), [], 0)
    store.objects[key] = sound
    assert cache.fetch(keys["a"]).path.is_dir()


def test_what_is_on_disk_is_served_without_a_word_to_the_store(store, make_cache, keys) -> None:
    cache = make_cache()
    local = cache.fetch(keys["a"])
    store.down = True
    assert cache.fetch(keys["a"]) == local
    assert cache.counters.retries == 0
    with pytest.raises(AdapterUnavailable):
        cache.fetch(keys["b"])


def test_versions_of_one_adapter_are_kept_apart(store, make_cache, keys, replace) -> None:
    cache = make_cache()
    new = AdapterKey("a", replace("a"))
    assert new != keys["a"]
    old_files, new_files = cache.fetch(keys["a"]), cache.fetch(new)
    assert (old_files.key, new_files.key) == (keys["a"], new), "the store's newest is nobody's business here"
    assert cache.fetch(keys["a"]) == old_files
    for local in (old_files, new_files):
        local.manifest.check_files(local.path, "the entry")


def test_a_version_that_an_older_lorauter_pushed_is_found_while_it_is_the_newest(store, make_cache, keys) -> None:
    for name in ("a", "b"):
        store.delete(f"{name}/{keys[name].version}/{MANIFEST_FILE}")
    assert make_cache().fetch(keys["a"]).key == keys["a"]


@pytest.mark.parametrize("name", ["none", "..", "../a", "a/b", "", ".incoming"])
@pytest.mark.parametrize("version", ["0" * 16, "../../a", "", "V" * 16])
def test_an_unknown_name_or_version_is_not_found_and_leaves_nothing(make_cache, tmp_path, keys, name, version):
    for key in (AdapterKey(name, version), AdapterKey("a", version), AdapterKey(name, keys["a"].version)):
        with pytest.raises(AdapterNotFound):
            make_cache().fetch(key)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".incoming"]


def test_a_malformed_manifest_is_rejected_at_once(store, make_cache, keys) -> None:
    store.objects[f"a/{keys['a'].version}/adapter.json"] = b"{}"
    cache = make_cache()
    with pytest.raises(AdapterRejected):
        cache.fetch(keys["a"])
    assert cache.counters.retries == 0


@pytest.mark.parametrize("change", [{"rank": 5}, {"fill": 2.0}], ids=["another size", "the same size"])
@pytest.mark.parametrize("when", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_plain_folder_that_is_replaced_during_the_download_is_not_taken_for_the_version(
    tmp_path, make_adapter, change, when
) -> None:
    class Replaced(DirectoryStore):
        replaced = False

        def download(self, key: str, target: Path) -> None:
            if not self.replaced and key.endswith(when):
                self.replaced = True
                make_adapter(self.root, "sst2", **change)
            super().download(key, target)

    make_adapter(tmp_path / "root", "sst2", fill=1.0)
    repository = AdapterRepository(Replaced(tmp_path / "root"))
    old = repository.manifest("sst2").key
    cache = AdapterDiskCache(repository, tmp_path / "cache", budget_bytes=10**9, backoff_s=0.001)
    with pytest.raises(AdapterNotFound, match=repository.manifest("sst2").version):
        cache.fetch(old)
    assert cache.resident() == []
    new = repository.manifest("sst2").key
    local = cache.fetch(new)
    cache.close()
    assert LoraWeights.load(local.path, name="sst2", version=new.version).rank == change.get("rank", 2)


def test_a_plain_folders_version_outlives_in_the_cache_what_took_its_place_in_the_store(tmp_path, make_adapter):
    make_adapter(tmp_path / "root", "sst2", fill=1.0)
    repository = AdapterRepository(DirectoryStore(tmp_path / "root"))
    cache = AdapterDiskCache(repository, tmp_path / "cache", budget_bytes=10**9)
    old = cache.fetch(repository.manifest("sst2").key)
    make_adapter(tmp_path / "root", "sst2", fill=2.0)
    assert cache.fetch(old.key) == old
    cache.close()
