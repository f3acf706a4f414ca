"""What is known of compositions, kept in a store where several change it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from deployments.access import Caller
from deployments.composition_jobs import HEARD_S, CompositionJob, CompositionJobs, waiting
from lorauter.adapters.store import MemoryStore
from lorauter.errors import CompositionNotFound
from lorauter.keys import ApiKey

SETUP = "here"


def job(task: str = "rain", caller: Caller | None = None, setup: str = SETUP) -> CompositionJob:
    return CompositionJob.of(caller or Caller(), task, f"{task}.composed", setup)


@pytest.fixture
def jobs() -> CompositionJobs:
    return CompositionJobs(MemoryStore())


def test_one_is_kept_as_it_was_asked_for_with_the_keys_rights_and_no_key(jobs: CompositionJobs) -> None:
    key = ApiKey(name="team", sha256="5" * 64, roles=frozenset({"admin"}), adapters=("team-*",))
    asked = job(caller=Caller(key))
    jobs.add(asked)
    assert jobs.get(asked.id) == asked
    assert asked.caller.permits("team-a")
    assert not asked.caller.permits("others")
    assert "5" * 64 not in str(vars(asked))
    assert job().caller == Caller()


def test_they_are_listed_as_they_were_asked_for(jobs: CompositionJobs) -> None:
    assert jobs.all() == []
    asked = []
    for task in ("c", "a", "b"):
        asked.append(job(task))
        jobs.add(asked[-1])
        time.sleep(0.002)
    assert jobs.all() == asked
    begun = jobs.change(asked[0].id, lambda one: replace(one, status="running", heard=time.time()))
    assert waiting(jobs.all(), SETUP) == asked[1:]
    assert waiting(jobs.all(), "elsewhere") == []
    assert begun in jobs.all()


@pytest.mark.parametrize("id", ["0" * 16, "", "../CURRENT", "x" * 400])
def test_what_nobody_asked_for_is_not_there(jobs: CompositionJobs, id: str) -> None:
    with pytest.raises(CompositionNotFound):
        jobs.get(id)
    with pytest.raises(CompositionNotFound):
        jobs.change(id, lambda one: one)


def test_of_many_changes_at_once_none_is_lost(jobs: CompositionJobs) -> None:
    asked = job()
    jobs.add(asked)

    def more() -> None:
        for _ in range(20):
            jobs.change(asked.id, lambda one: replace(one, progress=one.progress + 1))

    threads = [threading.Thread(target=more) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert jobs.get(asked.id).progress == 80


def test_one_of_which_nothing_is_heard_is_lost() -> None:
    running = replace(job(), status="running", heard=time.time())
    assert not running.is_lost(SETUP)
    silent = replace(running, heard=time.time() - HEARD_S - 1)
    shown = silent.shown("operator", SETUP, 0)
    assert (shown["status"], shown["ended_at"]) == ("lost", None)
    assert "Ask again" in shown["reason"]
    assert not silent.ending("failed").is_lost(SETUP)


def test_one_that_waits_is_lost_only_to_a_service_of_other_adapters() -> None:
    waits = job()
    assert waits.shown("operator", SETUP, 2)["ahead"] == 2
    assert waits.shown("operator", "elsewhere", 2)["status"] == "lost"


def test_an_error_is_told_to_each_in_its_words() -> None:
    texts = {who: {"message": f"for the {who}"} for who in ("operator", "unlimited", "limited")}
    failed = job().ending("failed", error=texts)
    for who in ("operator", "unlimited", "limited"):
        assert failed.shown(who, SETUP, 0)["error"] == texts[who]


def test_the_catalogs_version_is_not_told_to_who_is_limited() -> None:
    done = job().ending("done", result={"kept": True, "catalog_version": "0a1b2c3d"})
    for who, told in (("operator", "0a1b2c3d"), ("unlimited", "0a1b2c3d"), ("limited", None)):
        assert done.shown(who, SETUP, 0)["catalog_version"] == told  # type: ignore[arg-type]


def test_the_oldest_of_many_that_ended_are_forgotten(jobs: CompositionJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.composition_jobs._KEPT", 2)
    waits = job("waits")
    jobs.add(waits)
    ended = []
    for i in range(4):
        time.sleep(0.002)
        ended.append(job(f"t{i}").ending("done"))
        jobs.add(ended[-1])
    assert [one.id for one in jobs.all()] == [waits.id, *(one.id for one in ended[-2:])]


def test_what_a_later_version_wrote_is_left_alone(jobs: CompositionJobs) -> None:
    store = MemoryStore()
    store.write(f"compositions/{'0' * 16}.json", b'{"id": "new", "of": 1}')
    store.write("compositions/notes.json", b"{}")
    assert CompositionJobs(store).all() == []
