from __future__ import annotations

import asyncio
import resource
import shutil
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deployments.host_adapters
from deployments.host_adapters import HostAdapters
from lorauter.adapters import AdapterManifest, LocalAdapter, LoraWeights
from lorauter.adapters.repository import StoredFile, sha256_of
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE
from lorauter.errors import AdapterNotFound, AdapterRejected, AdapterUnavailable
from lorauter.names import AdapterKey

NBYTES = 4 * 2 * 8 * 4  # of a tiny adapter: A and B of rank 2 for two square layers, float32


V1, V2 = "1" * 16, "2" * 16


class FakeFiles:
    """A node's cache over folders of versions, of which a discarded one is written anew.

    Attributes:
        manifests: what there is.
        asked: every fetch.
        discarded: what was discarded.
        on_fetch: called before each copy is handed out.
    """

    def __init__(self, root: Path, write: Callable[..., Path]) -> None:
        self._root = root
        self._write = write
        self.manifests: dict[AdapterKey, AdapterManifest] = {}
        self.asked: list[AdapterKey] = []
        self.discarded: list[AdapterKey] = []
        self.on_fetch: Callable[[AdapterKey], None] = lambda key: None
        self.down = False

    def add(self, name: str, version: str = V1, **changes: Any) -> AdapterKey:
        """Have a version; `changes` go to the folder's writer."""
        key = AdapterKey(name, version)
        folder = self._write(self._root / version, name, **changes)
        files = {file.name: StoredFile(file.name, file.stat().st_size, sha256_of(file)) for file in folder.iterdir()}
        self.manifests[key] = AdapterManifest(*key, files)
        return key

    def path(self, key: AdapterKey) -> Path:
        return self._root / key.version / key.name

    async def fetch(self, key: AdapterKey, *, patient: bool = True) -> LocalAdapter:
        self.asked.append(key)
        await asyncio.sleep(0)
        if key not in self.manifests:
            raise AdapterNotFound("not found", adapter=key.name)
        if self.down:
            raise AdapterUnavailable("the store is down", adapter=key.name)
        self.on_fetch(key)
        return LocalAdapter(self.manifests[key], self.path(key))

    async def discard(self, key: AdapterKey) -> None:
        self.discarded.append(key)
        self.repair(key)

    def repair(self, key: AdapterKey) -> None:
        """What a fetch after a discard brings; by default the same as before."""


A, B, C = (AdapterKey(name, V1) for name in "abc")


@pytest.fixture
def files(tmp_path: Path, make_adapter: Callable[..., Path]) -> FakeFiles:
    files = FakeFiles(tmp_path, make_adapter)
    for name in ("a", "b", "c"):
        files.add(name)
    return files


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.host_adapters, "_PAUSE_S", 0)


def serve_rank_2(local: LocalAdapter) -> LoraWeights:
    weights = LoraWeights.load(local.path, name=local.key.name, version=local.key.version)
    if weights.rank > 2:
        raise AdapterRejected(f"has rank {weights.rank}", adapter=weights.name)
    return weights


def host(files: FakeFiles, *, budget_bytes: int = 1 << 20) -> HostAdapters[LoraWeights]:
    return HostAdapters(files, serve_rank_2, budget_bytes=budget_bytes)


