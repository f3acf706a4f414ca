from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.host_adapters import HostAdapters
from lorauter.adapters import LocalAdapter, LoraWeights
from lorauter.adapters.weights import WEIGHTS_FILE
from lorauter.errors import AdapterNotFound, AdapterRejected, AdapterUnavailable

NBYTES = 4 * 2 * 8 * 4  # of a tiny adapter: A and B of rank 2 for two square layers, float32


class FakeFiles:
    """A node's cache: folders by name, of which a discarded one is written anew.

    Attributes:
        versions: current version by name; what is not there is not found.
        asked: names of every fetch.
        discarded: what was discarded.
    """

    def __init__(self, root: Path, write: Callable[..., Path]) -> None:
        self._root = root
        self._write = write
        self.versions: dict[str, str] = {}
        self.asked: list[str] = []
        self.discarded: list[tuple[str, str]] = []
        self.down = False

    def add(self, name: str, version: str = "v1", **changes: Any) -> Path:
        """Publish a version; `changes` go to the folder's writer."""
        self.versions[name] = version
        return self._write(self._root / version, name, **changes)

    def path(self, name: str) -> Path:
        return self._root / self.versions[name] / name

    async def fetch(self, names: list[str]) -> list[LocalAdapter]:
        self.asked += names
        await asyncio.sleep(0)
        for name in names:
            if name not in self.versions:
                raise AdapterNotFound("not found", adapter=name)
            if self.down:
                raise AdapterUnavailable("the store is down", adapter=name)
        return [LocalAdapter(name, self.versions[name], self.path(name)) for name in names]

    async def discard(self, name: str, version: str) -> None:
        self.discarded.append((name, version))
        self.repair(name)

    def repair(self, name: str) -> None:
        """What a fetch after a discard brings; by default the same as before."""


@pytest.fixture
def files(tmp_path: Path, make_adapter: Callable[..., Path]) -> FakeFiles:
    files = FakeFiles(tmp_path, make_adapter)
    for name in ("a", "b", "c"):
        files.add(name)
    return files


def serve_rank_2(weights: LoraWeights) -> LoraWeights:
    if weights.rank > 2:
        raise AdapterRejected(f"has rank {weights.rank}", adapter=weights.name)
    return weights


def host(files: FakeFiles, *, budget_bytes: int = 1 << 20, revalidate_s: float = 1000) -> HostAdapters[LoraWeights]:
    return HostAdapters(files, serve_rank_2, budget_bytes=budget_bytes, revalidate_s=revalidate_s)


def test_adapters_come_in_the_order_of_the_names(files: FakeFiles) -> None:
    found = asyncio.run(host(files).get(["b", "a", "b"]))
    assert [weights.key for weights in found] == [("b", "v1"), ("a", "v1"), ("b", "v1")]
    assert found[0] is found[2]
    assert found[0].nbytes == NBYTES
    assert asyncio.run(host(files).get([])) == []


