"""Successive halving finds each task's adapters with a fraction of the evaluations."""

import json
import random
from dataclasses import replace
from statistics import fmean

import pytest

from lorauter.catalog.match import MatchConfig, Matching, Round, match_adapters
from lorauter.catalog.provenance import Provenance, model_digest, task_digests
from lorauter.catalog.scores import Evaluation, Failed, ScoreTable, score_all, score_file, write_evaluations
from lorauter.errors import CatalogError, ConfigError, LorauterError
from lorauter.tasks import Example, Task

ADAPTERS = [f"a{i:02}" for i in range(40)]


def tasks_of(count, examples=20):
    validation = tuple(Example(f"question {i}", "answer") for i in range(examples))
    return [Task(f"t{i:02}", "tests", "em", validation) for i in range(count)]


class Matrix:
    """The fake scorer: noisy scores of known means. Adapter i is task i's own; a few others are not bad at it."""

    def __init__(self, seed, tasks, adapters=ADAPTERS, noise=0.2, broken=()):
        draw = random.Random(seed)
        self.broken, self.asked = broken, []
        self.scores = {}
        for i, task in enumerate(tasks):
            related = draw.sample(adapters, min(5, len(adapters)))
            for adapter in adapters:
                own = adapter == adapters[i % len(adapters)]
                mean = draw.uniform(0.5, 0.9) if own else draw.uniform(0.2, 0.5) if adapter in related else 0.05
                for example in range(len(task.validation)):
                    self.scores[Evaluation(adapter, task.name, example)] = mean + draw.gauss(0, noise)

    def mean(self, adapter, task):
        return fmean(self.scores[Evaluation(adapter, task.name, i)] for i in range(len(task.validation)))

    def score(self, evaluations):
        self.asked += evaluations
        return {e: Failed("is corrupt") if e.adapter in self.broken else self.scores[e] for e in evaluations}


class Dying:
    """A scorer that dies after so many calls."""

    def __init__(self, scorer, calls):
        self.scorer, self.left = scorer, calls

    def score(self, evaluations):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.scorer.score(evaluations)


class Given:
    """A scorer of one mean for each adapter, whatever the example."""

    def __init__(self, **means):
        self.means = means

    def score(self, evaluations):
        return {evaluation: self.means[evaluation.adapter] for evaluation in evaluations}


def names(matching):
    return {task: [match.name for match in matches] for task, matches in matching.result().items()}


@pytest.mark.parametrize("seed", range(3))
def test_a_quarter_of_the_matrix_finds_the_best(seed) -> None:
    tasks = tasks_of(40)
    matrix = Matrix(seed, tasks)
    matching = match_adapters(tasks, ADAPTERS, matrix)
    assert matching.exhaustive == 40 * 40 * 20
    assert matching.spent == len(matrix.asked) == len(set(matrix.asked)) <= matching.exhaustive / 4
    assert matching.rounds == [
        Round(pairs=1600, examples=2, evaluations=3200),
        Round(pairs=640, examples=4, evaluations=1280),
        Round(pairs=240, examples=8, evaluations=960),
        Round(pairs=200, examples=20, evaluations=2400),
    ]
    regrets = []
    for task in tasks:
        matches = matching.result()[task.name]
        assert [match.score for match in matches] == pytest.approx([matrix.mean(m.name, task) for m in matches])
        assert len(matches) == 5 and matches[0].score >= matches[1].score >= matches[2].score
        regrets.append(max(matrix.mean(adapter, task) for adapter in ADAPTERS) - matches[0].score)
    assert fmean(regrets) < 0.005 and max(regrets) < 0.2


def test_noise_that_hides_the_best_at_first_costs_little() -> None:
    tasks = tasks_of(40)
    matrix = Matrix(7, tasks, noise=0.45)
    best = [max(matrix.mean(adapter, task) for adapter in ADAPTERS) for task in tasks]
    found = [matches[0].score for matches in match_adapters(tasks, ADAPTERS, matrix).result().values()]
    assert fmean(found) > 0.95 * fmean(best)


