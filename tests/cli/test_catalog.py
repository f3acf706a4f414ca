"""`lorauter catalog build --match`, `change`, `versions`, `use` and `prune`, with a tiny random model of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Cli, Ran
from fake_states import HashingStates
from safetensors.torch import load_file, save_file
from tiny_model import write_model

from lorauter.adapters import AdapterRepository, open_store
from lorauter.adapters.provenance import PROVENANCE
from lorauter.adapters.weights import WEIGHTS_FILE
from lorauter.catalog import Catalog, build_catalog, catalog_versions, current_version, with_tasks
from lorauter.catalog.match import MatchConfig
from lorauter.catalog.parts import key_of
from lorauter.catalog.scores import Evaluation, Failed, ScoreTable
from lorauter.catalog.scoring import open_scorer
from lorauter.encoder import HashingEncoder
from lorauter.errors import AdapterUnavailable, StoreUnavailable
from lorauter.tasks import Task, read_tasks

WORDS = {"sums": "add numbers", "poems": "rhyme verses", "rain": "weather forecast"}


@pytest.fixture
def cli(cli: Cli) -> Cli:
    """`cli(*arguments)`: run `lorauter catalog` to its end."""
    return partial(cli, "catalog")


@pytest.fixture
def pool(tmp_path: Path, make_adapter: Callable[..., Path]) -> Path:
    for name in ("sums", "poems", "spare"):
        make_adapter(tmp_path / "pool", name)
    return tmp_path / "pool"


def write_tasks(folder: Path, *tasks: Task) -> Path:
    folder.mkdir(exist_ok=True)
    for task in tasks:
        (folder / f"{task.name}.json").write_text(json.dumps(task.to_json()))
    return folder


@pytest.fixture
def tasks(tmp_path: Path, make_task: Callable[..., Task]) -> Path:
    made = (make_task(name, f"{words} one", f"{words} two") for name, words in WORDS.items())
    return write_tasks(tmp_path / "tasks", *made)


class Scorer:
    """The fake: `spare` is the best at everything, and some adapters are broken."""

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken = broken
        self.asked: list[Evaluation] = []
        self.opened: list[tuple[str, str]] = []
        self.error: Exception | None = None

    def score(self, evaluations: list[Evaluation]) -> dict[Evaluation, float | Failed]:
        if self.error:
            raise self.error
        self.asked += evaluations
        return {e: Failed("is corrupt") if e.adapter in self.broken else self.worth(e) for e in evaluations}

    def worth(self, evaluation: Evaluation) -> float:
        worth = 0.9 if evaluation.adapter == "spare" else 0.5 if evaluation.adapter == evaluation.task else 0.1
        return math.log(worth) if self.opened[-1][0] == "likelihood" else worth


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> Scorer:
    fake = Scorer()

    @contextmanager
    def opened(by: str, model: str, load_adapter: object, tasks: object) -> Any:
        fake.opened.append((by, model))
        yield fake

    monkeypatch.setattr("lorauter.catalog.scoring.open_scorer", opened)
    monkeypatch.setattr("lorauter.catalog.provenance.model_digest", lambda model: f"digest of {model}")
    return fake


@pytest.fixture
def match(cli: Cli, tasks: Path, pool: Path, tmp_path: Path) -> Cli:
    """`match(*options)`: build the catalog `out` by matching."""

    def run(*options: object) -> Ran:
        where = ("--tasks", tasks, "--adapters", pool, "--out", tmp_path / "out")
        return cli("build", *where, "--match", *options)

    return run


def served(catalog: Path) -> dict[str, list[str]]:
    return {task.name: [adapter.name for adapter in task.adapters] for task in Catalog.load(catalog).tasks}


def test_what_cannot_be_served_is_told_and_left_out(
    cli: Cli, tasks: Path, pool: Path, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    make_adapter(pool, "poems", use_dora=True)
    ran = cli("build", "--tasks", tasks, "--adapters", pool, "--out", tmp_path / "out")
    assert ran.code == 0
    assert "left out: adapter 'poems': adapter_config.json has use_dora, which is not served" in ran.err
    assert served(tmp_path / "out") == {"sums": ["sums"], "poems": [], "rain": []}
    make_adapter(pool, "poems")
    make_adapter(pool, "sums", fill=float("nan"))
    ran = cli("change", tmp_path / "out", "--refresh-adapters", pool)
    assert "left out: adapter 'sums': " in ran.err
    assert served(tmp_path / "out") == {"sums": [], "poems": ["poems"], "rain": []}


@pytest.mark.parametrize("by", ["metric", "likelihood"])
def test_matching_takes_the_best(match: Cli, scorer: Scorer, tmp_path: Path, by: str) -> None:
    ran = match("--by", by, "--model", "some/model")
    assert (ran.code, scorer.opened) == (0, [(by, "some/model")])
    assert "18 evaluations, 100.0% of the 18 of every adapter on every example" in ran.err
    for names in served(tmp_path / "out").values():
        assert names[0] == "spare" and sorted(names) == ["poems", "spare", "sums"]
    scores = Catalog.load(tmp_path / "out").tasks[0].scores
    assert scores["spare"] == pytest.approx({0: 0.9, 1: 0.9})


def test_what_is_broken_is_named_and_left_out(match: Cli, scorer: Scorer, tmp_path: Path) -> None:
    scorer.broken = ("spare",)
    ran = match()
    assert ran.code == 0
    assert "left out: spare: is corrupt" in ran.err.splitlines()
    assert sorted(served(tmp_path / "out")["sums"]) == ["poems", "sums"]
    assert list(Catalog.load(tmp_path / "out").adapters) == ["poems", "sums"]
    scorer.broken = ("spare", "sums", "poems")
    match().refused("no adapter can be used on the base model 'default'")


def test_an_outage_stops_the_run_and_the_next_goes_on(match: Cli, scorer: Scorer, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    assert match("--scores", file).code == 0
    version = current_version(tmp_path / "out")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]))  # the header, and two scores: what a run has written that was cut off
    scorer.error = AdapterUnavailable("the store cannot be read", adapter="sums")
    match("--scores", file).refused("the store cannot be read")
    assert len(ScoreTable(file).scores) <= 2 and ScoreTable(file).failures == {}
    assert current_version(tmp_path / "out") == version
    scorer.error = None
    scorer.asked.clear()
    assert match("--scores", file).code == 0
    assert len(scorer.asked) == 16
    assert (len(lines), current_version(tmp_path / "out")) == (1 + 18, version)
    assert match("--scores", file).code == 0
    assert (len(scorer.asked), current_version(tmp_path / "out")) == (16, version)


def test_scores_of_another_model_other_examples_or_an_adapter_that_was_replaced_are_refused_at_once(
    match: Cli, scorer: Scorer, tasks: Path, pool: Path, make_adapter: Any, tmp_path: Path
) -> None:
    file = tmp_path / "scores.jsonl"
    assert match("--scores", file).code == 0
    scorer.opened.clear()
    match("--scores", file, "--model", "other/model").refused("base model was digest of default")
    make_adapter(pool, "spare", rank=5)
    match("--scores", file).refused("adapter 'spare' was")
    path = next(path for path in tasks.iterdir() if "rain" in path.name)
    path.write_text(path.read_text().replace('"target": "', '"target": "not '))
    match("--scores", file).refused("task 'rain' was")
    assert not scorer.opened


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"adapter": "sums", "task": "rain", "example": 2, "score": 0.5}, (), "the task has 2 validation examples"),
        ({"adapter": "sums", "task": "rain", "example": 0, "score": -0.5}, (), "that are not by metric"),
        ({"adapter": "sums", "task": "rain", "example": 0, "score": 0.5}, ("--by", "likelihood"), "not by likelihood"),
    ],
)
def test_scores_of_something_else_are_refused_at_once(
    match: Cli, scorer: Scorer, tmp_path: Path, row: dict[str, Any], options: tuple[str, ...], said: str
) -> None:
    (tmp_path / "scores.jsonl").write_text(json.dumps(row) + "\n")
    match("--scores", tmp_path / "scores.jsonl", *options).refused(said)
    assert not scorer.opened


def test_matching_needs_adapters_and_a_place_for_scores(cli: Cli, match: Cli, tasks: Path, tmp_path: Path) -> None:
    where = ("--tasks", tasks, "--out", tmp_path / "out")
    cli("build", *where, "--match").refused("--adapters")
    cli("build", *where, "--scores", tmp_path / "s.jsonl").refused("only with --match")
    match("--scores", tmp_path / "nowhere" / "s.jsonl").refused("is not there")


def test_compositions_alone_are_nothing_to_try(
    cli: Cli, scorer: Scorer, tasks: Path, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    file = make_adapter(tmp_path / "made", "sums.composed") / WEIGHTS_FILE
    provenance = {PROVENANCE: json.dumps({"task": "sums", "sources": []})}
    save_file(load_file(file), file, metadata=provenance)
    where = ("--tasks", tasks, "--adapters", tmp_path / "made", "--out", tmp_path / "out")
    cli("build", *where, "--match").refused("no adapter to try")


# a real, tiny engine


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A random Llama that the adapters of `make_adapter` fit, in a folder of the name that they give."""
    folder = write_model(tmp_path / "tiny-base")
    threads = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize("by", ["metric", "likelihood"])
