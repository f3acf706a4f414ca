"""The ways a user starts the service, each from nothing to an answer and back to nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

pytestmark = pytest.mark.integration

BIN = Path(sys.executable).parent


@pytest.fixture
def own_port(root: Path, tmp_path: Path, free_port: int) -> tuple[Path, str]:
    """The shipped configuration with a port of its own, and the URL it serves."""
    data = yaml.safe_load((root / "serve_config.yaml").read_text())
    data["http_options"]["port"] = free_port
    data["applications"][0]["args"]["adapters"] = "examples/adapters"  # relative to where the command runs
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path, f"http://127.0.0.1:{free_port}"


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Iterator[Any]:
    """`start(command)`: run it from the repository, its output in a file; ended with all its children afterwards."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / "log"
        with log.open("wb") as out:
            env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=root, env=env, start_new_session=True)
        started.append(process)
        return process, log

    yield run
    for process in started:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            for child in [*children, psutil.Process(process.pid)]:
                child.kill()
            process.wait()


def wait_for_answer(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if httpx.get(f"{url}/healthz", timeout=5).json() == {"status": "ok"}:
                return
        except (httpx.HTTPError, ValueError):
            pass
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def test_lorauter_serve_and_chat(start: Any, own_port: tuple[Path, str]) -> None:
    config, url = own_port
    process, log = start(str(BIN / "lorauter"), "serve", "--config", str(config))
    wait_for_answer(url, process, log)
    family = psutil.Process(process.pid).children(recursive=True)
    question = (
        "Title: Anax imperator\nText: The emperor dragonfly is a large species.\nWhat kind of thing is described here?"
    )
    chat = subprocess.run(
        [BIN / "lorauter", "chat", "--url", url, question], capture_output=True, text=True, timeout=120
    )
    assert chat.stdout.strip() == "Animal"
    assert "tasks: dbpedia=" in chat.stderr
    assert "adapters: dbpedia=" in chat.stderr
    again = subprocess.run(
        [BIN / "lorauter", "serve", "--config", str(config)], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 1
    assert "--port" in again.stderr
    assert "Traceback" not in again.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, log.read_text()
    assert f"serving on {url}" in log.read_text()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_serve_run(start: Any, own_port: tuple[Path, str]) -> None:
    config, url = own_port
    process, log = start(str(BIN / "serve"), "run", str(config))
    wait_for_answer(url, process, log)
    answer = httpx.post(f"{url}/v1/route", json={"input": "Translate to English: Ein Hund schläft."}, timeout=60).json()
    assert answer["data"][0]["adapters"][0]["name"] == "multi30k_deen"
