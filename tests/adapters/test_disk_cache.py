import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorauter.adapters.disk_cache import AdapterDiskCache
from lorauter.adapters.repository import MANIFEST_FILE, AdapterManifest, AdapterRepository
from lorauter.adapters.store import DirectoryStore, MemoryStore
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE, LoraWeights
from lorauter.errors import AdapterNotFound, AdapterRejected, AdapterUnavailable, LorauterError, StoreUnavailable
from lorauter.names import AdapterKey

NAMES = ("a", "b", "c", "d", "e", "f")


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


def on_disk(cache_root: Path) -> set[str]:
    """Every file below a cache's folder, `name/version/file` shortened to `name/file`."""
    return {f"{p.relative_to(cache_root).parts[0]}/{p.name}" for p in cache_root.rglob("*") if p.is_file()}


def whole(*names: str) -> set[str]:
    return {f"{name}/{file}" for name in names for file in (CONFIG_FILE, WEIGHTS_FILE, "entry.json")}


def names(cache: AdapterDiskCache) -> list[str]:
    return [name for name, _ in cache.resident()]


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


def test_a_discarded_entry_is_downloaded_anew(make_cache, tmp_path, keys) -> None:
    cache = make_cache()
    local = cache.fetch(keys["a"])
    (local.path / WEIGHTS_FILE).write_bytes(b"?" * (local.path / WEIGHTS_FILE).stat().st_size)
    cache.discard(AdapterKey("a", "another version"))
    assert cache.resident() == [keys["a"]]
    cache.discard(keys["a"])
    cache.discard(keys["a"])
    assert (cache.resident(), on_disk(tmp_path / "cache")) == ([], set())
    again = cache.fetch(keys["a"])
    assert again == local
    LoraWeights.load(again.path, name="a", version=again.key.version)
    assert cache.counters.downloads == 2


@pytest.mark.parametrize(
    "vandalise",
    [
        lambda path: shutil.rmtree(path.parents[1]),
        lambda path: shutil.rmtree(path),
        lambda path: [file.unlink() for file in path.iterdir()],
        lambda path: (path / WEIGHTS_FILE).unlink(),
        lambda path: os.truncate(path / WEIGHTS_FILE, 5),
    ],
    ids=["cache", "entry", "all files", "one file", "truncated"],
)
def test_what_is_emptied_behind_its_back_is_downloaded_anew(make_cache, tmp_path, vandalise, keys) -> None:
    cache = make_cache()
    vandalise(cache.fetch(keys["a"]).path)
    again = cache.fetch(keys["a"])
    LoraWeights.load(again.path, name="a", version=again.key.version)
    assert on_disk(tmp_path / "cache") == whole("a")
    assert (cache.counters.downloads, cache.counters.hits, cache.counters.retries) == (2, 0, 0)


def test_a_restart_takes_over_the_disk_with_its_order_of_use(store, make_cache, one, keys) -> None:
    first = make_cache()
    paths = {name: first.fetch(keys[name]).path for name in ("a", "b", "c")}
    for age, name in enumerate(("b", "c", "a")):
        os.utime(paths[name], (time.time() - age, time.time() - age))
    store.down = True
    second = make_cache(budget_bytes=3 * one)
    assert names(second) == ["a", "c", "b"]
    assert second.size_bytes == 3 * one
    assert second.fetch(keys["c"]).path == paths["c"]
    store.down = False
    second.fetch(keys["d"])
    assert names(second) == ["b", "c", "d"]


def test_use_is_remembered_over_a_restart(make_cache, keys) -> None:
    first = make_cache()
    for name in ("a", "b"):
        os.utime(first.fetch(keys[name]).path, (0, 0))
    first.fetch(keys["a"])
    assert names(make_cache()) == ["b", "a"]


def test_a_restart_with_a_smaller_budget_keeps_to_it(make_cache, tmp_path, one, keys) -> None:
    first = make_cache()
    for age, name in enumerate(("b", "c", "a")):
        os.utime(first.fetch(keys[name]).path, (1000 - age, 1000 - age))
    second = make_cache(budget_bytes=one)
    assert (names(second), on_disk(tmp_path / "cache")) == (["b"], whole("b"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / WEIGHTS_FILE).unlink(),
        lambda path: (path / CONFIG_FILE).unlink(),
        lambda path: (path / "entry.json").unlink(),
        lambda path: (path / "entry.json").write_text("{"),
        lambda path: (path / "entry.json").write_text("{}"),
        lambda path: os.truncate(path / WEIGHTS_FILE, 5),
        lambda path: (path / CONFIG_FILE).write_bytes((path / CONFIG_FILE).read_bytes() + b" "),
        lambda path: path.rename(path.with_name("0123456789abcdef")),
        lambda path: path.parent.rename(path.parent.with_name("b")),
        lambda path: (shutil.rmtree(path), path.touch()),
    ],
    ids=[
        "no weights",
        "no configuration",
        "no entry file",
        "broken entry file",
        "empty entry file",
        "truncated",
        "too long",
        "another version",
        "another name",
        "a file",
    ],
)
def test_a_restart_drops_what_is_not_whole(make_cache, tmp_path, damage, keys) -> None:
    path = make_cache().fetch(keys["a"]).path
    damage(path)
    cache = make_cache()
    assert (cache.resident(), cache.size_bytes, on_disk(tmp_path / "cache")) == ([], 0, set())
    LoraWeights.load(cache.fetch(keys["a"]).path, name="a", version="x")
    assert on_disk(tmp_path / "cache") == whole("a")


