"""The composer without Ray or a model: what comes of a composition when things change while it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments import composer
from deployments.access import Caller
from deployments.composer import ComposerActor, setup_of
from deployments.composition_jobs import CompositionJob, CompositionJobs
from deployments.config import AppConfig
from lorauter.adapters import AdapterRepository, open_store
from lorauter.catalog import (
    Catalog,
    build_catalog,
    change_catalog,
    with_adapters,
    with_shown,
    with_tasks,
    without_adapters,
    without_tasks,
)
from lorauter.catalog.provenance import task_digests
from lorauter.catalog.shown import Help, ShownExamples
from lorauter.compositions.cut import Cut
from lorauter.compositions.make import Made
from lorauter.compositions.written import CompositionProvenance, Source, write_adapter
from lorauter.encoder import HashingEncoder
from lorauter.errors import CatalogError, StoreUnavailable
from lorauter.keys import ApiKey
from lorauter.tasks import Task

ENCODER = HashingEncoder(64)
TEAM = Caller(ApiKey(name="team", sha256="0" * 64, roles=frozenset({"admin"}), adapters=("rain*", "poems")))


@pytest.fixture
def config(tmp_path: Path, make_task: Callable[..., Task], make_adapter: Callable[..., Path]) -> AppConfig:
    """Adapters of sums and poems, and none for rain."""
    config = AppConfig(catalog=str(tmp_path / "catalog"), adapters=str(tmp_path / "adapters"))
    repository = AdapterRepository(open_store(config.adapters))
    for name in ("sums", "poems"):
        repository.push(make_adapter(tmp_path / "made", name))
    tasks = [make_task(name) for name in ("sums", "poems", "rain")]
    build_catalog(tasks, ENCODER, repository=repository).save(str(config.catalog))
    return config


@pytest.fixture
def jobs(config: AppConfig) -> CompositionJobs:
    return CompositionJobs(open_store(str(config.catalog)))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composer, "_BEAT_S", 0.01)


Meanwhile = Callable[[int], object]
"""Is called after each step with its number."""


class FakeComposing:
    """`compose_for`, which makes an adapter of all that it may at once."""

    def __init__(self) -> None:
        self.gain = 1.0
        self.steps = 3
        self.fill = 0.5
        self.sources: list[str] = []
        self.error: Exception | None = None
        self.meanwhile: Meanwhile = lambda step: None

    def __call__(
        self, catalog: Catalog, tasks: Collection[str], load: Any, work: Path, *, progress: Any, **given: Any
    ) -> list[Made]:
        [task] = tasks
        place = catalog.place(task)
        assert place is not None
        for step in range(self.steps):
            progress(step, self.steps, "")
            self.meanwhile(step)
        progress(self.steps, self.steps, "")
        if self.error is not None:
            raise self.error
        self.sources = [name for name in catalog.adapters if name not in catalog.composed]
        provenance = CompositionProvenance(
            task,
            "base",
            task_digests([catalog.tasks[place].task])[task],
            tuple(Source(name, catalog.adapters[name], (0.5,)) for name in self.sources),
            ("q_proj",),
            {},
            score_before=-2.0,
            score_after=-2.0 + self.gain,
            error=0.1,
            right_before=0.25,
            right_after=0.75,
            exact=True,
            energy=0.99,
            rank=2,
            step=3,
        )
        cut = Cut({(0, "q_proj"): (torch.full((2, 8), self.fill), torch.full((8, 2), self.fill))}, 0.99)
        write_adapter(work / f"{task}.composed", cut, provenance, base_model="org/tiny-base", dtype=torch.float32)
        return [Made(f"{task}.composed", work / f"{task}.composed", provenance, margin=1.0)]


@pytest.fixture
def composing(monkeypatch: pytest.MonkeyPatch) -> FakeComposing:
    made = FakeComposing()
    monkeypatch.setattr("lorauter.compositions.pool.compose_for", made)
    return made


def asked(jobs: CompositionJobs, config: AppConfig, caller: Caller | None = None) -> CompositionJob:
    job = CompositionJob.of(caller or Caller(), "rain", "rain.composed", setup_of(config))
    jobs.add(job)
    return job


def serving(config: AppConfig, task: str = "rain") -> list[str]:
    catalog = Catalog.load(str(config.catalog))
    return [adapter.name for entry in catalog.entries if entry.name == task for adapter in entry.adapters]


def outcome(jobs: CompositionJobs, config: AppConfig, job: CompositionJob) -> dict[str, Any]:
    ComposerActor(config).work()
    return jobs.get(job.id).shown("operator", setup_of(config), 0)


def test_what_holds_is_pushed_with_its_provenance_and_serves_the_task(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing
) -> None:
    told = outcome(jobs, config, asked(jobs, config))
    assert (told["status"], told["kept"], told["stale"], told["progress"]) == ("done", True, False, 1.0)
    assert told["scores"]["right"] == {"before": 0.25, "after": 0.75, "exact": True}
    assert told["scores"]["log_likelihood"] == {"before": -2.0, "after": -1.0, "gain": 1.0, "error": 0.1}
    assert told["started_at"] <= told["ended_at"]
    assert serving(config)[0] == "rain.composed"
    catalog = Catalog.load(str(config.catalog))
    assert told["catalog_version"] == catalog.version
    assert catalog.composed["rain.composed"].task == "rain"
    manifest = AdapterRepository(open_store(config.adapters)).manifest("rain.composed")
    assert manifest.version == told["version"] == catalog.adapters["rain.composed"]
    assert manifest.provenance is not None
    assert {row["name"] for row in manifest.provenance["sources"]} == {"sums", "poems"}


def test_what_does_not_hold_changes_nothing_and_says_by_how_little(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing
) -> None:
    composing.gain = 0.05
    before = Catalog.load(str(config.catalog)).version
    told = outcome(jobs, config, asked(jobs, config))
    assert (told["status"], told["kept"]) == ("done", False)
    assert "better by 0.050" in told["reason"]
    assert "more than 0.100" in told["reason"]
    assert Catalog.load(str(config.catalog)).version == before
    assert AdapterRepository(open_store(config.adapters)).names() == ["poems", "sums"]


def test_a_limited_key_composes_of_its_own_adapters_alone(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing
) -> None:
    assert outcome(jobs, config, asked(jobs, config, TEAM))["kept"]
    assert composing.sources == ["poems"]


def test_another_composition_takes_the_place_of_the_one_before(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing
) -> None:
    first = outcome(jobs, config, asked(jobs, config))
    composing.fill = 0.25
    second = outcome(jobs, config, asked(jobs, config))
    assert second["version"] != first["version"]
    assert serving(config) == ["rain.composed"]
    assert composing.sources == ["poems", "sums"]


def test_all_that_waits_is_made_in_turn_and_what_fails_is_told(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing
) -> None:
    lost = asked(jobs, config)
    jobs.change(lost.id, lambda one: replace(one, status="running", heard=1.0))  # by one that died
    other = CompositionJob.of(Caller(), "sums", "sums.composed", "another setup")
    jobs.add(other)
    gone = CompositionJob.of(Caller(), "gone", "gone.composed", setup_of(config))
    jobs.add(gone)
    rain = asked(jobs, config)
    assert outcome(jobs, config, rain)["status"] == "done"
    assert jobs.get(gone.id).status == "failed"
    assert "put it again" in jobs.get(gone.id).shown("operator", "", 0)["error"]["message"]
    assert jobs.get(lost.id).shown("operator", setup_of(config), 0)["status"] == "lost"
    assert jobs.get(other.id).status == "queued"


def without_rain(catalog: Catalog) -> Catalog:
    return without_tasks(catalog, ["rain"])


def another_rain(catalog: Catalog) -> Catalog:
    place = catalog.place("sums")
    assert place is not None
    return with_tasks(catalog, [replace(catalog.tasks[place].task, name="rain")], ENCODER)


@pytest.mark.parametrize(
    ("edit", "said"),
    [(without_rain, "removed meanwhile"), (another_rain, "the examples or the metric of task 'rain' were changed")],
)
def test_a_task_that_is_not_what_it_was_gets_no_composition(
    config: AppConfig,
    jobs: CompositionJobs,
    composing: FakeComposing,
    edit: Callable[[Catalog], Catalog],
    said: str,
) -> None:
    composing.meanwhile = lambda step: step or change_catalog(str(config.catalog), edit)
    told = outcome(jobs, config, asked(jobs, config))
    assert (told["status"], told["error"]["code"]) == ("failed", "conflict")
    assert said in told["error"]["message"]
    assert AdapterRepository(open_store(config.adapters)).names() == ["poems", "sums"]
    assert "rain.composed" not in Catalog.load(str(config.catalog)).adapters


def test_a_source_that_goes_meanwhile_makes_it_stale(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing
) -> None:
    composing.meanwhile = lambda step: (
        step or change_catalog(str(config.catalog), lambda before: without_adapters(before, ["poems"]))
    )
    told = outcome(jobs, config, asked(jobs, config))
    assert (told["kept"], told["stale"]) == (True, True)
    assert Catalog.load(str(config.catalog)).stale == {"rain.composed": ["poems"]}


def test_an_adapter_of_its_name_that_somebody_else_put_stays(
    config: AppConfig,
    jobs: CompositionJobs,
    composing: FakeComposing,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    repository = AdapterRepository(open_store(config.adapters))
    theirs = make_adapter(tmp_path / "theirs", "rain.composed")
    composing.meanwhile = lambda step: step or repository.push(theirs)
    told = outcome(jobs, config, asked(jobs, config))
    assert told["status"] == "failed"
    assert "not composed for task 'rain'" in told["error"]["message"]
    assert repository.manifest("rain.composed").provenance is None

    composing.meanwhile = lambda step: None
    change_catalog(str(config.catalog), lambda before: with_adapters(before, repository))
    assert outcome(jobs, config, asked(jobs, config))["status"] == "failed"


def test_a_task_that_anothers_adapter_serves_by_now_is_not_a_limited_keys(
    config: AppConfig,
    jobs: CompositionJobs,
    composing: FakeComposing,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    job = asked(jobs, config, replace_patterns(TEAM, ("rain.composed", "poems")))
    AdapterRepository(open_store(config.adapters)).push(make_adapter(tmp_path / "theirs", "rain"))
    change_catalog(
        str(config.catalog),
        lambda before: with_adapters(before, AdapterRepository(open_store(config.adapters))),
    )
    told = outcome(jobs, config, job)
    assert (told["status"], told["error"]["code"]) == ("failed", "permission_denied")


def replace_patterns(caller: Caller, patterns: tuple[str, ...]) -> Caller:
    assert caller.key is not None
    return Caller(caller.key.model_copy(update={"adapters": patterns}))


def test_one_that_is_cancelled_is_made_no_further(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing
) -> None:
    job = asked(jobs, config)
    steps: list[int] = []

    def meanwhile(step: int) -> None:
        steps.append(step)
        if not step:
            jobs.change(job.id, lambda one: one.ending("cancelled"))
        time.sleep(0.02)

    composing.meanwhile, composing.steps = meanwhile, 500
    assert outcome(jobs, config, job)["status"] == "cancelled"
    assert len(steps) < 500
    assert serving(config) == []


def test_one_that_is_cancelled_at_the_last_moment_is_not_published(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composer, "_BEAT_S", 60.0)  # nobody hears of it before
    job = asked(jobs, config)
    composing.meanwhile = lambda step: jobs.change(job.id, lambda one: one.ending("cancelled"))
    assert outcome(jobs, config, job)["status"] == "cancelled"
    assert AdapterRepository(open_store(config.adapters)).names() == ["poems", "sums"]


def test_its_progress_is_told_while_it_is_made(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing
) -> None:
    job, seen = asked(jobs, config), []

    def meanwhile(step: int) -> None:
        deadline = time.monotonic() + 10
        while (told := jobs.get(job.id)).progress < round(step / 3, 3) and time.monotonic() < deadline:
            time.sleep(0.005)
        seen.append((told.status, told.progress))

    composing.meanwhile = meanwhile
    outcome(jobs, config, job)
    assert seen == [("running", 0.0), ("running", 0.333), ("running", 0.667)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CatalogError("is broken", uri="s3://a/b"), "is broken"),
        (MemoryError(), "not enough memory"),
        (ZeroDivisionError("secret"), "ZeroDivisionError"),
    ],
)
def test_what_goes_wrong_is_told_in_words(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing, error: Exception, said: str
) -> None:
    composing.error = error
    told = outcome(jobs, config, asked(jobs, config))
    assert told["status"] == "failed"
    assert said in told["error"]["message"]
    assert "secret" not in str(told)
    limited = jobs.all()[0].shown("limited", setup_of(config), 0)["error"]["message"]
    assert "s3://" not in limited


def test_a_store_that_is_down_for_a_moment_loses_no_result(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.composer.time.sleep", lambda _: None)
    actor, change, failed = ComposerActor(config), CompositionJobs.change, []

    def shaky(self: Any, id: str, edit: Any) -> Any:
        if jobs.get(id).status == "publishing" and len(failed) < 3:
            failed.append(1)
            raise StoreUnavailable("down", uri="s3://a")
        return change(self, id, edit)

    job = asked(jobs, config)
    monkeypatch.setattr(CompositionJobs, "change", shaky)
    actor.work()
    assert len(failed) == 3
    assert jobs.get(job.id).status == "done"


NOTHING, GAIN = Help(None, 0.0, 0.0), Help("mixture", 0.5, 0.1)


class FakeAsking:
    """`ask_again`, to which examples always help."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, catalog: Catalog, names: list[str], count: int, engine: Any, load: Any) -> dict[str, Any]:
        assert engine == "an engine"
        self.asked.append(names)
        self.meanwhile()
        sizes = {entry.name: entry.examples for entry in catalog.entries}
        return {name: ShownExamples(count, GAIN, GAIN, (9,) * sizes[name]) for name in names}