def test_an_adapter_is_asked_for_once(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        first, second = await adapters.get(A), await adapters.get(A)
        assert first is second
        assert first.key == A
        assert first.nbytes == NBYTES
        assert files.asked == [A]
        assert (adapters.counters.hits, adapters.counters.misses) == (1, 1)

    asyncio.run(scenario())


def test_many_who_ask_at_once_share_one_load(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        found = await asyncio.gather(*[adapters.get(key) for _ in range(20) for key in (A, B)])
        assert len({id(weights) for weights in found}) == 2
        assert sorted(files.asked) == [A, B]

    asyncio.run(scenario())


def test_who_gives_up_does_not_spoil_it_for_others(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        first = asyncio.create_task(adapters.get(A))
        second = asyncio.create_task(adapters.get(A))
        for _ in range(3):
            await asyncio.sleep(0)
        first.cancel()
        assert (await second).key == A
        assert (await asyncio.gather(first, return_exceptions=True))[0].__class__ is asyncio.CancelledError

    asyncio.run(scenario())


def test_the_least_recently_used_leaves_when_bytes_run_out(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files, budget_bytes=2 * NBYTES)
        a, b = await adapters.get(A), await adapters.get(B)
        assert await adapters.get(A) is a
        await adapters.get(C)
        assert adapters.resident == [A, C]
        assert await adapters.get(A) is a
        assert await adapters.get(B) is not b

    asyncio.run(scenario())


def test_an_adapter_larger_than_the_budget_is_served_all_the_same(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files, budget_bytes=1)
        for _ in range(2):
            assert [(await adapters.get(key)).key for key in (A, B, C, A)] == [A, B, C, A]
        alone = await adapters.get(B)
        assert await adapters.get(B) is alone

    asyncio.run(scenario())


def test_versions_of_one_adapter_are_kept_apart(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        new = files.add("a", V2, fill=1.0)
        one, other = await adapters.get(A), await adapters.get(new)
        assert (one.key, other.key) == (A, new)
        assert not torch.equal(one.tensors[0, "q_proj"][0], other.tensors[0, "q_proj"][0])
        assert await adapters.get(A) is one
        assert await adapters.get(new) is other

    asyncio.run(scenario())


def test_a_slow_load_of_an_old_version_takes_no_new_ones_place(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        new = files.add("a", V2)
        read = adapters._read_local

        def slowly(local: LocalAdapter) -> LoraWeights:
            time.sleep(0.2 if local.key == A else 0)
            return read(local)

        adapters._read_local = slowly
        old = asyncio.create_task(adapters.get(A))
        await asyncio.sleep(0.02)
        assert (await adapters.get(new)).key == new
        assert (await old).key == A
        assert (await adapters.get(new)).key == new

    asyncio.run(scenario())


def test_a_damaged_copy_is_discarded_and_fetched_once_more(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        path = files.path(A) / WEIGHTS_FILE
        content = path.read_bytes()
        path.write_bytes(content[:-10])
        files.repair = lambda key: path.write_bytes(content)  # type: ignore[assignment,method-assign,return-value]
        found = await asyncio.gather(*[adapters.get(A) for _ in range(5)])
        assert {weights.key for weights in found} == {A}
        assert files.discarded == [A]

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["the folder", WEIGHTS_FILE, CONFIG_FILE])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_copy_that_is_evicted_before_it_is_read_says_nothing_of_its_adapter(
    files: FakeFiles, times: int, what: str
) -> None:
    kept = files.path(A).with_name("kept")
    shutil.copytree(files.path(A), kept)

    def evict(key: AdapterKey) -> None:
        shutil.rmtree(files.path(key), ignore_errors=True)
        shutil.copytree(kept, files.path(key))
        if len(files.asked) <= times:
            path = files.path(key) / ("" if what == "the folder" else what)
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    async def scenario() -> None:
        adapters = host(files)
        files.on_fetch = evict
        assert (await adapters.get(A)).key == A
        assert len(files.asked) == times + 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),
        RuntimeError("unable to open file in read-only mode: Too many open files (24)"),  # torch's
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
    ],
)
@pytest.mark.parametrize("times", [1, 2, 3, 4, 5])
def test_trouble_of_the_machine_says_nothing_of_an_adapter(
    files: FakeFiles, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
) -> None:
    """However it comes out, and however often, beside copies that are sound."""
    load, left = LoraWeights.load, [error] * times

    def failing(path: Path, **of: str) -> LoraWeights:
        if left:
            cause = left.pop()
            if times % 2:
                raise cause
            unreadable = ValueError("cannot be read")
            unreadable.__cause__ = cause
            raise AdapterRejected("cannot be read", adapter=of["name"]) from unreadable
        return load(path, **of)

    monkeypatch.setattr(LoraWeights, "load", failing)

    async def scenario() -> None:
        adapters = host(files)
        for _ in range(times // deployments.host_adapters._COPIES):
            with pytest.raises(AdapterUnavailable, match="cannot be read"):
                await adapters.get(A)
        assert (await adapters.get(A)).key == A
        assert files.discarded == []

    asyncio.run(scenario())


def test_a_file_that_is_too_deep_is_its_adapters_own_fault(files: FakeFiles) -> None:
    """Though what Python says of it is a RuntimeError."""
    deep = files.add("deep")
    config = files.path(deep) / CONFIG_FILE
    config.write_text('{"a":' * 100_000)
    files.manifests[deep] = AdapterManifest(
        *deep,
        {file.name: StoredFile(file.name, file.stat().st_size, sha256_of(file)) for file in config.parent.iterdir()},
    )

    async def scenario() -> None:
        adapters = host(files)
        for _ in range(2):
            with pytest.raises(AdapterRejected):
                await adapters.get(deep)
        assert len(files.asked) == 2

    asyncio.run(scenario())


def test_a_disk_that_fails_for_long_makes_an_adapter_unavailable_and_never_refused(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        for name in ("many", "open", "files"):
            files.add(name)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        await adapters.get(A)  # the threads are there
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # nothing more can be opened
        try:
            for name in ("many", "open", "files"):
                with pytest.raises(AdapterUnavailable, match="cannot be read"):
                    await adapters.get(AdapterKey(name, V1))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert files.discarded == [], "the copies are sound"
        for name in ("many", "open", "files"):
            assert (await adapters.get(AdapterKey(name, V1))).name == name

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changes", "cause"),
    [({"rank": 3}, "rank 3"), ({"fill": float("nan")}, "NaN"), ({"peft_type": "IA3"}, "IA3")],
)
def test_a_bad_adapter_is_refused_by_name_without_reading_it_again(
    files: FakeFiles, changes: dict[str, Any], cause: str
) -> None:
    def refusal(task: Awaitable[Any]) -> Awaitable[AdapterRejected]:
        async def catch() -> AdapterRejected:
            with pytest.raises(AdapterRejected, match=cause) as caught:
                await task
            return caught.value

        return catch()

    async def scenario() -> None:
        adapters = host(files)
        bad = files.add("bad", **changes)
        errors = await asyncio.gather(*[refusal(adapters.get(bad)) for _ in range(5)])
        assert {error.adapter for error in errors} == {"bad"}
        asked = len(files.asked)
        files.add("bad")  # sound now; but under a version that is known to be bad, nobody looks
        depths = []
        for _ in range(5):
            error = await refusal(adapters.get(bad))
            depths.append(len(traceback.extract_tb(error.__traceback__)))
        assert depths[0] == depths[-1], "the kept error grows with every request"
        assert len(files.asked) == asked
        assert files.discarded == [], "the copy is what the store has"
        assert (await adapters.get(A)).key == A
        new = files.add("bad", V2)
        assert (await adapters.get(new)).key == new

    asyncio.run(scenario())


def test_what_is_not_there_or_not_to_be_had_can_come_later(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        with pytest.raises(AdapterNotFound, match="nowhere"):
            await adapters.get(AdapterKey("nowhere", V1))
        files.down = True
        with pytest.raises(AdapterUnavailable, match="'a'"):
            await adapters.get(A)
        files.down = False
        assert (await adapters.get(A)).name == "a"
        files.down = True
        assert (await adapters.get(A)).name == "a", "what is in memory needs nobody"

    asyncio.run(scenario())


def test_an_adapter_in_memory_is_known_to_come_from_where_it_was(files: FakeFiles) -> None:
    async def scenario() -> None:
        fetch = files.fetch

        async def fetch_from_a_peer(key: AdapterKey, *, patient: bool = True) -> LocalAdapter:
            return replace(await fetch(key), tier="peer")

        adapters = host(files, budget_bytes=NBYTES)
        files.fetch = fetch_from_a_peer  # type: ignore[method-assign]
        await adapters.get(A)
        assert adapters.source(A) == "peer"
        files.fetch = fetch  # type: ignore[method-assign]
        await adapters.get(B)  # there is room for one
        await adapters.get(A)
        assert adapters.source(A) == "disk"

    asyncio.run(scenario())