def test_a_restart_clears_what_was_on_its_way(make_cache, tmp_path) -> None:
    half = tmp_path / "cache" / ".incoming" / "tmpabc" / "adapter"
    half.mkdir(parents=True)
    (half / WEIGHTS_FILE).write_bytes(b"half")
    cache = make_cache()
    assert (cache.resident(), on_disk(tmp_path / "cache")) == ([], set())


def test_a_folder_that_cannot_be_used_is_said_to_be(store, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LorauterError, match="cannot be used"):
        AdapterDiskCache(AdapterRepository(store), tmp_path / "file", budget_bytes=1)


def test_a_disk_that_fails_makes_the_adapter_unavailable(make_cache, tmp_path, keys) -> None:
    cache = make_cache()
    (tmp_path / "cache" / "a").touch()
    with pytest.raises(AdapterUnavailable, match="the disk cache failed"):
        cache.fetch(keys["a"])
    assert cache.fetch(keys["b"]).path.is_dir()


def test_what_is_on_disk_waits_for_no_download(store, make_cache, keys) -> None:
    cache = make_cache(downloads=1)
    cache.fetch(keys["a"])
    slow, go = threading.Event(), threading.Event()
    store.before_download = lambda key: (slow.set(), go.wait(10))
    flight = cache.submit(keys["b"])
    slow.wait(10)
    try:
        assert cache.submit(keys["a"]).done()
    finally:
        go.set()
    assert flight.result().key == keys["b"]


class Lender:
    """A source that copies what a peer has, or fails."""

    def __init__(self, repository: AdapterRepository) -> None:
        self.repository, self.asked, self.fails = repository, 0, False

    def fetch(self, key, room):
        self.asked += 1
        if self.fails:
            raise AdapterUnavailable("the source failed", adapter=key.name)
        return self.repository.fetch(key, room), "peer"


def test_what_a_peer_lent_is_counted_apart_from_downloads(store, make_cache, one, keys) -> None:
    lender = Lender(AdapterRepository(store))
    cache = make_cache(source=lender)
    cache.fetch(keys["a"])
    counters = cache.counters
    assert (counters.downloads, counters.downloaded_bytes, counters.peer_copies, counters.peer_bytes) == (0, 0, 1, one)
    held = cache.entry(keys["a"])
    held.manifest.check_files(held.path, "the entry")
    assert cache.entry(AdapterKey("a", "another")) is None


def test_after_a_source_that_fails_the_store_is_asked(store, make_cache, keys) -> None:
    lender = Lender(AdapterRepository(store))
    lender.fails = True
    cache = make_cache(source=lender)
    cache.fetch(keys["a"])
    assert (lender.asked, cache.counters.downloads, cache.counters.retries) == (1, 1, 1)


def test_an_entry_of_a_plain_folder_knows_its_hashes(store, make_cache, tmp_path, make_adapter) -> None:
    folder = make_adapter(tmp_path / "plain", "plain")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        store.write(f"plain/{file}", folder / file)
    key = AdapterRepository(store).manifest("plain").key
    first = make_cache()
    first.fetch(key)
    for cache in (first, make_cache()):
        held = cache.entry(key)
        assert all(file.sha256 for file in held.manifest.files.values())
        held.manifest.check_files(held.path, "the entry")


KILLED = """
import sys, time
from pathlib import Path
from lorauter.adapters import AdapterDiskCache, AdapterRepository, DirectoryStore

repository = AdapterRepository(DirectoryStore(Path(sys.argv[1])))
keys = [repository.manifest(name).key for name in repository.names()]
cache = AdapterDiskCache(repository, Path(sys.argv[2]), budget_bytes=150_000)
while True:
    for flight in [cache.submit(key) for key in keys]:
        flight.result()
    print("once more", flush=True)
"""


def test_killed_at_any_moment_it_leaves_whole_entries_alone(tmp_path, make_adapter) -> None:
    store = DirectoryStore(tmp_path / "store")
    for i in range(8):
        AdapterRepository(store).push(make_adapter(tmp_path / "pushed", f"a{i}", rank=256))
    root = tmp_path / "cache"
    found = 0
    for delay in (0.0, 0.03, 0.1):
        command = [sys.executable, "-c", KILLED, str(store.root), str(root)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()  # all were there once, and the cache is full: entries come and go
            time.sleep(delay)
            process.kill()
        # An entry under its name was whole before it got there, whatever came after.
        for path in root.glob("[!.]*/*"):
            AdapterManifest.from_json(
                json.loads((path / "entry.json").read_bytes()), name=path.parent.name
            ).check_files(path, "the disk")
            found += 1
    cache = AdapterDiskCache(AdapterRepository(store), root, budget_bytes=150_000)
    cache.close()
    assert found > 0
    assert (cache.size_bytes <= 150_000, list((root / ".incoming").iterdir())) == (True, [])
