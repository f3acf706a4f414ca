"""What goes wrong with any command is one clear line and an exit code; "default" is the same for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Cli

from lorauter.catalog import build_catalog
from lorauter.encoder import HashingEncoder
from lorauter.tasks import Example, Task

BIN = Path(sys.executable).parent / "lorauter"
ROUTE = "route --catalog {tmp}/catalog --input {tmp}/in.jsonl --output {tmp}/out.jsonl"
DECIDE = "eval decide --tasks {tmp}/tasks --catalog {tmp}/catalog --out {tmp}/out.jsonl"
BATCH = "batch --input {tmp}/in.jsonl --output {tmp}/out --catalog {tmp}/catalog --route-only"

# A command, and a part of its one line of error; {tmp} is the test's folder.
CAUSES = [
    ("adapters push {tmp}/nowhere --to {tmp}/out", "holds no adapter"),
    ("adapters push {tmp}/pool --to ftp://host", "unknown scheme"),
    ("adapters push {tmp}/pool --to {tmp}/text/below", "{tmp}/text"),
    ("adapters push {tmp}/pool --to default", "cannot be changed"),
    ("adapters list {tmp}/nowhere", "there is no adapter in"),
    ("adapters list {tmp}/text", "there is no adapter in"),
    ("adapters list s3://", "names no bucket"),
    ("adapters prune {tmp}/nowhere --catalog none", "there is no adapter in"),
    ("adapters prune default --catalog none", "cannot be changed"),
    ("catalog build --tasks {tmp}/nowhere --out {tmp}/out", "is not a directory"),
    ("catalog build --tasks {tmp}/text --out {tmp}/out", "is not a directory"),
    ("catalog build --tasks {tmp}/tasks --out default", "cannot be changed"),
    ("catalog build --tasks {tmp}/tasks --out {tmp}/text/below", "{tmp}/text"),
    ("catalog build --tasks {tmp}/tasks --out {tmp}/out --adapters {tmp}/nowhere", "there is no adapter in"),
    ("catalog build --tasks {tmp}/tasks --out {tmp}/out --mapping {tmp}/text", "cannot be read"),
    ("catalog change {tmp}/nowhere --remove-task sums", "lorauter catalog build"),
    ("catalog change default --remove-task sums", "cannot be changed"),
    ("catalog change {tmp}/catalog --add-tasks {tmp}/nowhere", "is not a directory"),
    ("catalog change {tmp}/catalog --refresh-adapters {tmp}/nowhere", "there is no adapter in"),
    ("catalog versions {tmp}/nowhere", "there is no catalog in"),
    ("catalog versions ftp://host", "unknown scheme"),
    ("catalog use {tmp}/catalog no-such-version", "no-such-version"),
    ("catalog use default no-such-version", "cannot be changed"),
    ("catalog prune {tmp}/nowhere", "there is no catalog in"),
    ("catalog prune default", "cannot be changed"),
    (ROUTE.replace("/catalog", "/nowhere"), "there is no catalog in"),
    (ROUTE.replace("/in.jsonl", "/text"), "line 1"),
    (ROUTE.replace("/in.jsonl", "/nowhere"), "nowhere"),
    (ROUTE.replace("/out.jsonl", "/text/below"), "cannot route"),
    (DECIDE.replace("/tasks", "/nowhere"), "is not a directory"),
    (DECIDE.replace("/catalog", "/nowhere"), "there is no catalog in"),
    (DECIDE.replace("/out.jsonl", "/text/below"), "cannot be written"),
    (DECIDE + " --config {tmp}/nowhere", "cannot be read"),
    (DECIDE + " --config {tmp}/text", "cannot be read"),
    (DECIDE + " --methods none", "none"),
    (DECIDE + " --lorahub {tmp}/text", "no LoraHub weights"),
    ("eval answer --decisions {tmp}/nowhere --adapters {tmp}/pool --out {tmp}/out", "nowhere"),
    ("eval answer --decisions {tmp}/text --adapters {tmp}/pool --out {tmp}/out", "text"),
    ("eval report --decisions {tmp}/nowhere --answers {tmp}/text --out {tmp}/out", "nowhere"),
    ("eval lorahub --tasks {tmp}/tasks --adapters {tmp}/nowhere --out {tmp}/out", "there is no adapter in"),
    ("eval routing --tasks {tmp}/nowhere", "is not a directory"),
    ("eval routing --tasks {tmp}/tasks --flan {tmp}/text", "text"),
    ("eval plots --catalog {tmp}/nowhere --out {tmp}/out", "there is no catalog in"),
    ("eval plots --catalog {tmp}/catalog --out {tmp}/text", "cannot be written"),
    (BATCH.replace("/in.jsonl", "/nowhere.jsonl"), "does not exist"),
    (BATCH.replace("/catalog", "/nowhere"), "catalog"),
    (BATCH + " --config {tmp}/nowhere", "cannot be read"),
    (BATCH + " --config {tmp}/text", "cannot be read"),
    (BATCH + " --format xml", "format"),
    (BATCH.replace("{tmp}/out", "{tmp}/text"), "{tmp}/text"),
    ("serve --config {tmp}/nowhere", "cannot be read"),
    ("serve --config {tmp}/text", "cannot be read"),
    ("serve --config {tmp}/serve.yaml", "lorauter catalog build"),
    ("chat hello --url http://127.0.0.1:9", "start one with 'lorauter serve'"),
    ("chat hello --url nowhere", "must begin with http"),
    ("keys new --name a/b", "name"),
]


@pytest.fixture
def place(tmp_path: Path, make_adapter: Callable[..., Path], make_task: Callable[..., Task]) -> Path:
    """A folder with sound things (pool, tasks, catalog, in.jsonl) and a file, text, that is nothing."""
    make_adapter(tmp_path / "pool", "sums")
    (tmp_path / "tasks").mkdir()
    tasks = [replace(make_task(name), test=(Example(f"a new {name}", "1"),)) for name in ("sums", "poems")]
    for task in tasks:
        (tmp_path / "tasks" / f"{task.name}.json").write_text(json.dumps(task.to_json()))
    build_catalog(tasks, HashingEncoder()).save(tmp_path / "catalog")
    (tmp_path / "in.jsonl").write_text('{"input": "sums", "prompt": "sums"}\n')
    (tmp_path / "text").write_text("- [")
    application = {"import_path": "deployments.app:build", "args": {"catalog": str(tmp_path / "nowhere")}}
    (tmp_path / "serve.yaml").write_text(json.dumps({"applications": [application], "http_options": {"port": 45871}}))
    return tmp_path


@pytest.mark.parametrize(("command", "said"), CAUSES, ids=[f"{command}: {said}" for command, said in CAUSES])
def test_what_goes_wrong_is_one_line(cli: Cli, place: Path, command: str, said: str) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    cli(*[part.format(tmp=place) for part in command.split(" ")]).refused(said.format(tmp=place))
    assert {path: path.read_bytes() for path in before} == before


def test_what_the_system_refuses_is_one_line(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    cli("catalog", "build", "--tasks", place / "tasks", "--out", place / "out").refused("Permission denied")
    cli("catalog", "versions", place / "catalog").refused("Permission denied")


def test_what_nobody_foresaw_is_one_line_too_and_its_traceback_is_in_the_log(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("lorauter.catalog.build.build_catalog", fail)
    ran = cli("catalog", "build", "--tasks", place / "tasks", "--out", place / "out")
    ran.refused("unforeseen ZeroDivisionError: a bug")
    log = Path(ran.err.split("traceback: ")[1].strip())
    assert "in fail" in log.read_text()


def test_default_is_the_same_in_every_command(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorauter.defaults._once", lambda folder, make, notify: place / "catalog")  # that of examples
    listed = cli("adapters", "list", "default")
    assert listed.code == 0
    assert "multi30k_deen" in listed.out
    assert (
        cli("route", "--catalog", "default", "--input", place / "in.jsonl", "--output", place / "out.jsonl").code == 0
    )
    assert json.loads((place / "out.jsonl").read_text())["tasks"][0]["name"] == "sums"
    assert "current" in cli("catalog", "versions", "default").out
    assert cli("eval", "plots", "--catalog", "default", "--out", place / "plots").code == 0
    built = cli("catalog", "build", "--tasks", "default", "--adapters", "default", "--out", place / "built")
    assert built.out.endswith("12 tasks, 12 adapters, 12 tasks with an adapter\n")
    changed = cli("catalog", "change", place / "built", "--add-tasks", "default", "--refresh-adapters", "default")
    assert changed.out == built.out
    decide = ("eval", "decide", "--catalog", "default", "--tasks", place / "tasks", "--split", "validation")
    decide += ("--out", place / "decisions")
    cli(*decide).refused("examples to ask")  # which are the catalog's
    batch = ("batch", "--input", place / "in.jsonl", "--output", place / "text", "--adapters", "default")
    cli(*batch, "--catalog", "default", "--route-only").refused(str(place / "text"))


def test_what_libraries_print_is_in_the_log_and_what_lorauter_warns_of_is_shown(tmp_path: Path) -> None:
    program = """