@pytest.fixture
def asking(config: AppConfig, monkeypatch: pytest.MonkeyPatch) -> FakeAsking:
    """A catalog whose tasks were all asked after their examples, which helped none."""
    fake = FakeAsking()
    monkeypatch.setattr("lorauter.evaluation.left_out.ask_again", fake)
    monkeypatch.setattr("lorauter.engine.load_engine", lambda *_, **__: nullcontext("an engine"))
    monkeypatch.setattr(composer, "closing", lambda engine: engine)
    owned = {"sums": NOTHING, "poems": NOTHING, "rain": None}
    known = {name: ShownExamples(2, own, NOTHING, (9, 9)) for name, own in owned.items()}
    change_catalog(str(config.catalog), lambda before: with_shown(before, known))
    return fake


def shown(config: AppConfig, task: str) -> ShownExamples | None:
    return next(entry.shown for entry in Catalog.load(str(config.catalog)).entries if entry.name == task)


def test_a_task_that_gets_a_composition_is_asked_after_its_examples_again(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing, asking: FakeAsking
) -> None:
    ComposerActor(config).work()
    assert asking.asked == []
    assert outcome(jobs, config, asked(jobs, config))["kept"]
    assert asking.asked == [["rain"]]
    assert shown(config, "rain") == ShownExamples(2, GAIN, GAIN, (9, 9))
    assert shown(config, "sums") == ShownExamples(2, NOTHING, NOTHING, (9, 9))


def test_what_changes_while_it_is_asked_is_asked_anew(
    config: AppConfig, asking: FakeAsking, make_task: Callable[..., Task]
) -> None:
    change_catalog(str(config.catalog), lambda before: with_tasks(before, [make_task("hail")], ENCODER))

    def meanwhile() -> None:
        if len(asking.asked) == 1:
            other = make_task("hail", "one", "two", "three")
            change_catalog(str(config.catalog), lambda before: with_tasks(before, [other], ENCODER))

    asking.meanwhile = meanwhile
    ComposerActor(config).work()
    assert asking.asked == [["hail"], ["hail"]]
    assert shown(config, "hail") == ShownExamples(2, GAIN, GAIN, (9, 9, 9))


def test_where_asking_fails_no_example_is_shown_and_it_is_not_tried_for_ever(
    config: AppConfig, jobs: CompositionJobs, composing: FakeComposing, asking: FakeAsking
) -> None:
    def broken() -> None:
        raise CatalogError("is broken", uri="s3://a/b")

    asking.meanwhile = broken
    assert outcome(jobs, config, asked(jobs, config))["kept"]
    assert asking.asked == [["rain"]]
    assert shown(config, "rain") == ShownExamples(2, None, NOTHING, (9, 9))
