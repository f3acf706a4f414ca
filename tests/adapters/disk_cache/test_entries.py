"""What lies on the disk: discarded, vandalised, taken over by the next process, lent by peers, killed on the way."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from cache_folders import names, on_disk, whole

from lorauter.adapters.disk_cache import AdapterDiskCache
from lorauter.adapters.repository import AdapterManifest, AdapterRepository
from lorauter.adapters.store import DirectoryStore
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE, LoraWeights
from lorauter.errors import AdapterUnavailable, LorauterError
from lorauter.names import AdapterKey


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
