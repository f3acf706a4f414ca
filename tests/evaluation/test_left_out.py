"""What is found out of examples by leaving each out once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorauter.adapters import AdapterManifest, AdapterRepository, MemoryStore
from lorauter.catalog import Catalog, build_catalog, with_adapter, with_shown, with_tasks
from lorauter.catalog.shown import Help, ShownExamples, unchecked
from lorauter.encoder import HashingEncoder
from lorauter.evaluation.answering import adapters_in, answer
from lorauter.evaluation.left_out import Trial, ask_again, helped, tokens_of, trials
from lorauter.evaluation.rows import AnswerRow, read_answers
from lorauter.routing import RoutingConfig

CONFIG = RoutingConfig(fallback=False)


@pytest.fixture
def repository(tmp_path: Path, make_adapter: Callable[..., Any]) -> AdapterRepository:
    made = AdapterRepository(MemoryStore())
    for name in ("sums", "odd"):
        made.push(make_adapter(tmp_path / "pushed", name))
    return made


@pytest.fixture
def catalog(repository: AdapterRepository, make_task: Callable[..., Any]) -> Catalog:
    tasks = [make_task("sums", "1+1", "2+2", "1+3"), make_task("poems", "rose", "rosy"), make_task("lone", "x")]
    return build_catalog(tasks, HashingEncoder(), repository=repository)


def of(asked: list[Trial], task: str, own: bool, way: str) -> list[Trial]:
    return [trial for trial in asked if (trial.task, trial.own, trial.way) == (task, own, way)]


def test_each_example_is_asked_after_the_others(catalog: Catalog, codec: Any) -> None:
    asked = trials(catalog, 2, codec, config=CONFIG)
    assert {(trial.task, trial.own) for trial in asked} == {("sums", True), ("sums", False), ("poems", False)}
    for trial in of(asked, "sums", True, "mixture"):
        others = {turn.place for turn in trial.row.question.examples}
        assert others == {0, 1, 2} - {trial.place}
    assert {len(trial.row.question.examples) for trial in of(asked, "poems", False, "mixture")} == {1}
    assert all(not trial.row.question.examples for trial in of(asked, "sums", True, "plain"))
    assert all(not trial.row.question.adapters for trial in of(asked, "sums", True, "base"))
    assert {name for t in of(asked, "sums", True, "plain") for name, _ in t.row.question.adapters} == {"sums"}
    assert not any(t.row.question.adapters for t in of(asked, "sums", False, "plain"))
    barred = trials(catalog, 2, codec, config=CONFIG, barred={"sums": ["sums"]})
    assert {(trial.task, trial.own) for trial in barred} == {("sums", False), ("poems", False)}


def test_answers_are_taken_again_only_where_all_is_the_same(catalog: Catalog, codec: Any) -> None:
    def ids(model: str, count: int = 2) -> set[str]:
        return {trial.row.id for trial in trials(catalog, count, codec, model=model, config=CONFIG)}

    assert ids("a") == ids("a")
    assert not ids("a") & ids("b")


@pytest.mark.parametrize(
    ("right", "help"),
    [
        ({"plain": 1, "mixture": 1, "base": 1}, Help(None, 0.0, 0.0)),
        ({"plain": 0, "mixture": 3, "base": 0}, Help("mixture", 1.0, 0.0)),
        ({"plain": 0, "mixture": 1, "base": 3}, Help("base", 1.0, 0.0)),
        ({"plain": 3, "mixture": 0, "base": 1}, Help(None, -2 / 3, 1 / 3)),
        ({"plain": 1, "mixture": 2, "base": 2}, Help(None, 1 / 3, 1 / 3)),  # just its error
    ],
)
def test_they_help_where_they_gain_more_than_chance(
    catalog: Catalog, codec: Any, right: dict[str, int], help: Help
) -> None:
    asked = trials(catalog, 2, codec, config=CONFIG)
    answers = {}
    for trial in asked:
        good = trial.task == "sums" and trial.own and trial.place < right[trial.way]
        answers[trial.row.id] = AnswerRow("", f"{trial.task} answer" if good else "?", "stop", 1)
    found = helped(catalog, 2, codec, asked, answers)
    assert found.keys() == {"sums", "poems"}
    own = found["sums"].own
    assert own is not None and own.by == help.by
    assert (own.gain, own.error) == (pytest.approx(help.gain), pytest.approx(help.error))
    assert found["poems"].own is None and found["poems"].others.by is None
    assert found["sums"].tokens == (len("1+1>sums answer>"),) * 3


def test_less_is_enough_where_no_adapter_was_made_for_the_task(catalog: Catalog, codec: Any) -> None:
    asked = trials(catalog, 2, codec, config=CONFIG)
    right = {trial.row.id for trial in asked if not trial.own and trial.place < 1 + (trial.way != "plain")}
    answers = {t.row.id: AnswerRow("", f"{t.task} answer" * (t.row.id in right), "stop", 1) for t in asked}
    others = helped(catalog, 2, codec, asked, answers)["sums"].others
    assert (others.by, others.gain, others.error) == ("mixture", pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_an_engine_answers_and_the_catalog_keeps_it(
    catalog: Catalog, repository: AdapterRepository, engine: Any, tmp_path: Path
) -> None:
    asked = trials(catalog, 1, engine.codec, config=CONFIG)
    rows = list({trial.row.id: trial.row for trial in asked}.values())
    answer(rows, engine, adapters_in(repository, catalog.adapters), tmp_path / "answers.jsonl")
    answers = read_answers(tmp_path / "answers.jsonl")
    found = helped(catalog, 1, engine.codec, asked, answers)
    assert {entry.name: entry.shown for entry in with_shown(catalog, found).entries} == {**found, "lone": None}
    assert tokens_of(engine.codec, catalog.tasks[0].task) == (len("x>lone answer>"),)


def test_some_tasks_are_asked_again_and_where_none_fits_nothing_helps(
    catalog: Catalog, repository: AdapterRepository, engine: Any, make_task: Callable[..., Any]
) -> None:
    catalog = with_tasks(catalog, [make_task("long", *("long " * 1200 + end for end in "ab"))], HashingEncoder())
    load = adapters_in(repository, catalog.adapters)
    found = ask_again(catalog, ["sums", "long"], 1, engine, load)
    assert found.keys() == {"sums", "long"}
    assert found["sums"].own is not None
    assert found["long"].others == Help(None, 0.0, 0.0)
    assert with_shown(catalog, found).place("long") is not None


def test_the_tasks_of_which_nothing_is_known_are_found(catalog: Catalog, make_task: Callable[..., Any]) -> None:
    nothing = Help(None, 0.0, 0.0)
    assert unchecked(catalog) == (0, [])

    def shown(own: Help | None, size: int) -> ShownExamples:
        return ShownExamples(2, own, nothing, (9,) * size)

    whole = with_shown(catalog, {"sums": shown(nothing, 3), "poems": shown(None, 2)})
    assert unchecked(whole) == (2, [])
    composed = AdapterManifest("poems.composed", "1" * 16, {}, provenance={"task": "poems", "sources": []})
    assert unchecked(with_adapter(whole, AdapterManifest("else", "1" * 16, {}))) == (2, [])

    many = with_tasks(whole, more(make_task), HashingEncoder())
    assert unchecked(many) == (2, []), "most were never asked"
    many = with_shown(many, {"rain": shown(None, 2), "snow": shown(None, 2)})
    for made in (AdapterManifest("poems", "1" * 16, {}), composed):
        assert unchecked(with_adapter(many, made)) == (2, ["poems"])
    assert unchecked(with_tasks(many, [make_task("hail")], HashingEncoder())) == (2, ["hail"])
    assert unchecked(with_tasks(many, [make_task("rain", "other", "words")], HashingEncoder())) == (2, ["rain"])


def more(make_task: Callable[..., Any]) -> list[Any]:
    return [make_task("rain"), make_task("snow")]