def test_several_good_adapters_of_one_task_stay_ranked() -> None:
    good = {"zeta": 0.9, "alpha": 0.8, "mid": 0.7}
    scorer = Given(**dict.fromkeys(ADAPTERS, 0.1), **good)
    matching = match_adapters(tasks_of(1), [*ADAPTERS, *good], scorer)
    assert [(match.name, match.score) for match in matching.result()["t00"][:3]] == list(good.items())


def test_equals_are_ordered_by_name_and_the_order_given_does_not_matter() -> None:
    scorer = Given(**dict.fromkeys(ADAPTERS, 0.5))
    results = [match_adapters(tasks_of(2), order, scorer).result() for order in (ADAPTERS, ADAPTERS[::-1])]
    assert results[0] == results[1]
    assert [match.name for match in results[0]["t01"]] == ["a00", "a01", "a02", "a03", "a04"]


def test_the_same_seed_asks_the_same_and_another_takes_other_examples() -> None:
    tasks = tasks_of(4)
    asked = []
    for seed in (0, 0, 1):
        matrix = Matrix(0, tasks)
        match_adapters(tasks, ADAPTERS, matrix, MatchConfig(seed=seed))
        asked.append(matrix.asked)
    assert asked[0] == asked[1] != asked[2]


def test_all_adapters_of_a_task_meet_the_same_examples() -> None:
    first = Matching({"t": 20, "u": 20}, ADAPTERS).next_round()
    met = {(e.task, e.adapter): {o.example for o in first if (o.task, o.adapter) == (e.task, e.adapter)} for e in first}
    for task in ("t", "u"):
        assert len({frozenset(examples) for (t, _), examples in met.items() if t == task}) == 1


def test_candidates_stay_to_the_end_and_drive_nobody_out() -> None:
    means = {name: i / 100 for i, name in enumerate(ADAPTERS)}  # the best one is the last
    favoured = ADAPTERS[:4]
    matching = Matching({"t": 20}, ADAPTERS, MatchConfig(candidates={"t": favoured}))
    matching.record(Given(**means).score(matching.next_round()))
    second = {evaluation.adapter for evaluation in matching.next_round()}
    assert second == {*favoured, *ADAPTERS[-16:]}
    matching.record(Given(**means).score(matching.next_round()))
    assert {evaluation.adapter for evaluation in matching.next_round()} == {*favoured, *ADAPTERS[-6:]}
    while wanted := matching.next_round():
        score_all(wanted, Given(**means), matching.table)
    assert names(matching) == {"t": ["a39", "a38", "a37", "a36", "a35", *reversed(favoured)]}


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_candidate_that_luck_deserts_at_first_is_found(rounds) -> None:
    matching = Matching({"t": 20}, ADAPTERS, MatchConfig(candidates={"t": ["a39"]}))
    unlucky = set()
    for _ in range(rounds):
        wanted = matching.next_round()
        unlucky |= {e for e in wanted if e.adapter == "a39"}
        matching.record({e: 0.01 * (e.adapter != "a39") for e in wanted})
    while wanted := matching.next_round():
        matching.record({e: float(e.adapter == "a39" and e not in unlucky) for e in wanted})
    assert names(matching)["t"][0] == "a39"


def test_broken_adapters_are_reported_and_left_out_everywhere() -> None:
    tasks = tasks_of(6)
    matrix = Matrix(1, tasks, broken=("a00", "a03"))
    matching = match_adapters(tasks, ADAPTERS, matrix)
    assert matching.failures == {"a00": "is corrupt", "a03": "is corrupt"}
    assert all(not {"a00", "a03"} & set(found) and len(found) == 5 for found in names(matching).values())
    sound = [name for name in ADAPTERS if name not in ("a00", "a03")]
    assert matching.result() == match_adapters(tasks, sound, matrix).result()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_breaks_late_makes_room_for_the_next(value) -> None:
    means = {name: i / 100 for i, name in enumerate(ADAPTERS)}
    matching = Matching({"t": 20, "u": 20}, ADAPTERS)
    while wanted := matching.next_round():
        late = len({evaluation.adapter for evaluation in wanted}) < 6
        matching.record({e: value if late and e.adapter == "a39" else means[e.adapter] for e in wanted})
    assert list(matching.failures) == ["a39"] and str(value) in matching.failures["a39"]
    assert names(matching) == {task: ["a38", "a37", "a36", "a35", "a34"] for task in "tu"}


