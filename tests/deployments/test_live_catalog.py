"""The catalog in use and the one that is published, without Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deployments.live_catalog import LiveCatalog
from lorauter.adapters import MemoryStore
from lorauter.catalog import Catalog, build_catalog, use_version, with_tasks
from lorauter.catalog.catalog import CURRENT_FILE, PROBE_TEXT
from lorauter.catalog.parts import FOLDER, key_of
from lorauter.encoder import Embeddings, HashingEncoder
from lorauter.errors import CatalogError, ServiceUnavailable, StoreUnavailable
from lorauter.routing import RoutingConfig
from lorauter.tasks import Task

ENCODER = HashingEncoder(64)


def probe() -> tuple[Embeddings, str]:
    return ENCODER.encode([PROBE_TEXT])[0], ENCODER.name


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def first(store: MemoryStore, make_task: Callable[..., Task]) -> Catalog:
    """A catalog, published."""
    catalog = build_catalog([make_task("sums"), make_task("poems")], ENCODER)
    catalog.save(store)
    return catalog


@pytest.fixture
def second(first: Catalog, make_task: Callable[..., Task]) -> Catalog:
    """Another one, not published."""
    return with_tasks(first, [make_task("films")], ENCODER)


@pytest.fixture
def make_live(store: MemoryStore, tmp_path: Path) -> Iterator[Callable[..., LiveCatalog]]:
    made: list[LiveCatalog] = []

    def make(refresh_s: float = 60, probe: Callable[[], tuple[Embeddings, str]] = probe) -> LiveCatalog:
        made.append(LiveCatalog(store, RoutingConfig(), probe, refresh_s=refresh_s, keep=tmp_path / "kept"))
        return made[-1]

    yield make
    for live in made:
        live.close()


def test_what_is_published_takes_over_and_so_does_the_old_one_again(
    store: MemoryStore, first: Catalog, second: Catalog, make_live: Callable[..., LiveCatalog]
) -> None:
    live = make_live()
    assert live.version == first.version
    second.save(store)
    assert live.version == first.version
    before = live.retriever
    live.look()
    assert (live.version, live.refused) == (second.version, None)
    assert before.catalog.version == first.version, "who is at it goes on with the old one"
    use_version(store, first.version)
    live.look()
    assert live.version == first.version


def test_a_look_at_what_is_in_use_reads_one_small_object(
    store: MemoryStore, first: Catalog, make_live: Callable[..., LiveCatalog]
) -> None:
    live = make_live()
    store.reads.clear()
    for _ in range(3):
        live.look()
    assert store.reads == [CURRENT_FILE] * 3


def test_it_looks_by_itself(
    store: MemoryStore, first: Catalog, second: Catalog, make_live: Callable[..., LiveCatalog]
) -> None:
    live = make_live(refresh_s=0.01)
    live.start()
    second.save(store)
    deadline = time.monotonic() + 10
    while live.version != second.version:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    live.close()


def damaged(store: MemoryStore, catalog: Catalog) -> str:
    catalog.save(store)
    store.objects[key_of(catalog.segments[0].digests[0])] += b"x"
    return catalog.version


def incomplete(store: MemoryStore, catalog: Catalog) -> str:
    catalog.save(store)
    del store.objects[key_of(catalog.segments[0].digests[1])]
    return catalog.version


def nonsense(store: MemoryStore, catalog: Catalog) -> str:
    store.objects[CURRENT_FILE] = b"../../etc"
    return "../../etc"


def binary(store: MemoryStore, catalog: Catalog) -> str:
    store.objects[CURRENT_FILE] = b"\xff\xfe"
    return "none"


def of_another_encoder(store: MemoryStore, catalog: Catalog) -> str:
    return build_catalog([entry.task for entry in catalog.tasks], HashingEncoder(32)).save(store)


@pytest.mark.parametrize("breaking", [damaged, incomplete, nonsense, binary, of_another_encoder])
def test_a_broken_one_is_refused_once_and_the_old_one_stays(
    breaking: Callable[[MemoryStore, Catalog], str],
    store: MemoryStore,
    first: Catalog,
    second: Catalog,
    make_live: Callable[..., LiveCatalog],
    caplog: pytest.LogCaptureFixture,
) -> None:
    live = make_live()
    broken = breaking(store, second)
    with caplog.at_level(logging.WARNING, logger="lorauter.catalog"):
        for _ in range(3):
            live.look()
    assert live.version == first.version
    assert live.refused is not None
    assert (live.refused[0], len(live.refused[1]) > 10) == (broken, True)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    use_version(store, first.version)
    live.look()
    assert (live.version, live.refused) == (first.version, None)


def test_a_mended_one_is_taken_after_a_while(
    store: MemoryStore,
    first: Catalog,
    second: Catalog,
    make_live: Callable[..., LiveCatalog],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = make_live()
    damaged(store, second)
    live.look()
    second.save(store)
    live.look()
    assert live.version == first.version, "it is not read again at every look"
    monkeypatch.setattr("deployments.live_catalog._RETRY_REFUSED_S", 0)
    live.look()
    assert (live.version, live.refused) == (second.version, None)


def test_a_store_or_an_encoder_that_is_away_delays_a_change_and_refuses_nothing(
    store: MemoryStore,
    first: Catalog,
    second: Catalog,
    make_live: Callable[..., LiveCatalog],
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = False

    def probed() -> tuple[Embeddings, str]:
        if away:
            raise TimeoutError
        return probe()

    live = make_live(probe=probed)
    second.save(store)
    for store.down, away in ((True, False), (False, True)):  # noqa: B007
        caplog.clear()
        for _ in range(3):
            live.look()
        assert (live.version, live.refused) == (first.version, None)
    assert len(caplog.records) <= 1
    store.down = away = False
    live.look()
    assert live.version == second.version


def test_a_start_falls_back_on_what_was_in_use_last(
    store: MemoryStore, first: Catalog, second: Catalog, make_live: Callable[..., LiveCatalog]
) -> None:
    make_live()
    broken = damaged(store, second)
    again = make_live()
    assert again.version == first.version
    assert again.refused is not None
    assert again.refused[0] == broken
    store.down = True
    third = make_live()
    assert (third.version, third.refused) == (first.version, None)
    store.down = False
    use_version(store, first.version)
    again.look()
    assert (again.version, again.refused) == (first.version, None)


def test_only_the_last_one_is_kept(
    store: MemoryStore, first: Catalog, second: Catalog, make_live: Callable[..., LiveCatalog], tmp_path: Path
) -> None:
    live = make_live()
    second.save(store)
    live.look()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted([CURRENT_FILE, second.version, FOLDER])
    assert {path.name for path in (tmp_path / "kept" / FOLDER).iterdir()} == second.parts
    assert Catalog.load(tmp_path / "kept").version == second.version


def test_without_any_catalog_the_start_says_why(
    store: MemoryStore, second: Catalog, make_live: Callable[..., LiveCatalog], make_task: Callable[..., Task]
) -> None:
    store.objects.clear()
    with pytest.raises(CatalogError, match="nothing is published"):
        make_live()
    damaged(store, second)
    with pytest.raises(CatalogError, match="is damaged"):
        make_live()
    of_another_encoder(store, second)
    with pytest.raises(CatalogError, match="encoder"):
        make_live()
    store.down = True
    with pytest.raises(StoreUnavailable):
        make_live()
    store.down = False
    second.save(store)

    def silent() -> tuple[Embeddings, str]:
        raise TimeoutError

    with pytest.raises(ServiceUnavailable, match="encoder does not answer"):
        make_live(probe=silent)


def test_a_folder_that_cannot_be_written_is_no_reason_to_refuse(
    store: MemoryStore, first: Catalog, second: Catalog, make_live: Callable[..., LiveCatalog], tmp_path: Path
) -> None:
    (tmp_path / "kept").write_text("a file where the folder should be")
    live = make_live()
    second.save(store)
    live.look()
    assert (live.version, live.refused) == (second.version, None)