import logging, os, sys, warnings
import lorauter_cli.main, lorauter.adapters
def names(self):
    warnings.warn("of a library")
    logging.getLogger("library").warning("of its logger")
    logging.getLogger("lorauter.x").warning("of ours:\\nread this")
    print("a bar", file=sys.stderr)
    os.write(2, b"of C\\n")
    os.system("echo of a child >&2")
    return []
lorauter.adapters.AdapterRepository.names = names
sys.argv = ["lorauter", "adapters", "list", sys.argv[1]]
lorauter_cli.main.main()
"""
    environment = {**os.environ, "LORAUTER_HOME": str(tmp_path / "home")}
    ran = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout) == (0, "")
    assert ran.stderr == f"warning: of ours: read this\n0 adapters in {tmp_path}\n"
    log = (tmp_path / "home" / "logs" / "commands.log").read_text()
    for printed in ("of a library", "of its logger", "a bar", "of C", "of a child"):
        assert printed in log


def test_without_a_place_for_the_log_commands_work(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    environment = {**os.environ, "LORAUTER_HOME": str(tmp_path / "home")}
    ran = subprocess.run([BIN, "adapters", "list", tmp_path], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stderr) == (0, f"0 adapters in {tmp_path}\n")


def test_ctrl_c_is_a_line_and_an_exit_code(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorauter.adapters.AdapterRepository.names", interrupted)
    ran = cli("adapters", "list", tmp_path)
    assert (ran.code, ran.out, ran.err) == (130, "", "stopped by Ctrl-C\n")


def test_a_reader_that_goes_away_is_no_error_to_report(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.json").write_text("{}" * 100_000)
    ran = subprocess.run(
        f"{BIN} adapters list {tmp_path} | true", shell=True, capture_output=True, text=True, executable="/bin/bash"
    )
    assert "Traceback" not in ran.stderr
    assert "error" not in ran.stderr
