import json
import subprocess
import sys

import pytest

from lorauter.errors import ConfigError, InvalidRequest
from lorauter.evaluation.report import evaluate, to_markdown, write_report
from lorauter.evaluation.rows import AnswerRow, ScoredRow

# method, regime, task, whether each of its queries is answered rightly
OUTCOMES = [
    ("base", "in-domain", "mnli", [1, 0, 0, 0]),
    ("base", "in-domain", "qqp", [0, 0]),
    ("base", "in-domain", "sst", [1]),
    ("oracle", "in-domain", "mnli", [1, 1, 1, 0]),
    ("oracle", "in-domain", "qqp", [1, 0]),
    ("oracle", "in-domain", "sst", [1]),
    ("a|b", "OOD", "mnli", [1, 1, 0, 0]),
    ("a|b", "OOD", "sst", [0]),
]
DOMAINS = {"mnli": "pairs", "qqp": "pairs", "sst": "mood"}


def outcome_rows():
    for method, regime, task, outcomes in OUTCOMES:
        for i, right in enumerate(outcomes):
            row = ScoredRow(f"{method} {regime} {task} {i}", method, regime, task, DOMAINS[task], "em", "yes")
            yield row, AnswerRow(row.id, "Yes." if right else "no", "stop", 1)


@pytest.fixture
def rows():
    return [row for row, _ in outcome_rows()]


@pytest.fixture
def answers():
    return {answer.id: answer for _, answer in outcome_rows()}


def test_a_score_is_the_mean_of_the_tasks_means_and_a_share_of_the_oracles(rows, answers) -> None:
    base, oracle, mixed = evaluate(rows, answers)
    assert [(r.method, r.regime, r.queries) for r in (base, oracle, mixed)] == [
        ("base", "in-domain", 7),
        ("oracle", "in-domain", 7),
        ("a|b", "OOD", 5),
    ]
    assert oracle.tasks == {"mnli": 0.75, "qqp": 0.5, "sst": 1}
    assert oracle.domains == {"mood": 1, "pairs": 0.625}
    assert oracle.score == pytest.approx(2.25 / 3) and oracle.of_oracle == 1
    assert base.score == pytest.approx(1.25 / 3) and base.of_oracle == pytest.approx(1.25 / 2.25)
    assert mixed.score == 0.25 and mixed.of_oracle == pytest.approx(0.5 / 1.75), "of the oracle on the same tasks"
    assert base.interval[0] < base.score < base.interval[1]


def test_without_an_oracle_there_is_no_share(rows, answers) -> None:
    results = evaluate([row for row in rows if row.method != "oracle"], answers)
    assert [result.of_oracle for result in results] == [None, None]
    wrong = {row.id: AnswerRow(row.id, "no", "stop", 1) for row in rows}
    assert {result.of_oracle for result in evaluate(rows, wrong)} == {None}


def test_missing_answers_are_counted_and_the_remedy_is_named(rows, answers) -> None:
    for row_id in list(answers)[3:5]:
        del answers[row_id]
    with pytest.raises(ConfigError, match=r"2 of 19 rows .* 'base in-domain mnli 3'; run the answering step again"):
        evaluate(rows, answers)


def test_two_rows_of_one_id_are_refused(rows, answers) -> None:
    with pytest.raises(InvalidRequest, match="two rows have the id"):
        evaluate([*rows, rows[0]], answers)


def test_an_error_scores_as_an_empty_answer_and_is_counted(rows, answers) -> None:
    answers["oracle in-domain sst 0"] = AnswerRow("oracle in-domain sst 0", "", None, 0, error="too long")
    results = evaluate(rows, answers)
    assert [result.errors for result in results] == [0, 1, 0]
    assert results[1].tasks["sst"] == 0
    assert "1 of 19 queries got no answer" in to_markdown(results)


def test_rouge_may_stand_in_for_bleu() -> None:
    row = ScoredRow("1", "m", "OOD", "deen", "translation", "bleu", "two dogs play in snow")
    answers = {"1": AnswerRow("1", "two dogs in snow", "stop", 4)}
    (bleu,), (rouge,) = evaluate([row], answers), evaluate([row], answers, rouge_for_bleu=True)
    assert rouge.score == pytest.approx(8 / 9)
    assert bleu.score < 0.5


def test_markdown_has_methods_as_rows_and_regimes_as_columns(rows, answers) -> None:
    results = evaluate(rows, answers)
    lines = to_markdown(results).splitlines()
    low, high = results[0].interval
    assert lines[2:4] == ["| method | in-domain | OOD |", "| --- | --- | --- |"]
    assert lines[4] == f"| base | 0.417 [{low:.3f}, {high:.3f}], 55.6 % | – |"
    assert lines[6].startswith(r"| a\|b | – | 0.250 [") and lines[6].endswith(", 28.6 % |")
    assert lines[lines.index("By domain, in-domain:") + 2 :][:4] == [
        "| method | mood | pairs |",
        "| --- | --- | --- |",
        "| base | 1.000 | 0.125 |",
        "| oracle | 1.000 | 0.625 |",
    ]


def test_the_files_hold_everything(rows, answers, tmp_path) -> None:
    results = evaluate(rows, answers)
    write_report(results, tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "report.json").read_text())["results"]
    assert stored == [vars(result) | {"interval": list(result.interval)} for result in results]
    assert (tmp_path / "new" / "report.md").read_text(encoding="utf-8") == to_markdown(results)


def test_reports_need_no_model_and_no_index() -> None:
    code = "import sys, lorauter.evaluation.report, lorauter.evaluation.plots; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "transformers", "faiss", "ray", "pydantic"} & set(loaded.stdout.split())
