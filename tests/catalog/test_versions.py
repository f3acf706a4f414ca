"""One version is current, whole, and made of all that was done, whoever writes, deletes or dies at the same time."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import publishing
import pytest

from lorauter.adapters import AdapterManifest, MemoryStore, ObjectStore, object_lock
from lorauter.catalog import (
    Catalog,
    build_catalog,
    catalog_versions,
    change_catalog,
    current_version,
    named_adapters,
    prune_versions,
    publish,
    use_version,
    with_adapter,
    with_tasks,
    without_tasks,
)
from lorauter.catalog.catalog import CURRENT_FILE, HEAD_FILE
from lorauter.catalog.parts import FOLDER, key_of
from lorauter.encoder import HashingEncoder
from lorauter.errors import CatalogError, Conflict, StoreUnavailable
from lorauter.tasks import Task

ENCODER = HashingEncoder(32)
SECONDS = float(os.environ.get("LORAUTER_PUBLISHING_S", "4"))

DYING = """
import os, signal, sys
from lorauter.catalog import Catalog, change_catalog, publish, without_tasks
import lorauter.catalog.versions as publishing
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "before the lock":
    publishing._make_current = die
else:
    Catalog.missing_in = die
change_catalog(sys.argv[1], lambda before: without_tasks(before, ["poems"]))
"""


@pytest.fixture
def tasks(make_task: Callable[..., Task]) -> dict[str, Task]:
    return {name: make_task(name) for name in ("poems", "rain", "sums", "tides")}


@pytest.fixture
def first(tasks: dict[str, Task]) -> Catalog:
    """Of poems and rain."""
    return build_catalog([tasks["poems"], tasks["rain"]], ENCODER)


@pytest.fixture
def memory(first: Catalog) -> MemoryStore:
    """A store in which that one is current."""
    memory = MemoryStore()
    first.save(memory)
    return memory


def adding(task: Task) -> Callable[[Catalog], Catalog]:
    return lambda before: with_tasks(before, [task], ENCODER)


def names(store: Any) -> list[str]:
    return [entry.name for entry in Catalog.load(store).tasks]


def meanwhile(store: MemoryStore, edit: Callable[[Catalog], Catalog]) -> Callable[[], object]:
    """What somebody else does who waits for no turn."""
    return lambda: edit(Catalog.load(store)).save(store)


def once_before(store: MemoryStore, method: str, key: str, act: Callable[[], object]) -> None:
    """Have something done by somebody else just before a method is called with a key that ends so."""
    real, left = getattr(store, method), [act]

    def call(got: str, *args: Any) -> Any:
        if left and got.endswith(key):
            left.pop()()
        return real(got, *args)

    setattr(store, method, call)


def test_versions_and_the_way_back(tasks: dict[str, Task]) -> None:
    store = MemoryStore()
    first = build_catalog([tasks["sums"]], ENCODER)
    second = with_tasks(first, [tasks["rain"]], ENCODER)
    for catalog in (first, second):
        catalog.save(store)
    store.write("notes/readme.txt", b"no version")
    assert catalog_versions(store) == sorted([first.version, second.version])
    assert current_version(store) == second.version
    assert use_version(store, first.version).version == first.version == current_version(store)
    store.objects[key_of(second.segments[0].digests[1])] = b"damaged"
    for version in (second.version, "0" * 16, "../etc"):
        with pytest.raises(CatalogError):
            use_version(store, version)
    assert current_version(store) == first.version


def test_what_any_version_of_a_catalog_names_is_known(tasks: dict[str, Task]) -> None:
    store, catalog = MemoryStore(), build_catalog(list(tasks.values()), ENCODER)
    for version in ("1" * 16, "2" * 16):
        with_adapter(catalog, AdapterManifest("wic", version, {})).save(store)
    assert named_adapters(store) == {("wic", "1" * 16), ("wic", "2" * 16)}
    store.objects = {key: content for key, content in store.objects.items() if not key.endswith(HEAD_FILE)}
    store.write(f"{'3' * 16}/{HEAD_FILE}.part", b"of a version that has no head yet")
    assert named_adapters(store) == set()
    with pytest.raises(CatalogError, match="there is none"):
        named_adapters(MemoryStore())


def test_old_versions_are_pruned_and_never_the_current_one(tasks: dict[str, Task]) -> None:
    store = MemoryStore()
    made = [build_catalog([task], ENCODER) for task in tasks.values()]
    assert prune_versions(store, keep=0, older_than_s=0) == []
    for age, catalog in enumerate(reversed(made)):
        catalog.save(store)
        store.times |= dict.fromkeys(store.files(catalog.version), 1000.0 - age)
    current, *others = (catalog.version for catalog in reversed(made))
    use_version(store, current)
    store.write(f"{'0' * 16}/examples.npy", b"of a version that an older lorauter began")
    assert prune_versions(store, keep=2, older_than_s=3600) == [others[2], others[1]]
    assert prune_versions(store, keep=2, older_than_s=3600) == []
    assert sorted(catalog_versions(store)) == sorted([current, others[0], "0" * 16])
    assert Catalog.load(store, version=others[0]).version == others[0]
    assert prune_versions(store, keep=0, older_than_s=0) == [others[0], "0" * 16]
    assert Catalog.load(store).version == current


def test_parts_go_with_the_last_version_that_has_them(tasks: dict[str, Task]) -> None:
    store, first = MemoryStore(), build_catalog([tasks["poems"], tasks["rain"]], ENCODER)
    second = dataclasses.replace(first, encoder="another")
    assert first.parts == second.parts
    third = with_tasks(first, [tasks["sums"]], ENCODER)
    for catalog in (first, second, third):
        catalog.save(store)
    store.write(key_of("0" * 64), b"of a version on its way into the store")
    times = dict(store.times)
    store.times |= dict.fromkeys(store.times, 1000.0) | {key_of("0" * 64): time.time()}
    store.times[f"{second.version}/{HEAD_FILE}"] = 1001.0
    use_version(store, third.version)
    assert prune_versions(store, keep=1, older_than_s=3600) == [first.version]
    assert Catalog.load(store, version=second.version).tasks[0] == first.tasks[0]
    assert prune_versions(store, keep=0, older_than_s=3600) == [second.version]
    assert set(store.files(FOLDER)) == {key_of(digest) for digest in (*third.parts, "0" * 64)}
    store.times = times | {key_of("0" * 64): 1000.0}
    store.write(f"{'1' * 16}/{HEAD_FILE}", b'{"format": 999, "parts": ["' + b"0" * 64 + b'"]}')
    prune_versions(store, keep=5, older_than_s=3600)
    assert key_of("0" * 64) in store.objects, "a version of a newer lorauter may have it"


def test_a_change_writes_what_it_changes_and_reads_no_more(
    make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorauter.catalog.segments._LEAST", 4)
    monkeypatch.setattr("lorauter.catalog.segments._MEAN", 4)
    monkeypatch.setattr("lorauter.catalog.sample.MOST_EXAMPLES", 20)
    store, many = Counted(), [make_task(f"task{i}", f"a question {i}", f"question {i} again") for i in range(100, 160)]
    before = build_catalog(many, ENCODER)
    before.save(store)
    assert len(before.segments) > 6
    assert before.sample.names != before.names
    outside = next(task for task in many if task.name not in before.sample.names)
    store.reads, store.writes = [], []
    after = change_catalog(store, adding(make_task(outside.name, "another question")))
    assert len(store.writes) == 5, "its segment's two parts, what all share, the head and the pointer"
    routing = {segment.digests[0] for segment in before.segments}
    examples = {segment.digests[1] for segment in before.segments}
    read = {key.rpartition("/")[2] for key in store.reads}
    assert routing < read
    assert len(examples & read) == 1, "the examples of its segment alone"
    store.reads, store.writes = [], []
    again = change_catalog(store, lambda catalog: without_tasks(catalog, [outside.name]), known=after)
    assert (routing | examples).isdisjoint({key.rpartition("/")[2] for key in store.reads} - again.parts)
    assert len(store.writes) <= 7
    anew = build_catalog([task for task in many if task.name != outside.name], ENCODER)
    assert anew.version == again.version


class Counted(MemoryStore):
    """One that remembers what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, key: str, content: bytes | Path) -> None:
        self.writes.append(key)
        super().write(key, content)


