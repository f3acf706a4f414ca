import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from lorauter.adapters.clouds import CloudStore
from lorauter.adapters.store import DirectoryStore, MemoryStore, open_store
from lorauter.errors import ConfigError, ObjectNotFound, StoreUnavailable

KEY = "sst2/0a1b/adapter_model.safetensors"


def test_when_an_object_was_written_is_known(store) -> None:
    before = time.time()
    store.write("a/b", b"content")
    assert before - 2 <= store.modified("a/b") <= time.time() + 2
    with pytest.raises(ObjectNotFound):
        store.modified("a/none")


def test_an_object_is_written_read_copied_and_replaced(store, tmp_path) -> None:
    (tmp_path / "source").write_bytes(b"of a file")
    for content in (b"of bytes", tmp_path / "source", b""):
        store.write(KEY, content)
        expected = content.read_bytes() if isinstance(content, Path) else content
        store.download(KEY, tmp_path / "target")
        assert store.read(KEY) == (tmp_path / "target").read_bytes() == expected
        assert store.fingerprint(KEY)[0] == len(expected)


def test_the_tag_follows_the_content(store) -> None:
    tags = []
    for content in (b"one", b"two", b"one"):
        store.write("a/x", content)
        tags.append(store.fingerprint("a/x")[1])
    assert tags[0] != tags[1] != tags[2]
    assert (tags[0] == tags[2]) == (not isinstance(store, CloudStore)), "of the content alone, but in Azure's"


@pytest.mark.parametrize("missing", ["sst2/none", "none/none", "sst2", "sst2/0a1b", KEY + "x"])
def test_what_is_not_there_is_not_found(store, tmp_path, missing) -> None:
    store.write(KEY, b"x")
    for ask in (store.read, store.fingerprint, lambda key: store.download(key, tmp_path / "target")):
        with pytest.raises(ObjectNotFound) as caught:
            ask(missing)
        assert caught.value.uri.endswith(missing)


def test_a_deleted_object_is_gone_and_may_be_deleted_again(store) -> None:
    store.write("a/b/c", b"x")
    store.delete("a/b/c")
    store.delete("a/b/c")
    with pytest.raises(ObjectNotFound):
        store.read("a/b/c")
    assert store.children() == []


def test_children_are_the_first_parts_with_objects_under_them(store) -> None:
    assert store.children() == store.children("a") == []
    for key in ("b/x", "a/1/x", "a/1/y", "a/2/x", "a/top", "ab/3/x", "top"):
        store.write(key, b"x")
    assert store.children() == ["a", "ab", "b"]
    assert store.children("a") == ["1", "2"]
    assert store.children("a/1") == store.children("none") == store.children("top") == []


def test_a_key_may_hold_what_urls_escape(store) -> None:
    key = "a b/ü+%20&=x.json"
    store.write(key, b"x")
    assert store.read(key) == b"x"
    assert store.children() == ["a b"]


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "a/..", "/etc/hostname", "", ".", "/"])
def test_a_directory_keeps_to_itself(tmp_path, key) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    store = DirectoryStore(tmp_path / "root")
    store.write("a/b", b"x")
    target = tmp_path / "target"
    for ask in (store.read, store.fingerprint, store.delete):
        with pytest.raises(ObjectNotFound):
            ask(key)
    with pytest.raises(ObjectNotFound):
        store.download(key, target)
    with pytest.raises(ObjectNotFound):
        store.write(key, b"overwritten")
    assert not target.exists()
    assert (tmp_path / "outside").read_bytes() == b"secret"


@pytest.mark.parametrize("prefix", ["..", "../root", "/"])
def test_a_directory_lists_nothing_outside(tmp_path, prefix) -> None:
    store = DirectoryStore(tmp_path / "root")
    store.write("a/b", b"x")
    assert store.children(prefix) == []


def test_a_directory_lists_neither_hidden_nor_empty_folders(tmp_path) -> None:
    (tmp_path / ".git" / "x").mkdir(parents=True)
    (tmp_path / ".git" / "y").write_bytes(b"x")
    (tmp_path / "empty" / "empty").mkdir(parents=True)
    assert DirectoryStore(tmp_path).children() == []