def test_when_all_are_broken_nothing_is_left() -> None:
    tasks = tasks_of(2)
    matching = match_adapters(tasks, ADAPTERS[:5], Matrix(0, tasks, broken=ADAPTERS))
    assert (matching.result(), len(matching.failures)) == ({"t00": (), "t01": ()}, 5)


def test_small_pools_and_tasks_of_any_size() -> None:
    tasks = [*tasks_of(1, examples=1), *tasks_of(3, examples=7)[1:]]
    adapters = ADAPTERS[:4]
    matching = match_adapters(tasks, adapters, Matrix(0, tasks, adapters), MatchConfig(first_examples=3))
    assert [len(found) for found in matching.result().values()] == [4, 4, 4]
    alone = match_adapters(tasks, adapters[:1], Matrix(0, tasks, adapters))
    assert alone.spent == alone.exhaustive == 15


@pytest.mark.parametrize("calls", [0, 1, 5, 9])
def test_a_killed_run_goes_on_where_it_was(tmp_path, calls) -> None:
    tasks, file = tasks_of(20), tmp_path / "scores.jsonl"
    whole = Matrix(3, tasks, broken=("a07",))
    expected = match_adapters(tasks, ADAPTERS, whole)
    first = Matrix(3, tasks, broken=("a07",))
    with pytest.raises(KeyboardInterrupt):
        match_adapters(tasks, ADAPTERS, Dying(first, calls), table=ScoreTable(file))
    if calls:
        file.write_bytes(file.read_bytes()[:-9])  # it died while writing
    second = Matrix(3, tasks, broken=("a07",))
    resumed = match_adapters(tasks, ADAPTERS, second, table=ScoreTable(file))
    assert resumed.result() == expected.result()
    assert resumed.rounds == expected.rounds
    assert resumed.failures == expected.failures
    scored_twice = {e for e in set(first.asked) & set(second.asked) if e.adapter != "a07"}
    assert len(scored_twice) <= 1  # the torn one
    third = Matrix(3, tasks)
    assert match_adapters(tasks, ADAPTERS, third, table=ScoreTable(file)).result() == expected.result()
    assert third.asked == []


def test_progress_counts_up_and_each_round_down() -> None:
    calls = []
    tasks = tasks_of(10)
    matching = match_adapters(tasks, ADAPTERS, Matrix(0, tasks), progress=lambda *call: calls.append(call))
    assert calls[:2] == [(256, 544), (512, 288)] and calls[-1] == (matching.spent, 0)


def test_no_result_before_the_end() -> None:
    with pytest.raises(LorauterError, match="'t' waits for 80 evaluations"):
        Matching({"t": 20}, ADAPTERS).result()


def test_a_scorer_that_skips_an_evaluation_is_found_out() -> None:
    class Lazy:
        def score(self, evaluations):
            return {}

    with pytest.raises(LorauterError, match="no outcome for Evaluation"):
        match_adapters(tasks_of(1), ADAPTERS, Lazy())


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"first_examples": 0}, "first_examples"), ({"keep": 1.0}, "keep"), ({"min_candidates": 0}, "min_candidates")],
)
def test_settings_out_of_range_are_refused(settings, name) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        MatchConfig(**settings)
    assert caught.value.setting == f"match.{name}"


@pytest.mark.parametrize("candidates", [{"none": ["a00"]}, {"t": ["none"]}])
def test_candidates_that_are_not_there_are_refused(candidates) -> None:
    with pytest.raises(ConfigError, match="names 'none', which is not there"):
        Matching({"t": 3}, ADAPTERS, MatchConfig(candidates=candidates))


def test_a_task_without_examples_is_refused() -> None:
    with pytest.raises(ConfigError, match="'t' has no validation example"):
        Matching({"t": 0}, ADAPTERS)


# --- the table and its files


