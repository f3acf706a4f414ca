"""Who lends to whom; tests/integration has caches that do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deployments.peers import Began, Loan, PeerSource, Whereabouts, _unpack, lend, order
from lorauter.adapters import AdapterManifest, AdapterRepository, LocalAdapter, MemoryStore
from lorauter.errors import AdapterUnavailable
from lorauter.names import AdapterKey

HERE = Whereabouts("here")


def copying(time: float) -> Whereabouts:
    return Whereabouts("copying", Began(time, "t"))


def asking(time: float, tie: str = "t") -> Whereabouts:
    return Whereabouts("asking", Began(time, tie))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], []),
        ([(0, copying(9))], [0]),
        ([(0, copying(9)), (1, copying(8)), (2, asking(1))], [1]),
        ([(0, asking(4)), (1, asking(3))], [1]),
        ([(0, asking(6))], []),
        ([(0, asking(5, "a"))], [0]),
        ([(0, asking(5, "z"))], []),
        ([(0, copying(1)), (1, HERE)], [1]),
    ],
    ids=[
        "nobody",
        "copying",
        "the first that copies",
        "the first that asks",
        "asks later",
        "tie won",
        "tie lost",
        "has it",
    ],
)
def test_whom_to_ask_for_a_loan(answers: list[tuple[int, Whereabouts]], expected: list[int]) -> None:
    assert order(Began(5.0, "m"), answers) == expected


def test_two_of_many_holders_are_tried_and_not_always_the_same() -> None:
    tried = {tuple(order(Began(5.0, "m"), [(i, HERE) for i in range(6)])) for _ in range(200)}
    assert {len(two) for two in tried} == {2}
    assert len(tried) > 10


def test_of_two_that_ask_at_once_one_alone_waits() -> None:
    one, other = Began(1.0, "a"), Began(1.0, "b")
    assert order(other, [(0, Whereabouts("asking", one))]) == [0]
    assert order(one, [(0, Whereabouts("asking", other))]) == []


@pytest.fixture
def pushed(tmp_path: Path, make_adapter: Callable[..., Path]) -> tuple[MemoryStore, AdapterManifest]:
    store = MemoryStore()
    return store, AdapterRepository(store).push(make_adapter(tmp_path / "source", "a"))


def test_without_peers_the_store_is_asked_and_meanwhile_one_may_wait_for_us(
    pushed: tuple[MemoryStore, AdapterManifest], tmp_path: Path
) -> None:
    store, manifest = pushed
    key = manifest.key
    said = []

    class Watched(AdapterRepository):
        def download(self, manifest: AdapterManifest, target: Path) -> None:
            said.append([source.whereabouts(AdapterKey("a", version)) for version in (key.version, "another")])
            super().download(manifest, target)

    def none_found() -> list[object]:
        asked = source.whereabouts(key)
        said.append([asked and asked.state])
        return []

    source = PeerSource(Watched(store), none_found)
    assert source.fetch(key, lambda manifest: tmp_path) == (manifest, "store")
    [[first], [second, other]] = said
    assert (first, second.state, other) == ("asking", "copying", None)
    assert source.whereabouts(key) is None
    store.down = True
    with pytest.raises(AdapterUnavailable):
        source.fetch(key, lambda manifest: tmp_path)
    assert source.whereabouts(key) is None


def test_two_versions_of_an_adapter_can_be_on_their_way_at_once(
    pushed: tuple[MemoryStore, AdapterManifest], tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    store, old = pushed
    new = AdapterRepository(store).push(make_adapter(tmp_path / "new", "a", rank=3))
    said = []

    class Watched(AdapterRepository):
        def download(self, manifest: AdapterManifest, target: Path) -> None:
            if manifest.key == old.key:
                source.fetch(new.key, lambda _: tmp_path / "new" / "a")
            said.append((manifest.version, source.whereabouts(manifest.key)))

    source = PeerSource(Watched(store), list)
    source.fetch(old.key, lambda manifest: tmp_path)
    assert [(version, where and where.state) for version, where in said] == [
        (new.version, "copying"),
        (old.version, "copying"),
    ]


def held(manifest: AdapterManifest, folder: Path) -> Loan | None:
    return lend(LocalAdapter(manifest, folder))


def test_what_is_lent_is_whole_or_nothing(pushed: tuple[MemoryStore, AdapterManifest], tmp_path: Path) -> None:
    store, manifest = pushed
    AdapterRepository(store).download(manifest, tmp_path)
    loan = held(manifest, tmp_path)
    assert loan is not None
    assert {name: content.tobytes() for name, content in loan.files.items()} == {
        name: (tmp_path / name).read_bytes() for name in manifest.files
    }
    assert all(content.dtype == np.uint8 for content in loan.files.values())
    (tmp_path / "got").mkdir()
    assert _unpack(loan, tmp_path / "got")
    config = loan.files["adapter_config.json"]
    for files in ({**loan.files, "adapter_config.json": config[:-1]}, {"adapter_config.json": config}, {}):
        assert not _unpack(Loan(manifest, files), tmp_path / "got")
    (tmp_path / "adapter_config.json").unlink()
    assert held(manifest, tmp_path) is None


def test_hashes_that_the_store_does_not_know_are_the_lenders(
    pushed: tuple[MemoryStore, AdapterManifest], tmp_path: Path
) -> None:
    store, manifest = pushed
    AdapterRepository(store).download(manifest, tmp_path)
    plain = replace(manifest, files={name: replace(file, sha256=None) for name, file in manifest.files.items()})
    assert held(plain, tmp_path) is None, "nobody could check it"
    loan = held(plain.with_hashes(tmp_path), tmp_path)
    assert loan is not None
    assert _unpack(loan, tmp_path)
    config = loan.files["adapter_config.json"].copy()
    config[0] ^= 1
    assert not _unpack(Loan(loan.manifest, {**loan.files, "adapter_config.json": config}), tmp_path)
