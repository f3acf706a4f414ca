"""The locks of stores: every kind keeps writers apart, and none is held by the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conditional_s3 import ConditionalS3

import lorauter.adapters.s3
from lorauter.adapters import object_lock
from lorauter.adapters import store as stores
from lorauter.adapters.store import DirectoryStore, MemoryStore, ObjectStore, open_store
from lorauter.errors import Conflict, ObjectNotFound, StoreUnavailable

DYING = """
import os, signal, sys
from lorauter.adapters.store import open_store
with open_store(sys.argv[1]).locked("CURRENT") as held:
    print("held", flush=True)
    signal.pause()
"""


@pytest.fixture
def conditional(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConditionalS3]:
    """A store that honours conditions, which the AWS settings of this process point at."""
    with ConditionalS3(int(s3.endpoint.rpartition(":")[2])) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        monkeypatch.setattr(lorauter.adapters.s3, "_client", None)
        yield server
    lorauter.adapters.s3._client = None


def test_the_object_is_what_it_was_and_becomes_what_is_written(store: ObjectStore) -> None:
    with store.locked("CURRENT") as held:
        assert held.content is None
        held.write(b"one")
        held.write(b"two")
    with store.locked("CURRENT") as held:
        assert held.content == b"two"
        held.delete("a/b")  # not there
        held.delete("CURRENT")
    with pytest.raises(ObjectNotFound):
        store.read("CURRENT")
    assert (store.files(), store.children()) == ({}, []), "locks are hidden"


def test_no_count_is_lost_of_many_threads(store: ObjectStore) -> None:
    def count() -> None:
        for _ in range(4):
            with store.locked("CURRENT") as held:
                held.write(b"%d" % (int(held.content or b"0") + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("CURRENT") == b"16"


def test_objects_are_locked_one_by_one(store: ObjectStore) -> None:
    with store.locked("a/x"), store.locked("b/x") as other:
        other.write(b"x")
    assert store.files() == {"b/x": 1}


def test_what_the_holder_raises_comes_out_and_the_lock_is_free(store: ObjectStore) -> None:
    for error in (OSError("its own"), Conflict("its own"), KeyboardInterrupt()):
        with pytest.raises(type(error)), store.locked("CURRENT"):
            raise error
    with store.locked("CURRENT") as held:
        held.write(b"x")


def test_who_asks_for_no_lock_is_not_overwritten_where_that_can_be_seen(tmp_path: Path) -> None:
    for store in (MemoryStore(), DirectoryStore(tmp_path)):
        for before in (None, b"old"):
            with store.locked("CURRENT") as held:
                assert held.content == before
                store.write("CURRENT", b"old" if before is None else b"of somebody else")
                with pytest.raises(Conflict, match="changed meanwhile"):
                    held.write(b"mine")


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_who_dies_with_the_lock_gives_it_back(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_lock, "LEASE_S", 2.0)
    uri = str(tmp_path) if kind == "directory" else request.getfixturevalue("bucket")
    process = subprocess.Popen([sys.executable, "-c", DYING, uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    took: list[float] = []

    def take() -> None:
        started = time.monotonic()
        with open_store(uri).locked("CURRENT") as held:
            took.append(time.monotonic() - started)
            held.write(b"x")

    waiting = threading.Thread(target=take)
    waiting.start()
    waiting.join(0.5)
    assert took == [], "it lives"
    process.kill()
    process.wait()
    process.stdout.close()
    waiting.join(20)
    assert 0.5 < took[0] < 10
    take()
    assert took[1] < 2, "what it left is cleared away"


def test_who_waits_too_long_is_told(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "WAIT_S", 0.3)
    monkeypatch.setattr(object_lock, "WAIT_S", 0.3)
    with (
        store.locked("CURRENT"),
        pytest.raises(StoreUnavailable, match=r"other writers have had their turns.*try again"),
        store.locked("CURRENT"),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_the_stores_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable), DirectoryStore(tmp_path / "file").locked("CURRENT"):
        pass


def test_a_missing_bucket_and_a_store_that_is_down_are_told_soon(s3: Any, bucket: str) -> None:
    with pytest.raises(ObjectNotFound), open_store("s3://no-such-bucket").locked("CURRENT") as held:
        held.write(b"x")
    s3.stop()
    try:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable), open_store(bucket).locked("CURRENT"):
            pass
        assert time.monotonic() - started < 10
    finally:
        s3.start()


def test_a_slow_holder_changes_nothing_once_its_turn_may_be_over(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_lock, "_HOLD_S", 0.2)
    store = open_store(bucket)
    store.write("CURRENT", b"old")
    with store.locked("CURRENT") as held:
        time.sleep(0.3)
        for act in (lambda: held.write(b"new"), lambda: held.delete("CURRENT")):
            with pytest.raises(Conflict, match="too slow"):
                act()
    assert store.read("CURRENT") == b"old"


def test_first_come_first_served_whoever_claims_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Claims:
        def __init__(self) -> None:
            self.there = [f"{0:020d}-an-earlier-one-1"]
            self.put_at: list[list[str]] = []

        def names(self) -> list[str]:
            return sorted(self.there)

        def put(self, name: str) -> None:
            self.put_at.append(self.names())
            self.there.append(name)

        def delete(self, name: str) -> None:
            if name in self.there:
                self.there.remove(name)

    claims = Claims()
    monkeypatch.setattr(object_lock, "WAIT_S", 0.3)
    with pytest.raises(StoreUnavailable), object_lock.turn(claims, "it"):
        pass
    assert claims.put_at == [], "nobody claims before who came earlier"
    claims.there[0] = f"{9:020d}".replace("0", "9") + "-a-later-one-1"
    with pytest.raises(StoreUnavailable), object_lock.turn(claims, "it"):
        pass
    assert len(claims.put_at) >= 1, "a later one is outstayed"
    assert len(claims.there) == 1, "and who leaves takes its claim away"
    monkeypatch.setattr(object_lock, "LEASE_S", 0.1)
    with object_lock.turn(claims, "it") as lease:
        lease.check()
        assert len(claims.there) == 1
        assert "a-later-one" not in claims.there[0]
    assert claims.there == []


def test_conditions_hold_where_the_store_has_them(conditional: ConditionalS3, bucket: str) -> None:
    store = open_store(bucket)
    for before in (None, b"old"):
        with store.locked("CURRENT") as held:
            assert held.content == before
            store.write("CURRENT", b"old" if before is None else b"of somebody else")  # who asks for no lock
            with pytest.raises(Conflict, match="changed meanwhile"):
                held.write(b"mine")
    with store.locked("CURRENT") as held:
        store.delete("CURRENT")
        with pytest.raises(Conflict):
            held.write(b"mine")
    with store.locked("CURRENT") as held:
        held.write(b"one")
        held.write(b"two")
    assert store.read("CURRENT") == b"two"
    assert conditional.refused == 3


@pytest.mark.parametrize("lost", ["the answer", "the request"])
def test_an_answer_that_does_not_come_is_looked_after(conditional: ConditionalS3, bucket: str, lost: str) -> None:
    store = open_store(bucket)
    store.write("CURRENT", b"old")
    with store.locked("CURRENT") as held:
        conditional.failing_puts = 1
        conditional.before_it_is_done = lost == "the request"
        held.write(b"new")
    assert store.read("CURRENT") == b"new"


def test_a_store_that_has_no_conditions_and_says_so_is_written_under_the_lock(
    conditional: ConditionalS3, bucket: str
) -> None:
    conditional.not_implemented = True
    store = open_store(bucket)
    for content in (b"one", b"two"):
        with store.locked("CURRENT") as held:
            held.write(content)
    assert store.read("CURRENT") == b"two"


def test_a_writer_that_stood_still_for_longer_than_its_turn_overwrites_nothing(
    conditional: ConditionalS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing but the store's own condition can help: the clock was looked at before."""
    monkeypatch.setattr(object_lock, "LEASE_S", 0.3)
    store = open_store(bucket)
    with store.locked("CURRENT") as sleeper:
        with store.locked("CURRENT") as other:
            other.write(b"of the other")
        monkeypatch.setattr(object_lock, "_HOLD_S", 60.0)
        with pytest.raises(Conflict, match="changed meanwhile"):
            sleeper.write(b"of the sleeper")
    assert store.read("CURRENT") == b"of the other"


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_who_stands_still_with_the_lock_blocks_nobody_for_ever(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_lock, "LEASE_S", 1.0)
    monkeypatch.setattr(stores, "WAIT_S", 1.0)
    uri = str(tmp_path) if kind == "directory" else request.getfixturevalue("bucket")
    process = subprocess.Popen([sys.executable, "-c", DYING, uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGSTOP)
    try:
        if kind == "directory":
            with pytest.raises(StoreUnavailable, match="try again"), open_store(uri).locked("CURRENT"):
                pass
        else:
            with open_store(uri).locked("CURRENT") as held:
                held.write(b"x")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
