"""What is shown of a step that takes long: on a terminal, and where there is none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorauter_cli import console as shown
from lorauter_cli.console import counting


def test_where_there_is_no_terminal_a_step_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times, 12.0))
    with counting("answering", "rows are answered") as progress:
        for done in (10, 20, 1030):
            progress(done, 1030)
    said = capsys.readouterr().err.splitlines()
    assert said == ["answering ...", "20 of 1,030 rows are answered ...", "1,030 of 1,030 rows are answered"]


def test_a_step_of_which_nothing_is_counted_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("answering", "rows are answered"):
        pass
    assert capsys.readouterr().err == "answering ...\n"


def test_on_a_terminal_a_step_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(shown, "console", Console(file=screen, force_terminal=True, width=120, highlight=False))
    with counting("deciding", "decisions are made") as progress:
        progress(3, None)
        progress(30, 40)
    assert "deciding" in screen.getvalue()
    assert "━" in screen.getvalue()
    assert "30 of 40 decisions are made" in screen.getvalue()
