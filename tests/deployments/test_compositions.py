"""Compositions as the editor has them: asked for, followed and cancelled; the composer is a few lines long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments import compositions
from deployments.access import Caller
from deployments.catalog_editor import CatalogEditor
from deployments.composer import setup_of
from deployments.composition_jobs import HEARD_S, CompositionJobs
from deployments.config import AppConfig
from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import build_catalog, change_catalog, with_shown
from lorauter.catalog.shown import Help, ShownExamples
from lorauter.encoder import HashingEncoder
from lorauter.errors import (
    CompositionNotFound,
    Conflict,
    InvalidRequest,
    LorauterError,
    Overloaded,
    PermissionDenied,
    ReadOnlyStore,
    TaskNotFound,
)
from lorauter.keys import ApiKey
from lorauter.tasks import Task

ANYBODY = Caller()
TEAM = Caller(ApiKey(name="team", sha256="0" * 64, roles=frozenset({"admin"}), adapters=("sums*", "rain*")))


@pytest.fixture
def config(tmp_path: Path, make_task: Callable[..., Task], make_adapter: Callable[..., Path]) -> AppConfig:
    """An adapter of sums, and none for rain; one example of snow."""
    config = AppConfig(catalog=str(tmp_path / "catalog"), adapters=str(tmp_path / "adapters"))
    repository = AdapterRepository(open_store(config.adapters))
    repository.push(make_adapter(tmp_path / "made", "sums"))
    tasks = [make_task("sums"), make_task("rain"), make_task("snow", "is it cold?")]
    build_catalog(tasks, HashingEncoder(64), repository=repository).save(str(config.catalog))
    return config


@pytest.fixture
def jobs(config: AppConfig) -> CompositionJobs:
    return CompositionJobs(open_store(str(config.catalog)))


class FakeComposer:
    """Ends each time it is asked, as the real one does, when `makes` is through with what waits."""

    def __init__(self) -> None:
        self.started = 0
        self.makes: Callable[[], Awaitable[None]] = self._idle
        self.run = SimpleNamespace(remote=self._run)

    async def _idle(self) -> None:
        await asyncio.sleep(60)

    def start(self, config: AppConfig) -> FakeComposer:
        self.started += 1
        return self

    async def _run(self) -> None:
        await self.makes()
        raise RayActorError


@pytest.fixture
def composer(monkeypatch: pytest.MonkeyPatch) -> FakeComposer:
    fake = FakeComposer()
    monkeypatch.setattr(compositions, "start_composer", fake.start)
    monkeypatch.setattr(compositions, "_AGAIN_S", 0.01)
    return fake


@pytest.fixture
def editor(config: AppConfig, composer: FakeComposer, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("deployments.catalog_editor.join_serve_logs", lambda: None)
    return CatalogEditor.func_or_class(config, None, None)


def refused(editor: Any, kind: type[LorauterError], task: str, caller: Caller = ANYBODY) -> str:
    with pytest.raises(kind) as caught:
        asyncio.run(editor.compose(caller, task))
    return str(caught.value)


def test_one_is_asked_for_and_followed(editor: Any, composer: FakeComposer, jobs: CompositionJobs) -> None:
    async def scenario() -> None:
        asked = await editor.compose(ANYBODY, "rain")
        assert (asked["object"], asked["task"], asked["adapter"]) == ("composition", "rain", "rain.composed")
        assert (asked["status"], asked["ahead"], asked["progress"]) == ("queued", 0, 0.0)
        assert await editor.composition(ANYBODY, asked["id"]) == asked
        second = await editor.compose(ANYBODY, "sums")
        assert second["ahead"] == 1
        listed = await editor.compositions(ANYBODY)
        assert [row["id"] for row in listed["data"]] == [second["id"], asked["id"]]

        await asyncio.sleep(0.05)
        assert composer.started == 1, "one is at work"
        jobs.change(asked["id"], lambda job: job.ending("done", result={"kept": False, "reason": "no better"}))
        told = await editor.composition(ANYBODY, asked["id"])
        assert (told["status"], told["kept"], told["reason"]) == ("done", False, "no better")
        assert told["created_at"] <= told["ended_at"]

    asyncio.run(scenario())


def test_a_composer_is_started_as_long_as_something_waits(
    editor: Any, composer: FakeComposer, jobs: CompositionJobs
) -> None:
    async def make_one() -> None:
        waiting = [job for job in jobs.all() if job.status == "queued"]
        if composer.started > 1:  # the first time it dies
            jobs.change(waiting[0].id, lambda job: job.ending("done"))

    composer.makes = make_one

    async def scenario() -> None:
        await editor.compose(ANYBODY, "rain")
        await editor.compose(ANYBODY, "sums")
        deadline = time.monotonic() + 10
        while any(job.status == "queued" for job in jobs.all()) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(editor._compositions._seeing, 10)

    asyncio.run(scenario())
    assert [job.status for job in jobs.all()] == ["done", "done"]
    assert composer.started == 3


def test_an_editor_that_starts_anew_goes_on_with_what_waits(
    editor: Any, config: AppConfig, composer: FakeComposer, jobs: CompositionJobs
) -> None:
    asked = asyncio.run(editor.compose(ANYBODY, "rain"))
    before = composer.started

    async def scenario() -> None:
        again = CatalogEditor.func_or_class(config, None, None)
        assert (await again.composition(ANYBODY, asked["id"]))["status"] == "queued"
        await asyncio.sleep(0.05)

    asyncio.run(scenario())
    assert composer.started == before + 1


def test_a_task_that_cannot_have_one_is_refused(editor: Any, jobs: CompositionJobs) -> None:
    refused(editor, TaskNotFound, "hail")
    assert "one validation example" in refused(editor, InvalidRequest, "snow")
    assert "under way" in (asyncio.run(editor.compose(ANYBODY, "rain")) and refused(editor, Conflict, "rain"))
    assert len(jobs.all()) == 1


def test_without_adapters_there_is_nothing_to_compose_from(
    config: AppConfig, editor: Any, make_task: Callable[..., Task]
) -> None:
    build_catalog([make_task("rain")], HashingEncoder(64)).save(str(config.catalog))
    assert "no adapter to compose from" in refused(editor, InvalidRequest, "rain")


def test_an_adapter_of_its_name_that_is_no_composition_is_left_alone(
    editor: Any, config: AppConfig, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    AdapterRepository(open_store(config.adapters)).push(make_adapter(tmp_path / "theirs", "rain.composed"))
    assert "not composed for task 'rain'" in refused(editor, Conflict, "rain")


def test_a_store_that_is_only_read_takes_none(
    config: AppConfig, composer: FakeComposer, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.commit("team/pool", {"readme.md": b""})
    monkeypatch.setattr("deployments.catalog_editor.join_serve_logs", lambda: None)
    editor = CatalogEditor.func_or_class(config.model_copy(update={"adapters": "hf://team/pool"}), None, None)
    assert "only reads from the hub" in refused(editor, ReadOnlyStore, "rain")


def test_not_more_than_so_many_wait(editor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compositions, "_MOST", 1)
    asyncio.run(editor.compose(ANYBODY, "rain"))
    assert "no more are taken" in refused(editor, Overloaded, "sums")


def test_of_two_who_ask_at_once_one_is_told(editor: Any, jobs: CompositionJobs) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(*[editor.compose(ANYBODY, "rain") for _ in range(2)], return_exceptions=True)

    answers = asyncio.run(both())
    assert [type(answer) for answer in answers] == [dict, Conflict]
    assert len(jobs.all()) == 1


def test_one_that_is_lost_is_asked_for_again(editor: Any, config: AppConfig, jobs: CompositionJobs) -> None:
    first = asyncio.run(editor.compose(ANYBODY, "rain"))
    silent = time.time() - HEARD_S - 1
    jobs.change(first["id"], lambda job: replace(job, status="running", began=silent, heard=silent))
    assert asyncio.run(editor.composition(ANYBODY, first["id"]))["status"] == "lost"
    assert asyncio.run(editor.compose(ANYBODY, "rain"))["status"] == "queued"


def test_one_is_cancelled_until_it_is_published(editor: Any, jobs: CompositionJobs) -> None:
    async def scenario() -> None:
        waits = await editor.compose(ANYBODY, "rain")
        assert (await editor.cancel_composition(ANYBODY, waits["id"]))["status"] == "cancelled"
        assert (await editor.cancel_composition(ANYBODY, waits["id"]))["status"] == "cancelled"
        runs = await editor.compose(ANYBODY, "rain")
        jobs.change(runs["id"], lambda job: replace(job, status="running", heard=time.time()))
        assert (await editor.cancel_composition(ANYBODY, runs["id"]))["ended_at"] is not None
        late = await editor.compose(ANYBODY, "rain")
        for status in ("publishing", "done"):
            jobs.change(late["id"], lambda job, status=status: replace(job, status=status, heard=time.time()))
            with pytest.raises(Conflict, match=f"is {status}"):
                await editor.cancel_composition(ANYBODY, late["id"])
        with pytest.raises(CompositionNotFound):
            await editor.cancel_composition(ANYBODY, "0" * 16)

    asyncio.run(scenario())


def test_a_limited_key_asks_for_and_sees_its_own_alone(
    editor: Any, config: AppConfig, make_task: Callable[..., Task], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    repository = AdapterRepository(open_store(config.adapters))
    repository.push(make_adapter(tmp_path / "theirs", "poems"))
    tasks = [make_task(name) for name in ("sums", "rain", "poems")]
    mapping = {"rain": ["poems"]}
    build_catalog(tasks, HashingEncoder(64), repository=repository, mapping=mapping).save(str(config.catalog))

    async def scenario() -> None:
        with pytest.raises(PermissionDenied):  # another's adapter serves it
            await editor.compose(TEAM, "rain")
        own = await editor.compose(TEAM, "sums")
        assert own["asked_by"] == "team"
        others = await editor.compose(ANYBODY, "poems")
        assert [row["id"] for row in (await editor.compositions(TEAM))["data"]] == [own["id"]]
        for method in (editor.composition, editor.cancel_composition):
            with pytest.raises(CompositionNotFound):
                await method(TEAM, others["id"])
        assert len((await editor.compositions(ANYBODY))["data"]) == 2

    asyncio.run(scenario())
    assert {job.setup for job in CompositionJobs(open_store(str(config.catalog))).all()} == {setup_of(config)}


def test_a_change_after_which_examples_are_to_be_asked_again_starts_a_composer_once(
    editor: Any, config: AppConfig, composer: FakeComposer, make_task: Callable[..., Task]
) -> None:
    async def nothing() -> None:
        pass

    composer.makes = nothing
    editor._embedder = SimpleNamespace(
        embed=SimpleNamespace(remote=_later(HashingEncoder(64).encode)),
        name=SimpleNamespace(remote=_later(lambda: HashingEncoder(64).name)),
    )
    known = Help(None, 0.0, 0.0)

    async def put(name: str) -> None:
        await editor.put_task(ANYBODY, make_task(name))
        await asyncio.wait_for(editor._compositions._seeing, 10)

    asyncio.run(put("hail"))
    assert composer.started == 0, "no task was ever asked"
    told = {name: ShownExamples(2, known, known, (9, 9)) for name in ("sums", "rain", "hail")}
    change_catalog(str(config.catalog), lambda before: with_shown(before, told))
    asyncio.run(put("fog"))
    assert composer.started == 1


def _later(answer: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def later(*args: Any) -> Any:
        return answer(*args)

    return later
