"""What is removed, replaced, pruned and pushed at the same time."""

import time

import pytest

from lorauter.adapters.repository import MANIFEST_FILE, AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE
from lorauter.errors import AdapterNotFound, Conflict


def test_what_is_removed_is_not_found_nor_listed_and_leaves_nothing(store, tmp_path, make_adapter) -> None:
    repository = AdapterRepository(store)
    for place, settings in (("old", {}), ("new", {"rank": 3})):
        repository.push(make_adapter(tmp_path / place, "sst2", **settings))
    repository.push(make_adapter(tmp_path / "old", "wic"))
    repository.remove("sst2")
    assert repository.names() == ["wic"]
    for ask in (repository.manifest, repository.remove):
        with pytest.raises(AdapterNotFound):
            ask("sst2")
    assert repository.manifest("wic")
    with pytest.raises(AdapterNotFound):
        repository.remove("../wic")


def test_a_plain_folder_and_a_malformed_one_can_be_removed(memory, pushed, tmp_path, make_adapter) -> None:
    folder = make_adapter(tmp_path / "plain", "plain")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        memory.write(f"plain/{file}", folder / file)
    memory.objects[f"sst2/{MANIFEST_FILE}"] = b"{}"
    pushed.remove("plain")
    pushed.remove("sst2")
    assert memory.objects == {}


def test_replaced_versions_are_pruned_once_they_have_been_so_for_long(memory, pushed, tmp_path, make_adapter) -> None:
    old = pushed.manifest("sst2")
    new = pushed.push(make_adapter(tmp_path / "new", "sst2", rank=3))
    assert pushed.prune(keep=(), older_than_s=3600) == []
    memory.times = dict.fromkeys(memory.times, 0.0)
    memory.times[f"sst2/{MANIFEST_FILE}"] = time.time() - 60
    assert pushed.prune(keep=(), older_than_s=3600) == [], "it has been replaced a minute ago"
    assert pushed.prune(keep=(), older_than_s=30) == [("sst2", old.version)]
    assert pushed.prune(keep=(), older_than_s=0) == []
    assert pushed.names() == ["sst2"]
    pushed.download(new, tmp_path)
    assert not any(old.version in key for key in memory.objects)


def test_what_a_catalog_names_is_not_pruned(memory, pushed, tmp_path, make_adapter) -> None:
    old = pushed.manifest("sst2")
    pushed.push(make_adapter(tmp_path / "new", "sst2", rank=3))
    memory.times = {}
    assert pushed.prune(keep={old.key}, older_than_s=1) == []
    assert pushed.manifest(*old.key) == old
    pushed.download(old, tmp_path)
    assert pushed.prune(keep={("wic", old.version)}, older_than_s=1) == [old.key]
    with pytest.raises(AdapterNotFound, match=old.version):
        pushed.manifest(*old.key)


def test_every_version_can_be_had_by_its_name(pushed, tmp_path, make_adapter) -> None:
    old = pushed.manifest("sst2")
    new = pushed.push(make_adapter(tmp_path / "new", "sst2", rank=3))
    for manifest in (old, new):
        assert pushed.manifest(*manifest.key) == manifest
    for version in ("0" * 16, "../sst2", "", "x"):
        with pytest.raises(AdapterNotFound):
            pushed.manifest("sst2", version)


def test_the_newest_versions_are_those_of_the_manifests(store, tmp_path, make_adapter) -> None:
    repository = AdapterRepository(store)
    assert repository.newest() == {}
    for name in ("wic", "agnews"):
        repository.push(make_adapter(tmp_path / "one", name))
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        store.write(f"plain/{file}", make_adapter(tmp_path / "one", "plain") / file)
        store.write(f"base/{file}", b"a reserved name")
    store.write(f"half/{CONFIG_FILE}", b"{}")
    store.write("notes/readme.txt", b"")
    store.write(f"broken/{MANIFEST_FILE}", b"{}")

    def expected() -> dict[str, str]:
        return {name: AdapterRepository(store).manifest(name).version for name in ("agnews", "plain", "wic")}

    assert repository.newest() == expected()
    assert list(repository.newest()) == ["agnews", "plain", "wic"]
    before = repository.newest()
    repository.push(make_adapter(tmp_path / "two", "wic", rank=3))
    store.write(f"plain/{CONFIG_FILE}", make_adapter(tmp_path / "two", "plain", lora_alpha=3) / CONFIG_FILE)
    assert repository.newest() == expected()
    assert {name for name in before if before[name] != expected()[name]} == {"plain", "wic"}
    repository.remove("wic")
    repository.remove("plain")
    assert list(repository.newest()) == ["agnews"]