def test_a_fresh_adapter_is_not_asked_for_again(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        [first] = await adapters.get(["a"])
        files.add("a", "v2", fill=1.0)
        [second] = await adapters.get(["a"])
        assert second is first
        assert files.asked == ["a"]

    asyncio.run(scenario())


def test_many_who_ask_at_once_share_one_load(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        found = await asyncio.gather(*[adapters.get(["a", "b"]) for _ in range(20)])
        assert len({id(weights) for pair in found for weights in pair}) == 2

    asyncio.run(scenario())


def test_who_gives_up_does_not_spoil_it_for_others(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        first = asyncio.create_task(adapters.get(["a"]))
        second = asyncio.create_task(adapters.get(["a"]))
        for _ in range(3):
            await asyncio.sleep(0)
        first.cancel()
        [weights] = await second
        assert weights.key == ("a", "v1")
        assert (await asyncio.gather(first, return_exceptions=True))[0].__class__ is asyncio.CancelledError

    asyncio.run(scenario())


def test_the_least_recently_used_leaves_when_bytes_run_out(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files, budget_bytes=2 * NBYTES)
        [a], [b] = await adapters.get(["a"]), await adapters.get(["b"])
        assert (await adapters.get(["a"]))[0] is a
        await adapters.get(["c"])
        assert (await adapters.get(["a"]))[0] is a
        assert (await adapters.get(["b"]))[0] is not b

    asyncio.run(scenario())


def test_a_request_larger_than_the_budget_is_served_all_the_same(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files, budget_bytes=1)
        for _ in range(2):
            found = await adapters.get(["a", "b", "c", "a"])
            assert [weights.name for weights in found] == ["a", "b", "c", "a"]
        [alone] = await adapters.get(["b"])
        assert (await adapters.get(["b"]))[0] is alone

    asyncio.run(scenario())


def test_a_replaced_version_is_picked_up_and_an_unchanged_one_kept(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files, revalidate_s=0)
        [a, b] = await adapters.get(["a", "b"])
        files.add("a", "v2", fill=1.0)
        [replaced, kept] = await adapters.get(["a", "b"])
        assert replaced.key == ("a", "v2")
        assert set(adapters.resident) == {("b", "v1"), ("a", "v2")}, "what a new request would be served with"
        assert not torch.equal(replaced.tensors[0, "q_proj"][0], a.tensors[0, "q_proj"][0])
        assert kept is b

    asyncio.run(scenario())


def test_a_damaged_copy_is_discarded_and_fetched_once_more(files: FakeFiles, make_adapter: Callable[..., Path]) -> None:
    async def scenario() -> None:
        adapters = host(files)
        path = files.path("a") / WEIGHTS_FILE
        content = path.read_bytes()
        path.write_bytes(content[:-10])
        files.repair = lambda name: path.write_bytes(content)  # type: ignore[assignment,method-assign,return-value]
        found = await asyncio.gather(*[adapters.get(["a"]) for _ in range(5)])
        assert {weights.key for [weights] in found} == {("a", "v1")}
        assert files.discarded == [("a", "v1")]

    asyncio.run(scenario())


def test_a_copy_evicted_from_the_disk_is_found_in_its_new_version(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files)
        (files.path("a") / WEIGHTS_FILE).unlink()
        files.repair = lambda name: files.add(name, "v2")  # type: ignore[assignment,method-assign,return-value]
        for _ in range(2):
            [weights] = await adapters.get(["a"])
            assert weights.key == ("a", "v2")

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
        files.add("bad", **changes)
        errors = await asyncio.gather(*[refusal(adapters.get(["a", "bad"])) for _ in range(5)])
        assert {error.adapter for error in errors} == {"bad"}
        files.add("bad")  # sound now; but under a version that is known to be bad, nobody looks
        depths = []
        for _ in range(5):
            error = await refusal(adapters.get(["bad"]))
            depths.append(len(traceback.extract_tb(error.__traceback__)))
        assert depths[0] == depths[-1], "the kept error grows with every request"
        assert files.discarded == [("bad", "v1")]
        assert (await adapters.get(["a"]))[0].key == ("a", "v1")
        files.add("bad", "v2")
        assert (await adapters.get(["bad"]))[0].key == ("bad", "v2")

    asyncio.run(scenario())


def test_unknown_names_and_a_store_that_is_down(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files, revalidate_s=0)
        with pytest.raises(AdapterNotFound, match="nowhere"):
            await adapters.get(["a", "nowhere"])
        files.down = True
        with pytest.raises(AdapterUnavailable, match="'a'"):
            await adapters.get(["a"])
        files.down = False
        assert (await adapters.get(["a"]))[0].name == "a"

    asyncio.run(scenario())


def test_what_is_in_memory_answers_while_the_cache_is_down(files: FakeFiles) -> None:
    async def scenario() -> None:
        adapters = host(files, revalidate_s=0)
        [loaded] = await adapters.get(["a"])
        files.down = True
        assert await adapters.get(["a"]) == [loaded]
        with pytest.raises(AdapterUnavailable, match="'b'"):
            await adapters.get(["b", "a"])

    asyncio.run(scenario())