def test_a_table_is_read_back_as_it_was(tmp_path) -> None:
    file = tmp_path / "scores.jsonl"
    table = ScoreTable(file)
    table.add(
        {Evaluation("ä", "t", 0): 0.25, Evaluation("ä", "t", 3): 1.0, Evaluation("b", "t", 0): Failed("why\nnot")}
    )
    table.add({Evaluation("c", "t", 0): float("nan")})
    again = ScoreTable(file)
    assert (again.scores, again.failures) == (table.scores, table.failures)
    assert again.scores == {("ä", "t"): {0: 0.25, 3: 1.0}}
    assert (again.mean("ä", "t"), again.mean("ä", "t", [3])) == (0.625, 1.0)
    assert list(again.failures) == ["b", "c"] and again.failures["b"] == "why\nnot"
    assert again.has(Evaluation("b", "other", 9)) and not again.has(Evaluation("ä", "t", 1))
    assert [json.loads(line)["example"] for line in file.read_text().splitlines()] == [0, 3, 0, 0]


def test_scores_of_something_else_are_refused(tmp_path) -> None:
    file, [task] = tmp_path / "scores.jsonl", tasks_of(1, 2)
    made_of = Provenance("m1", "metric", task_digests([task]), {"a": "v1", "b": "v1"})
    table = ScoreTable(file)
    table.bind(made_of)
    table.add({Evaluation("a", task.name, 0): 0.5, Evaluation("b", task.name, 0): Failed("broken")})
    for same in (made_of, Provenance(), Provenance(adapters={"c": "v9"}), Provenance(tasks={"u": "?"})):
        ScoreTable(file).bind(same)
    other = replace(task, validation=(*task.validation[1:], *task.validation[:1]))
    for differing, said in (
        (replace(made_of, model="m2"), "base model was m1 and is m2"),
        (replace(made_of, by="likelihood"), "way of scoring"),
        (replace(made_of, tasks=task_digests([other])), f"task '{task.name}'"),
        (replace(made_of, tasks=task_digests([replace(task, metric="bleu")])), f"task '{task.name}'"),
        (replace(made_of, adapters={"a": "v2", "b": "v1"}), "adapter 'a' was v1 and is v2"),
        (replace(made_of, adapters={"a": "v2", "b": "v2"}), "and 1 more differ"),
    ):
        with pytest.raises(CatalogError, match=said) as caught:
            ScoreTable(file).bind(differing)
        assert str(file) in str(caught.value)
    header, *rows = file.read_text().splitlines(keepends=True)
    assert json.loads(header)["made_of"]["tasks"] == task_digests([task])
    for kept in (rows, [header, '{"adapter": "c", "task": "t00", "example": 0, "score": 1.0}\n']):
        file.write_text("".join(kept))
        with pytest.raises(CatalogError, match="was not noted"):
            ScoreTable(file).bind(replace(made_of, adapters={"a": "v1", "c": "v1"}))


def test_a_table_grows_with_its_tasks_and_adapters_and_lines_may_be_taken_out(tmp_path) -> None:
    file, tasks = tmp_path / "scores.jsonl", tasks_of(2, 2)
    match_adapters(tasks[:1], {"a": "v1"}, Given(a=0.5), table=ScoreTable(file))
    grown = match_adapters(tasks, {"a": "v1", "b": "v1"}, Given(a=0.5, b=0.75), table=ScoreTable(file))
    assert names(grown) == {"t00": ["b", "a"], "t01": ["b", "a"]}
    assert len(ScoreTable(file).made_of.tasks) == 2
    pushed = {"a": "v2", "b": "v1"}
    with pytest.raises(CatalogError, match="adapter 'a' was v1 and is v2"):
        match_adapters(tasks, pushed, Given(a=0.9, b=0), table=ScoreTable(file))
    file.write_text("".join(line for line in file.read_text().splitlines(True) if '"adapter": "a"' not in line))
    again = match_adapters(tasks, pushed, Given(a=0.9, b=0), table=ScoreTable(file))
    assert [match.score for match in again.result()["t00"]] == [0.9, 0.75]
    assert match_adapters(tasks, pushed, Given(), table=ScoreTable(file)).result() == again.result()


def test_scores_of_replaced_examples_are_refused_by_matching_itself(tmp_path) -> None:
    file, [task] = tmp_path / "scores.jsonl", tasks_of(1, 2)
    match_adapters([task], ["a", "b"], Given(a=0.9, b=0.9), table=ScoreTable(file))
    replaced = replace(task, validation=(Example("quite", "x"), Example("other", "x")))
    with pytest.raises(CatalogError, match="t00"):
        match_adapters([replaced], ["a", "b"], Given(a=0.1, b=0.1), table=ScoreTable(file))