def test_manifests_are_read_again_only_where_they_changed(memory, pushed, tmp_path, make_adapter) -> None:
    for name in ("a", "b", "c"):
        pushed.push(make_adapter(tmp_path / "one", name))
    pushed.newest()
    memory.reads.clear()
    pushed.newest()
    assert memory.reads == []
    new = pushed.push(make_adapter(tmp_path / "two", "b", rank=3))
    memory.reads.clear()
    assert pushed.newest()["b"] == new.version
    assert memory.reads == ["b/adapter.json"]


def test_a_push_under_way_is_not_pruned(memory, pushed) -> None:
    memory.times = dict.fromkeys(memory.times, 0.0)
    memory.write(f"sst2/{'0' * 16}/{CONFIG_FILE}", b"{}")
    memory.write(f"sst2/notes/{CONFIG_FILE}", b"no version")
    assert pushed.prune(keep=(), older_than_s=3600) == []
    memory.times = dict.fromkeys(memory.times, 0.0)
    assert pushed.prune(keep=(), older_than_s=3600) == [("sst2", "0" * 16)]
    assert f"sst2/notes/{CONFIG_FILE}" in memory.objects


def test_pruning_leaves_a_malformed_adapter_alone_and_clears_what_a_removal_left(memory, pushed) -> None:
    version = pushed.manifest("sst2").version
    memory.times = {}
    sound = memory.objects[f"sst2/{MANIFEST_FILE}"]
    memory.objects[f"sst2/{MANIFEST_FILE}"] = b"{}"
    assert pushed.prune(keep=(), older_than_s=1) == []
    memory.objects[f"sst2/{MANIFEST_FILE}"] = sound
    assert pushed.prune(keep=(), older_than_s=1) == []
    del memory.objects[f"sst2/{MANIFEST_FILE}"]
    assert pushed.prune(keep=(), older_than_s=1) == [("sst2", version)]
    assert memory.objects == {}


def test_a_plain_folder_that_took_an_adapters_place_outlives_its_versions(memory, pushed, tmp_path, make_adapter):
    version = pushed.manifest("sst2").version
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        memory.objects[f"sst2/{file}"] = memory.objects[f"sst2/{version}/{file}"]
    del memory.objects[f"sst2/{MANIFEST_FILE}"]
    memory.times = {}
    assert pushed.prune(keep=(), older_than_s=1) == [("sst2", version)]
    assert pushed.manifest("sst2")


def _before_it_is_locked(memory, act) -> None:
    """Have something done by somebody else just before a manifest is locked the next time."""
    real, left = memory.locked, [act]

    def locked(key):
        if left:
            left.pop()()
        return real(key)

    memory.locked = locked


def test_of_two_who_push_at_once_one_is_told(memory, pushed, tmp_path, make_adapter) -> None:
    mine, theirs = (make_adapter(tmp_path / who, "sst2", rank=rank) for who, rank in (("mine", 3), ("theirs", 4)))
    _before_it_is_locked(memory, lambda: pushed.push(theirs))
    with pytest.raises(Conflict, match=r"somebody else pushed .* push it again"):
        pushed.push(mine)
    assert pushed.manifest("sst2").rank == 4
    assert pushed.push(mine) == pushed.manifest("sst2")
    _before_it_is_locked(memory, lambda: pushed.remove("sst2"))
    with pytest.raises(Conflict, match="removed it"):
        pushed.push(theirs)
    assert pushed.names() == []
    _before_it_is_locked(memory, lambda: pushed.push(mine))
    pushed.push(mine)  # the same twice is no conflict


def test_a_version_that_is_deleted_before_it_is_current_is_sent_again(memory, pushed, tmp_path, make_adapter) -> None:
    def delete() -> None:
        assert pushed.prune(keep=(), older_than_s=0) == [("sst2", new)]

    folder = make_adapter(tmp_path / "new", "sst2", rank=3)
    new = AdapterRepository(MemoryStore()).push(folder).version
    _before_it_is_locked(memory, delete)
    assert pushed.push(folder).version == new
    pushed.download(pushed.manifest("sst2"), tmp_path)


def test_a_version_that_is_current_again_once_it_is_to_be_deleted_stays(memory, pushed, tmp_path, make_adapter) -> None:
    old = pushed.manifest("sst2")
    pushed.push(make_adapter(tmp_path / "new", "sst2", rank=3))
    _before_it_is_locked(memory, lambda: pushed.push(tmp_path / "pushed" / "sst2"))
    assert pushed.prune(keep=(), older_than_s=0) == []
    assert pushed.manifest("sst2") == old
    pushed.download(old, tmp_path)


def test_what_was_pushed_is_current_until_somebody_pushes_another(memory, pushed, tmp_path, make_adapter) -> None:
    mine = pushed.manifest("sst2")
    pushed.check_current(mine)
    pushed.push(make_adapter(tmp_path / "new", "sst2", rank=3))
    with pytest.raises(Conflict, match="in place of"):
        pushed.check_current(mine)
