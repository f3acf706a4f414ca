import json

import pytest

from lorauter.errors import InvalidRequest
from lorauter.evaluation.rows import (
    MIXINGS,
    AnswerRow,
    DecisionRow,
    Question,
    ScoredRow,
    check_unique,
    read_answers,
    read_decisions,
    read_scored,
)
from lorauter.turns import ExampleTurns

DECISION = {"id": "1", "input": "hello", "adapters": {"a": 0.25, "b": 0.75, "c": 0}, "max_tokens": 5}
SCORED = {"method": "m", "regime": "OOD", "task": "t", "domain": "d", "metric": "em", "target": "x"}


def test_one_file_serves_the_answering_and_the_scoring(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps(DECISION | SCORED)
        + "\n\n"
        + json.dumps(DECISION | SCORED | {"id": "2", "mixing": "spectr"})
        + "\n"
        + json.dumps(DECISION | SCORED | {"id": "3", "examples": [{"place": 4, "input": "q", "target": "a"}]})
    )
    mixture = (("b", 0.75), ("a", 0.25))
    assert read_decisions(path) == [
        DecisionRow("1", Question("hello", mixture, 5)),
        DecisionRow("2", Question("hello", mixture, 5, "spectr")),
        DecisionRow("3", Question("hello", mixture, 5, examples=(ExampleTurns(4, "q", "a"),))),
    ]
    assert read_scored(path) == [ScoredRow(id=row_id, **SCORED) for row_id in ("1", "2", "3")]


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("adapters", [{}, {"a": 0}])
def test_mixing_nothing_is_asking_the_base_model(mixing, adapters) -> None:
    row = DecisionRow.from_json(DECISION | {"adapters": adapters, "mixing": mixing}, source="here")
    assert row.question == Question("hello", (), 5)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"id": 3}, "id"),
        ({"input": None}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"adapters": ["a"]}, "adapters"),
        ({"adapters": {"a": float("nan")}}, "adapters"),
        ({"adapters": {"a": "1"}}, "adapters"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"mixing": "sideways"}, "mixing"),
        ({"mixing": True}, "mixing"),
        ({"mixing": ["arrow"]}, "mixing"),
        ({"mixing": None}, "mixing"),
        ({"examples": {}}, "examples"),
        ({"examples": [["q", "a"]]}, "examples"),
        ({"examples": [{"place": True, "input": "q", "target": "a"}]}, "examples"),
        ({"examples": [{"place": 0, "input": "q", "target": "a"}], "mixing": "arrow"}, "examples"),
        ({"regime": "ood"}, "regime"),
        ({"metric": "f1"}, "metric"),
        ({"target": 1}, "target"),
    ],
)
def test_a_malformed_row_is_refused_by_line_and_field(tmp_path, change, param) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(DECISION | SCORED | extra) + "\n" for extra in ({}, change)))
    with pytest.raises(InvalidRequest, match=rf"rows\.jsonl, line 2: .*{param}") as caught:
        (read_decisions(path), read_scored(path))
    assert caught.value.param == param


@pytest.mark.parametrize("line", ["[1]", "{", '"text"'])
def test_what_is_no_object_is_refused_by_its_line(tmp_path, line) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(DECISION)}\n{line}\n")
    with pytest.raises(InvalidRequest, match="line 2"):
        read_decisions(path)


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(InvalidRequest, match=r"no\.jsonl cannot be read"):
        read_decisions(tmp_path / "no.jsonl")


def test_answers_survive_a_file_and_a_torn_last_line_is_no_answer(tmp_path) -> None:
    rows = [AnswerRow("1", "zwei\u2028Hunde", "stop", 2), AnswerRow("2", "", None, 0, error="too long")]
    lines = [json.dumps(row.to_json(), ensure_ascii=False) for row in rows]
    assert "error" not in lines[0]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join([*lines, '{"id": "3", "answer": "x"}']), encoding="utf-8")
    assert read_answers(path) == {"1": rows[0], "2": rows[1]}


def test_ids_are_unique() -> None:
    check_unique(["1", "2"])
    with pytest.raises(InvalidRequest, match="two rows have the id '1'"):
        check_unique(["1", "2", "1"])