def test_a_pointer_that_names_nothing_is_told_and_mended(memory: MemoryStore, first: Catalog) -> None:
    for nonsense in (b"\xff\xfe", b"", b"../x"):
        memory.objects[CURRENT_FILE] = nonsense
        with pytest.raises(CatalogError):
            Catalog.load(memory)
        assert use_version(memory, first.version).version == current_version(memory) == first.version
    memory.objects[CURRENT_FILE] = b"\xff\xfe"
    with pytest.raises(CatalogError, match="lorauter catalog use"):
        current_version(memory)


@pytest.mark.parametrize("key", [HEAD_FILE, "", CURRENT_FILE])
def test_who_publishes_during_an_upload_or_just_before_the_swap_loses_nothing(
    memory: MemoryStore, tasks: dict[str, Task], key: str
) -> None:
    method = "locked" if key == CURRENT_FILE else "write"
    once_before(memory, method, key, meanwhile(memory, adding(tasks["sums"])))
    changed = change_catalog(memory, adding(tasks["tides"]))
    assert names(memory) == ["poems", "rain", "sums", "tides"]
    assert changed.version == current_version(memory)


def test_who_built_on_another_version_is_told_and_keeps_its_work(
    memory: MemoryStore, first: Catalog, tasks: dict[str, Task]
) -> None:
    theirs = change_catalog(memory, adding(tasks["sums"]))
    mine = with_tasks(first, [tasks["tides"]], ENCODER)
    for over in (first.version, None):
        with pytest.raises(Conflict) as caught:
            publish(mine, memory, over=over)
        for said in (theirs.version, mine.version, "lorauter catalog use"):
            assert said in str(caught.value)
        assert current_version(memory) == theirs.version
    assert use_version(memory, mine.version).version == current_version(memory) == mine.version