def test_matching_on_a_model(
    match: Cli, pool: Path, make_adapter: Callable[..., Path], model: Path, tmp_path: Path, by: str
) -> None:
    make_adapter(pool, "stranger", base="org/another")
    ran = match("--by", by, "--model", model)
    assert ran.code == 0, ran
    assert "left out: stranger: adapter 'stranger': " in ran.err
    for task in Catalog.load(tmp_path / "out").tasks:
        assert sorted(task.scores) == sorted(a.name for a in task.adapters) == ["poems", "spare", "sums"]
        assert all(0 <= score <= 1 for of in task.scores.values() for score in of.values())


def test_examples_are_asked_after_others(
    cli: Cli, pool: Path, model: Path, make_task: Callable[..., Task], tmp_path: Path
) -> None:
    """A run that was cut off goes on; what is found out is in the catalog, which is else as it would be without."""
    some = write_tasks(tmp_path / "some", make_task("sums"), make_task("rain"))
    given = ("build", "--tasks", some, "--adapters", pool, "--model", model, "--out", tmp_path / "out")
    kept = tmp_path / "s.jsonl.examples"
    ran = cli(*given, "--examples", 1, "--scores", tmp_path / "s.jsonl")
    assert ran.code == 0, ran
    assert "examples help " in ran.err
    catalog = Catalog.load(tmp_path / "out")
    assert [(e.name, e.shown and (e.shown.count, bool(e.shown.own))) for e in catalog.entries] == [
        ("rain", (1, False)),
        ("sums", (1, True)),
    ]
    whole = kept.read_bytes()
    kept.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert cli(*given, "--examples", 1, "--scores", tmp_path / "s.jsonl").out == ran.out
    assert kept.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:3]))
    assert sorted(kept.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert cli(*given).out != ran.out, "another version"
    assert {entry.shown for entry in Catalog.load(tmp_path / "out").entries} == {None}
    assert cli(*given, "--examples", 17).code == 2


@pytest.mark.parametrize("by", ["metric", "likelihood"])
def test_a_large_pool_is_screened_first(
    match: Cli, pool: Path, make_adapter: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr("lorauter.catalog.screen.LARGE", 4)
    monkeypatch.setattr("lorauter.catalog.screen.SCREEN", MatchConfig(first_examples=1, keep=0.25, min_candidates=1))
    make_adapter(pool, "stranger", base="org/another")
    make_adapter(pool, "twin", fill=0.25)
    make_adapter(pool, "zwilling", fill=0.25)
    file = tmp_path / "scores.jsonl"
    ran = match("--by", by, "--model", model, "--scores", file)
    assert ran.code == 0, ran
    assert "left out: stranger: adapter 'stranger': " in ran.err
    assert "not tried, as they compute the same as another, which is: zwilling (twin)" in ran.err
    first = Catalog.load(tmp_path / "out")
    for task in first.tasks:
        own = {task.name} & {"poems", "sums"}  # whose name speaks for it
        scores = {**task.scores}
        assert scores.pop("zwilling", None) == scores.get("twin"), "which stands in for it"
        assert own <= scores.keys() <= {"poems", "spare", "sums", "twin"}
        assert 1 <= len(scores) <= 2 and all(len(of) == 2 for of in scores.values())
        assert all(0 <= score <= 1 for of in scores.values() for score in of.values())
    assert first.copies == {"twin": "twin", "zwilling": "twin"}
    assert {"zwilling"} < set(first.adapters) and "stranger" not in first.adapters
    assert (tmp_path / "scores.likelihood.jsonl").exists() == (by == "metric")
    for scored in (file, tmp_path / "scores.likelihood.jsonl"):
        if scored.exists():
            scored.write_text("".join(scored.read_text().splitlines(keepends=True)[:5]))
    again = match("--by", by, "--model", model, "--scores", file)
    assert again.code == 0 and Catalog.load(tmp_path / "out").version == first.version


@pytest.mark.parametrize("by", ["metric", "likelihood"])
def test_an_outage_is_no_adapters_failure(tasks: Path, model: Path, by: Any) -> None:
    for error in (AdapterUnavailable("away", adapter="sums"), StoreUnavailable("away", uri="s3://b")):

        def load(name: str, error: Exception = error) -> Any:
            raise error

        with open_scorer(by, str(model), load, read_tasks(tasks)) as scorer, pytest.raises(type(error)):
            scorer.score([Evaluation("sums", "rain", 0)])


# change


@pytest.fixture
def catalog(cli: Cli, pool: Path, tasks: Path, tmp_path: Path) -> Path:
    assert cli("build", "--tasks", tasks, "--adapters", pool, "--out", tmp_path / "catalog").code == 0
    return tmp_path / "catalog"


def test_change_is_as_if_built_anew(
    cli: Cli,
    catalog: Path,
    pool: Path,
    make_task: Callable[..., Task],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    more = write_tasks(tmp_path / "more", make_task("tides"))
    make_adapter(pool, "tides")
    make_adapter(pool, "sums", rank=3)
    options = ("--add-tasks", more, "--remove-task", "rain", "--remove-task", "poems", "--refresh-adapters", pool)
    ran = cli("change", catalog, *options)
    assert ran.code == 0, ran
    found = [task for task in [*read_tasks(more), *read_tasks(tmp_path / "tasks")] if task.name in ("tides", "sums")]
    repository = AdapterRepository(open_store(pool))
    anew = build_catalog(found, HashingEncoder(), states=HashingStates(), repository=repository)
    assert ran.out == f"{anew.version}\t2 tasks, 4 adapters, 2 tasks with an adapter\n"
    assert current_version(catalog) == anew.version
    assert cli("change", catalog, "--remove-adapter", "tides").code == 0
    assert served(catalog) == {"sums": ["sums"], "tides": []}


def test_states_are_kept_with_the_examples_unless_none_are_wanted(
    cli: Cli, catalog: Path, tasks: Path, make_task: Callable[..., Task], tmp_path: Path
) -> None:
    assert Catalog.load(catalog).states is not None
    more = write_tasks(tmp_path / "more", make_task("tides"))
    cli("change", catalog, "--add-tasks", more, "--states", "none").refused("tasks that come need theirs")
    assert cli("build", "--tasks", tasks, "--out", tmp_path / "plain", "--states", "none").code == 0
    assert Catalog.load(tmp_path / "plain").states is None
    assert cli("change", tmp_path / "plain", "--add-tasks", more).code == 0
    assert Catalog.load(tmp_path / "plain").states is None


def test_another_version_that_keeps_its_scores_is_named(
    cli: Cli,
    match: Cli,
    scorer: Scorer,
    pool: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    assert match().code == 0
    make_adapter(pool, "sums", rank=3)
    ran = cli("change", tmp_path / "out", "--refresh-adapters", pool)
    assert [line for line in ran.err.splitlines() if "another version" in line] == [
        "adapter 'sums' has another version, and keeps the scores of the one before"
    ]


def test_changes_that_cannot_be(cli: Cli, catalog: Path, tmp_path: Path) -> None:
    version = current_version(catalog)
    cli("change", catalog).refused("nothing to change")
    cli("change", catalog, "--remove-task", "nil").refused("no task called nil")
    cli("change", catalog, "--remove-adapter", "nil").refused("no adapter called nil")
    everything = [part for name in WORDS for part in ("--remove-task", name)]
    cli("change", catalog, *everything).refused("the last one cannot be taken out")
    cli("change", catalog, "--refresh-adapters", tmp_path / "nowhere").refused("there is no adapter in")
    assert current_version(catalog) == version


class Meanwhile(HashingEncoder):
    """An encoder, in whose first work's time somebody else publishes a change."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._acts = [act]

    def encode(self, texts: Any) -> Any:
        if self._acts:
            self._acts.pop()()
        return super().encode(texts)


def test_what_is_published_meanwhile_is_kept_by_a_change_and_stops_a_build(
    cli: Cli,
    catalog: Path,
    pool: Path,
    tasks: Path,
    make_task: Callable[..., Task],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def meanwhile(name: str, *inputs: str) -> None:
        theirs = Meanwhile(lambda: change_catalog_of(catalog, make_task(name, *inputs)))
        monkeypatch.setattr("lorauter.defaults.load_encoder", lambda _: theirs)

    more = write_tasks(tmp_path / "more", make_task("tides"))
    meanwhile("theirs")
    changed = cli("change", catalog, "--add-tasks", more, "--remove-task", "rain")
    assert changed.code == 0, changed
    assert set(served(catalog)) == {"sums", "poems", "tides", "theirs"}
    meanwhile("tides", "of their own")
    cli("change", catalog, "--add-tasks", write_tasks(tmp_path / "same", make_task("tides", "of my own"))).refused(
        "somebody else changed task 'tides' meanwhile"
    )
    meanwhile("theirs-too")
    built = cli("build", "--tasks", tasks, "--adapters", pool, "--out", catalog)
    built.refused("somebody else made version")
    current = current_version(catalog)
    assert set(served(catalog)) == {"sums", "poems", "tides", "theirs", "theirs-too"}
    repository = AdapterRepository(open_store(pool))
    anew = build_catalog(read_tasks(tasks), HashingEncoder(), states=HashingStates(), repository=repository)
    assert anew.version in built.err
    assert current in built.err
    assert cli("use", catalog, anew.version).code == 0


def change_catalog_of(catalog: Path, task: Task) -> None:
    with_tasks(Catalog.load(catalog), [task], HashingEncoder(), states=HashingStates()).save(catalog)


def test_versions_are_listed_and_used_again(cli: Cli, catalog: Path) -> None:
    first = current_version(catalog)
    assert cli("change", catalog, "--remove-task", "rain").code == 0
    second = current_version(catalog)
    listed = cli("versions", catalog)
    assert sorted(listed.out.splitlines()) == sorted(
        [
            f"{first}\t-\t3 tasks, 3 adapters, 2 tasks with an adapter",
            f"{second}\tcurrent\t2 tasks, 3 adapters, 2 tasks with an adapter",
        ]
    )
    used = cli("use", catalog, first)
    assert (used.code, used.out) == (0, f"{first}\t3 tasks, 3 adapters, 2 tasks with an adapter\n")
    assert current_version(catalog) == first
    part, examples = Catalog.load(catalog, version=str(second)).segments[0].digests
    (catalog / key_of(examples)).write_bytes(b"damaged")
    cli("use", catalog, second).refused(f"{key_of(examples)} is damaged")
    (catalog / key_of(part)).write_bytes(b"damaged")
    assert f"{second}\t-\tcatalog " in cli("versions", catalog).out
    cli("use", catalog, second).refused(f"{key_of(part)} is damaged")
    cli("use", catalog, "0" * 16).refused("there is no version '0000000000000000'")
    assert current_version(catalog) == first


def test_old_versions_are_pruned(cli: Cli, catalog: Path) -> None:
    [first] = catalog_versions(catalog)
    assert cli("change", catalog, "--remove-task", "rain").code == 0
    for options in ((), ("--keep", 0), ("--older-than", 0)):
        kept = cli("prune", catalog, *options)
        assert (kept.code, kept.out) == (0, "")
    pruned = cli("prune", catalog, "--keep", 0, "--older-than", 0)
    assert (pruned.code, pruned.out) == (0, f"{first}\n")
    assert first not in catalog_versions(catalog)
    assert Catalog.load(catalog).version != first