def test_a_models_digest_is_of_its_content(tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    assert model_digest(str(one)) == model_digest(str(two))
    (two / "model.safetensors").write_bytes(b"\x00" * 99 + b"\x01")
    assert model_digest(str(one)) != model_digest(str(two))


def test_a_tables_scores_by_task_are_those_of_adapters_that_work() -> None:
    table = ScoreTable()
    table.add({Evaluation("a", "t", 0): 0.25, Evaluation("a", "u", 3): 1.0, Evaluation("b", "t", 0): 0.5})
    table.add({Evaluation("b", "u", 0): Failed("broke late")})
    assert table.by_task() == {"t": {"a": {0: 0.25}}, "u": {"a": {3: 1.0}}}
    assert table.by_task(lambda score: 2 * score)["t"] == {"a": {0: 0.5}}


def test_a_torn_last_line_is_dropped_when_the_table_goes_on(tmp_path) -> None:
    file = tmp_path / "scores.jsonl"
    ScoreTable(file).add({Evaluation("a", "t", 0): 0.5, Evaluation("a", "t", 1): 0.5})
    torn = file.read_bytes()[:-4]
    file.write_bytes(torn)
    table = ScoreTable(file)
    assert table.scores == {("a", "t"): {0: 0.5}}
    assert file.read_bytes() == torn  # reading changes nothing
    table.add({Evaluation("a", "t", 2): 1.0})
    assert ScoreTable(file).scores == {("a", "t"): {0: 0.5, 2: 1.0}}


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"adapter": "a"}', '{"adapter": "a", "task": "t", "example": 0, "score": NaN}']
)
def test_a_file_of_something_else_is_refused(tmp_path, line) -> None:
    file = tmp_path / "scores.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(CatalogError, match=r"scores\.jsonl"):
        ScoreTable(file)


def test_scoring_elsewhere_takes_two_files(tmp_path) -> None:
    tasks, requests, scores = tasks_of(3), tmp_path / "requests.jsonl", tmp_path / "scores.jsonl"
    matrix = Matrix(0, tasks)
    expected = match_adapters(tasks, ADAPTERS, matrix).result()
    matching = Matching({task.name: len(task.validation) for task in tasks}, ADAPTERS)
    while wanted := matching.next_round():
        write_evaluations(requests, wanted)
        with pytest.raises(KeyboardInterrupt):
            score_file(requests, scores, Dying(matrix, 0))
        score_file(requests, scores, matrix)
        asked = len(matrix.asked)
        matching = Matching({task.name: len(task.validation) for task in tasks}, ADAPTERS, table=ScoreTable(scores))
        score_file(requests, scores, matrix)
        assert len(matrix.asked) == asked
    assert matching.result() == expected


def test_scores_from_elsewhere_are_of_what_the_evaluations_said(tmp_path) -> None:
    tasks, requests, scores = tasks_of(2, 3), tmp_path / "requests.jsonl", tmp_path / "scores.jsonl"
    made_of = Provenance("m", "metric", task_digests(tasks), {"a": "v1"})
    write_evaluations(requests, Matching({"t00": 3, "t01": 3}, ["a"]).next_round(), made_of)
    assert score_file(requests, scores, Given(a=0.5)).made_of == ScoreTable(scores).made_of == made_of
    assert names(match_adapters(tasks, {"a": "v1"}, Given(), table=ScoreTable(scores))) == {"t00": ["a"], "t01": ["a"]}
    write_evaluations(requests, [Evaluation("a", "t00", 0)], replace(made_of, model="another"))
    with pytest.raises(CatalogError, match="base model"):
        score_file(requests, scores, Given(a=0.5))


def test_a_file_of_evaluations_that_was_cut_off_is_refused(tmp_path) -> None:
    requests = tmp_path / "requests.jsonl"
    write_evaluations(requests, [Evaluation("a", "t", 0), Evaluation("a", "t", 1)])
    requests.write_bytes(requests.read_bytes()[:-3])
    with pytest.raises(CatalogError, match="middle of a line"):
        score_file(requests, tmp_path / "scores.jsonl", Given(a=1.0))
