"""What `lorauter batch` makes of its arguments; the job itself is tests/integration/commands/test_batch.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deployments.batch import job
from deployments.batch.config import BatchConfig
from lorauter_cli.main import app


class Called(Exception):
    """The job was called."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def run_job(*arguments: Any, **options: Any) -> None:
        calls.append((*arguments, options["address"]))
        raise Called

    monkeypatch.setattr(job, "run_job", run_job)
    return calls


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["batch", "--input", "in", "--output", "out", *arguments])


def test_arguments_go_before_the_file(called: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "batch.yaml"
    file.write_text("catalog: old\nshard_rows: 7\ncolumns: {messages: talk}\nanswer_workers: {workers: 2, cpus: 3}\n")
    changed = ("--catalog", "new", "--column", "text", "--workers", "4", "--gpus", "0.5", "--max-errors", "0")
    assert isinstance(run("--config", str(file), *changed, "--address", "ray-head:6379").exception, Called)
    [(source, target, settings, address)] = called
    assert (source, target, address) == ("in", "out", "ray-head:6379")
    assert (settings.catalog, settings.shard_rows, settings.max_errors) == ("new", 7, 0)
    assert (settings.columns.prompt, settings.columns.messages) == ("text", "talk")
    assert settings.answer_workers.model_dump() == {"workers": 4, "cpus": 3, "gpus": 0.5}


def test_without_any_the_defaults_stand(called: list[Any]) -> None:
    assert isinstance(run().exception, Called)
    assert called[0][2] == BatchConfig()
