"""benchmarks/soak_report.py: how the soak judges answers, and what it makes of them. The soak itself is run by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SINGLE: dict[str, Any] = {"model": "a"}
STREAM: dict[str, Any] = {"model": "a", "stream": True}


@pytest.fixture(scope="module")
def report() -> Any:
    """The module, loaded."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "soak_report.py"), run_name="soak_report"))


@pytest.fixture
def judge(report: Any) -> Any:
    """Answers have 3 words; `a` says "one" until 20 and "two" from 10 on, `b` says "other"."""
    judge = report.Judge(3)
    judge.says("a", "one", 0.0)
    judge.says("b", "other", 0.0)
    judge.says("a", "two", 10.0)
    judge.replaced("a", "two", 20.0)
    return judge


def whole(text: str, *, id: str = "1", adapters: tuple[tuple[str, float], ...] = ()) -> str:
    decision = {"adapters": [{"name": name, "weight": weight} for name, weight in adapters]}
    return json.dumps({"id": id, "choices": [{"message": {"content": text}}], "lorauter": decision})


def stream(*texts: str, ends: int = 1, done: int = 1, error: bool = False) -> str:
    events = [
        {"id": "1", "choices": [{"delta": {"content": text}, "finish_reason": None}], "lorauter": {"adapters": []}}
        for text in texts
    ]
    events += [{"id": "1", "choices": [{"delta": {}, "finish_reason": "length"}]}] * ends
    events += [{"error": {"code": "service_unavailable"}}] * error
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n" * done


@pytest.mark.parametrize(
    ("text", "begun", "ended", "kind"),
    [
        (" one one one", 1, 2, "right"),
        (" one one one", 19, 25, "right"),  # began before the old version's end
        (" one one one", 21, 22, "wrong"),  # stale
        (" two two two", 9, 11, "right"),  # published meanwhile
        (" two two two", 8, 9, "wrong"),  # not yet there
        (" other other other", 1, 2, "wrong"),
        (" one one two", 12, 13, "wrong"),  # two versions in one answer
        (" one one", 1, 2, "wrong"),
        (" one one one one", 1, 2, "duplicated"),
        ("", 1, 2, "wrong"),
    ],
)
def test_a_whole_answer(judge: Any, text: str, begun: float, ended: float, kind: str) -> None:
    assert judge.judge(SINGLE, "a", 200, whole(text), begun, ended)[0] == kind


def test_a_wrong_answer_names_whose_it_is(judge: Any) -> None:
    assert "say so: b" in judge.judge(SINGLE, "a", 200, whole(" other other other"), 1, 2)[1]


def test_the_same_answer_twice(judge: Any) -> None:
    assert judge.judge(SINGLE, "a", 200, whole(" one one one", id="x"), 1, 2)[0] == "right"
    assert judge.judge(SINGLE, "a", 200, whole(" one one one", id="x"), 3, 4)[0] == "duplicated"


def test_errors_are_told_by_status_or_in_the_stream(judge: Any) -> None:
    body = json.dumps({"error": {"code": "adapter_unavailable"}})
    assert judge.judge(SINGLE, "a", 503, body, 1, 2) == ("told", "503 adapter_unavailable")
    assert judge.judge(SINGLE, "a", 500, "Internal Server Error", 1, 2) == ("told", "500 without an error object")
    cut = stream(" one", ends=0, done=0, error=True)
    assert judge.judge(STREAM, "a", 200, cut, 1, 2) == ("told", "in the stream: service_unavailable")


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (stream(" one", " one", " one"), "right"),
        (stream(" one", " one", done=0), "lost"),
        (stream(" one", " one", " one", done=2), "duplicated"),
        (stream(" one", " one", " one", ends=2), "duplicated"),
        (stream(" one", " one", " one", " one"), "duplicated"),
    ],
)
def test_a_stream(judge: Any, raw: str, kind: str) -> None:
    assert judge.judge(STREAM, "a", 200, raw, 1, 2)[0] == kind


def test_a_routed_answer_is_the_heaviest_adapters(judge: Any) -> None:
    clear = whole(" other other other", adapters=(("a", 0.2), ("b", 0.8)))
    assert judge.judge({"model": "lorauter"}, None, 200, clear, 1, 2)[0] == "right"
    even = whole(" maybe maybe maybe", id="2", adapters=(("a", 0.5), ("b", 0.5)))
    assert judge.judge({"model": "lorauter"}, None, 200, even, 1, 2)[0] == "unjudged"


def test_summary_and_page(report: Any) -> None:
    outcomes = [report.Outcome(float(i), 0.5 + i / 100, "right", "") for i in range(98)]
    outcomes += [report.Outcome(98.0, 1.0, "told", "503 x"), report.Outcome(99.0, 1.0, "lost", "ReadError")]
    memory = [
        report.MemorySample(5.0 * i, {("grows", 1): (100 + i) << 20, ("stays", 2): 50 << 20, ("young", i): 1})
        for i in range(20)
    ]
    result = report.summary(outcomes, [(15.0, "kill_replica")], memory, seconds=100, not_sent=2)
    assert result["outcomes"] == {"right": 98, "told": 1, "lost": 1, "duplicated": 0, "wrong": 0, "unjudged": 0}
    assert sum(row["right"] for row in result["windows"]) == 98
    assert result["windows"][1]["faults"] == {"kill_replica": 1}
    assert result["p50"] == pytest.approx(0.985)
    assert [(row["role"], row["growth_per_hour"]) for row in result["memory"]] == [("grows", 720.0), ("stays", 0.0)]
    json.dumps(result)
    page = report.markdown(result, "python soak.py", "2 cores")
    assert "Lost, duplicated or wrong: **1**" in page
    assert "at 99 s, lost: ReadError" in page
    assert "an hour: grows (+720.0)." in page