def test_of_two_first_ones_one_wins(store: ObjectStore, first: Catalog, tasks: dict[str, Task]) -> None:
    publish(first, store, over=None)
    publish(first, store, over=None)  # the same twice is no conflict
    with pytest.raises(Conflict):
        publish(build_catalog([tasks["sums"]], ENCODER), store, over=None)
    assert Catalog.load(store).version == first.version


def test_who_goes_back_is_told_of_a_version_that_came_meanwhile(
    memory: MemoryStore, first: Catalog, tasks: dict[str, Task]
) -> None:
    second = change_catalog(memory, adding(tasks["sums"]))
    once_before(memory, "locked", CURRENT_FILE, meanwhile(memory, adding(tasks["tides"])))
    with pytest.raises(Conflict):
        use_version(memory, first.version)
    assert current_version(memory) not in (first.version, second.version)
    assert use_version(memory, first.version).version == current_version(memory)


def test_two_changes_of_one_thing_are_a_conflict(
    memory: MemoryStore, tasks: dict[str, Task], make_task: Callable[..., Task]
) -> None:
    theirs, mine = make_task("rain", "theirs", "too"), make_task("rain", "mine", "too")
    for edit in (adding(mine), lambda before: without_tasks(before, ["rain"])):
        once_before(memory, "locked", CURRENT_FILE, meanwhile(memory, adding(theirs)))
        with pytest.raises(Conflict, match=r"task 'rain' meanwhile.*theirs stays"):
            change_catalog(memory, edit, tasks=["rain"])
        assert {entry.task for entry in Catalog.load(memory).tasks} == {tasks["poems"], theirs}
        change_catalog(memory, adding(tasks["rain"]), tasks=["rain"])
        once_before(memory, "locked", CURRENT_FILE, meanwhile(memory, adding(mine)))
        change_catalog(memory, adding(mine), tasks=["rain"])  # of one mind
        change_catalog(memory, adding(tasks["rain"]), tasks=["rain"])

    def taking(version: str) -> Callable[[Catalog], Catalog]:
        return lambda before: with_adapter(before, AdapterManifest("rain", version, {}))

    once_before(memory, "locked", CURRENT_FILE, meanwhile(memory, taking("1" * 16)))
    with pytest.raises(Conflict, match="adapter 'rain'"):
        change_catalog(memory, taking("2" * 16), adapters=["rain"])
    assert Catalog.load(memory).adapters == {"rain": "1" * 16}


def test_a_change_that_is_beaten_again_and_again_is_told(
    memory: MemoryStore, first: Catalog, make_task: Callable[..., Task]
) -> None:
    def edit(before: Catalog) -> Catalog:
        with_tasks(before, [make_task(f"theirs{len(before.tasks)}")], ENCODER).save(memory)
        return with_tasks(before, [make_task("mine")], ENCODER)

    with pytest.raises(Conflict, match=r"somebody else published it .* try again"):
        change_catalog(memory, edit)
    assert "mine" not in names(memory)
    assert set(names(memory)) > {"poems", "rain"}


