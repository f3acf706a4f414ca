"""benchmarks/table.py from end to end, on the smallest model, pool and tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import table
import torch
from fake_states import HashingStates
from tiny_model import write_model

from lorauter.encoder import HashingEncoder
from lorauter.tasks import Example, Task


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    yield
    torch.set_num_threads(threads)


def test_what_is_composed_is_told_first_and_nothing_is_made_again(
    tmp_path: Path,
    make_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(write_model(tmp_path / "tiny-base"))
    for place in ("table", "lorauter.catalog.provenance", "lorauter.compositions.pool"):
        monkeypatch.setattr(f"{place}.resolve_model", lambda *_: model)
    monkeypatch.setattr(table, "load_encoder", lambda _: HashingEncoder())
    monkeypatch.setattr(table, "load_states", lambda _: HashingStates())
    (tmp_path / "tasks").mkdir()
    for name in ("sums", "poems"):
        make_adapter(tmp_path / "pool", name)
        examples = tuple(Example(f"{name} {i}", "yes") for i in range(4))
        task = Task(name, "tests", "em", examples[:3], examples[3:])
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(task.to_json()))
    given = ["--tasks", tmp_path / "tasks", "--adapters", tmp_path / "pool", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, given), "--steps", "2", "--shown", "1"])

    def told() -> list[str]:
        table.main()
        lines = capsys.readouterr().out.splitlines()
        starts = "oracle ", "default+composed"
        return [" ".join(line.split()[:2]) for line in lines if line.startswith(starts)]

    expected = ["oracle in-domain"]
    expected += [f"{method} {regime}" for method in ("default+composed", "default+composed+examples")
                 for regime in ("semi-OOD", "in-domain")]  # fmt: skip
    assert told() == expected
    report = (tmp_path / "out" / "report.json").read_text()
    assert len(json.loads(report)) == 5
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert told() == expected
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers
    assert (tmp_path / "out" / "report.json").read_text() == report