def test_a_directory_that_fails_to_write_keeps_the_old_object_whole(tmp_path) -> None:
    store = DirectoryStore(tmp_path / "root")
    store.write("a/b", b"old")
    with pytest.raises(ObjectNotFound):
        store.write("a/b", tmp_path / "no such source")
    assert store.read("a/b") == b"old"
    assert [p.name for p in (tmp_path / "root" / "a").iterdir()] == ["b"]


def test_a_directorys_files_are_for_all_who_may_read_files_there(tmp_path) -> None:
    """A service is often another user than who pushes."""
    before = os.umask(0o027)
    try:
        DirectoryStore(tmp_path).write("a/b", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o640


def test_a_reader_of_a_directory_sees_one_content_or_the_other(tmp_path) -> None:
    store = DirectoryStore(tmp_path)
    contents = {bytes([i]) * 300_000 for i in (1, 2)}
    store.write("a/b", min(contents))
    done = threading.Event()

    def rewrite() -> None:
        for _ in range(100):
            for content in contents:
                store.write("a/b", content)
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(store.read("a/b"))
    writer.join()
    assert seen == contents


def test_a_copied_directory_has_the_same_tags(tmp_path) -> None:
    store = DirectoryStore(tmp_path / "one")
    store.write("a/b", b"x")
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copy)
    assert DirectoryStore(tmp_path / "two").fingerprint("a/b") == store.fingerprint("a/b")


def test_what_the_file_system_refuses_is_the_stores_fault(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StoreUnavailable):
        DirectoryStore(tmp_path / "file").write("a/b", b"x")
    with pytest.raises(StoreUnavailable):
        DirectoryStore(tmp_path).read("x" * 300)
    with pytest.raises(StoreUnavailable):
        DirectoryStore(tmp_path).fingerprint("x" * 300)


def test_the_fake_that_is_down_fails_every_call(tmp_path) -> None:
    store = MemoryStore({"a/b": b"x"})
    store.down = True
    calls = [
        store.children,
        lambda: store.read("a/b"),
        lambda: store.fingerprint("a/b"),
        lambda: store.download("a/b", tmp_path / "x"),
        lambda: store.write("a/b", b"y"),
        lambda: store.delete("a/b"),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable):
            call()
    store.down = False
    assert store.read("a/b") == b"x"


def test_a_store_is_opened_by_its_uri(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in (tmp_path / "x", str(tmp_path / "x"), f"file://{tmp_path}/x", "~/x"):
        assert open_store(uri).uri == str(tmp_path / "x")
    for uri in ("s3://bucket/some/prefix", "s3://bucket/some/prefix/"):
        assert open_store(uri).uri == "s3://bucket/some/prefix"
    assert open_store("s3://bucket").uri == "s3://bucket"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://host/x", "unknown scheme 'ftp'; use a folder, s3://"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no"),
        ("gs:///x", "names no bucket; use gs://bucket/prefix"),
        ("az://", "names no container; use az://container/prefix"),
    ],
)
def test_a_wrong_uri_is_a_config_error(uri, said) -> None:
    with pytest.raises(ConfigError, match=said):
        open_store(uri)


def test_files_are_listed_with_their_sizes_below_a_prefix(store) -> None:
    assert store.files() == {}
    for key in ("b/x", "a/1/x", "a/top", "ab/x", "top"):
        store.write(key, key.encode())
    assert store.files() == {"a/1/x": 5, "a/top": 5, "ab/x": 4, "b/x": 3, "top": 3}
    assert store.files("a") == {"a/1/x": 5, "a/top": 5}
    assert store.files("none") == {}


def test_an_object_is_read_in_parts(store) -> None:
    content = bytes(range(256)) * 40_000  # of more than one part in S3
    store.write(KEY, content)
    with store.open(KEY) as file:
        assert file.read(3) == content[:3]
        assert file.seek(-5, 2) == len(content) - 5
        assert file.read(10) == content[-5:]
        file.seek(4_999_999)
        assert file.tell() == 4_999_999
        assert file.read(100) == content[4_999_999:5_000_099]
        file.seek(0)
        assert file.read() == content
        assert file.read() == b""
    with pytest.raises(ObjectNotFound), store.open("none/none") as file:
        file.read()