def test_what_changes_nothing_publishes_nothing(memory: MemoryStore, first: Catalog) -> None:
    before = dict(memory.objects)
    assert change_catalog(memory, lambda catalog: catalog).version == first.version
    assert memory.objects == before


def test_a_catalog_that_is_not_there_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"is not there.*lorauter catalog build"):
        change_catalog(tmp_path / "mistyped", lambda catalog: catalog)
    assert not (tmp_path / "mistyped").exists()


def test_a_change_waits_for_its_turn_and_goes_on_without(
    memory: MemoryStore, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorauter.adapters.store.WAIT_S", 0.2)
    with memory.locked("CHANGE"):
        change_catalog(memory, adding(tasks["sums"]))
    assert names(memory) == ["poems", "rain", "sums"]


def test_a_version_that_is_deleted_on_its_way_back_is_whole_again(
    memory: MemoryStore, first: Catalog, tasks: dict[str, Task]
) -> None:
    def prune() -> None:
        assert prune_versions(memory, keep=0, older_than_s=0) == [first.version]

    second = change_catalog(memory, adding(tasks["sums"]))
    once_before(memory, "locked", CURRENT_FILE, prune)
    assert use_version(memory, first.version).version == first.version
    assert Catalog.load(memory).version == first.version
    once_before(memory, "locked", CURRENT_FILE, lambda: prune_versions(memory, keep=0, older_than_s=0))
    publish(second, memory, over=first.version)
    assert Catalog.load(memory).version == second.version


def test_a_version_that_is_current_again_once_pruning_comes_to_it_stays(
    memory: MemoryStore, first: Catalog, tasks: dict[str, Task]
) -> None:
    second = change_catalog(memory, adding(tasks["sums"]))
    once_before(memory, "locked", CURRENT_FILE, lambda: use_version(memory, first.version))
    assert prune_versions(memory, keep=0, older_than_s=0) == []
    assert Catalog.load(memory).version == first.version
    assert prune_versions(memory, keep=0, older_than_s=0) == [second.version]


def test_who_reads_a_version_that_is_replaced_and_deleted_meanwhile_reads_the_next(
    memory: MemoryStore, tasks: dict[str, Task]
) -> None:
    def replace() -> None:
        change_catalog(memory, adding(tasks["sums"]))
        prune_versions(memory, keep=0, older_than_s=0)

    once_before(memory, "read", HEAD_FILE, replace)
    assert names(memory) == ["poems", "rain", "sums"]


def test_a_store_that_fails_at_the_swap_keeps_what_was_current(
    memory: MemoryStore, first: Catalog, tasks: dict[str, Task], break_writes: Callable[[ObjectStore, int], None]
) -> None:
    mine = with_tasks(first, [tasks["sums"]], ENCODER)
    before = dict(memory.objects)
    mine.upload(memory)
    break_writes(memory, len(mine.parts) + 1)
    assert memory.objects.keys() > before.keys()
    with pytest.raises(StoreUnavailable):
        publish(mine, memory, over=first.version)
    assert Catalog.load(memory).version == first.version
    assert set(catalog_versions(memory)) == {first.version, mine.version}


@pytest.mark.parametrize("when", ["before the lock", "with the lock"])
@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_a_writer_that_is_killed_blocks_nobody_for_long_and_breaks_nothing(
    kind: str,
    when: str,
    first: Catalog,
    tasks: dict[str, Task],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_lock, "LEASE_S", 2.0)  # for which the others wait
    uri = str(tmp_path / "catalog") if kind == "directory" else request.getfixturevalue("bucket")
    first.save(uri)
    killed = subprocess.run([sys.executable, "-c", DYING, uri, when], check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert Catalog.load(uri).version == first.version
    assert len(catalog_versions(uri)) == 2, "its upload is there"
    started = time.monotonic()
    change_catalog(uri, adding(tasks["sums"]))
    assert time.monotonic() - started < 15
    assert names(uri) == ["poems", "rain", "sums"]
    assert len(prune_versions(uri, keep=0, older_than_s=0)) == 2
    assert names(uri) == ["poems", "rain", "sums"]


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_two_writers_and_one_that_prunes_lose_nothing(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """For LORAUTER_PUBLISHING_S seconds; `python benchmarks/publishing.py --seconds 60` does the same by itself."""
    root = str(tmp_path / "root") if kind == "directory" else request.getfixturevalue("bucket") + "/root"
    told, problems = publishing.run(root, SECONDS)
    assert problems == [], told
