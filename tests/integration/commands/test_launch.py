"""The ways a user starts the service, each from nothing to an answer and back to nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray import serve

from deployments.config import AccessSettings
from deployments.embedder import QueryEmbedder
from deployments.model import LoraModel
from deployments.retriever import TaskRetriever
from deployments.router import Router
from lorauter.defaults import BASE_MODEL, resolve_model

pytestmark = pytest.mark.integration

_SAID = r".* \.\.\.$|serving on http.*; stop with Ctrl-C\. Try:$|  .*lorauter chat --url"
"""Phases, and how to ask."""
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
    said = log.read_text()
    assert f"serving on {url}" in said
    noise = [line for line in said.splitlines() if not re.match(_SAID, line)]
    assert noise == []  # warnings and bars of Ray and of model libraries are in the log
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_what_only_a_replica_finds_out_reaches_the_console_in_one_line(
    start: Any, own_port: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(resolve_model("default"), tmp_path / "cut")  # which all checks beforehand take for sound
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    config, _ = own_port
    data = yaml.safe_load(config.read_text())
    names = {"base_model": str(tmp_path / "cut"), "base_model_aliases": [BASE_MODEL]}
    data["applications"][0]["args"] |= names
    config.write_text(yaml.safe_dump(data))
    process, log = start(str(BIN / "lorauter"), "serve", "--config", str(config))
    deadline = time.monotonic() + 240
    family: list[psutil.Process] = []
    while process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True) or family
        time.sleep(0.2)
    assert process.returncode == 1
    *before, last = log.read_text().splitlines()
    assert last.startswith("error: LoraModel cannot start: the base model's weights are damaged: ")
    assert [line for line in before if not re.match(_SAID, line)] == []
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_serves_status_ends_with_the_cause(service: Any, tmp_path: Path) -> None:
    """As `serve status` and a RayService show it, for each part that can fail, all on one cluster."""
    (tmp_path / "keys.yaml").write_text("- {name: a, sha256: no-hash}")
    tiny = tmp_path / "gpt2"
    tiny.mkdir()
    (tiny / "config.json").write_text('{"model_type": "gpt2"}')
    few = {"ray_actor_options": {"num_cpus": 0}}
    embedder = serve.get_deployment_handle("QueryEmbedder", "lorauter")
    retriever, model = TaskRetriever.options(**few), LoraModel.options(**few)
    anew = {"num_cpus": 0, "runtime_env": {"env_vars": {"LORAUTER_HOME": str(tmp_path / "home")}}}
    first = TaskRetriever.options(ray_actor_options=anew)  # of a machine on which nothing was served before
    uri = service.config.catalog.removesuffix("/catalog")

    def changed(**values: Any) -> Any:
        return service.config.model_copy(update=values)

    keys = changed(access=AccessSettings(keys_file=str(tmp_path / "keys.yaml")))
    parts = {
        "no-catalog": (retriever.bind(changed(catalog=f"{uri}/none"), embedder), "lorauter catalog build"),
        "no-bucket": (retriever.bind(changed(catalog="s3://none/x"), embedder), "there is no bucket 'none'"),
        "no-adapters": (first.bind(changed(adapters=f"{uri}/none"), embedder), "which holds no adapter"),
        "another-base": (retriever.bind(changed(base_model="org/x"), embedder), "base_model_aliases"),
        "no-encoder": (QueryEmbedder.options(**few).bind(str(tmp_path / "none")), "neither a folder nor a Hugging"),
        "no-model": (model.bind(changed(base_model=str(tiny))), "base model"),
        "keys": (Router.options(**few).bind(keys, None, None, model, None), "0.sha256"),
    }
    targets = [serve.RunTarget(app, name, f"/{name}") for name, (app, _) in parts.items()]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    try:
        causes: dict[str, str] = {}
        deadline = time.monotonic() + 240
        while len(causes) < len(parts):
            assert time.monotonic() < deadline, causes
            for name in parts.keys() - causes.keys():
                for deployment in serve.status().applications[name].deployments.values():
                    last = deployment.message.strip().splitlines()[-1:]
                    if last and " cannot start: " in last[0]:
                        causes[name] = last[0]
            time.sleep(0.5)
        for name, (_, said) in parts.items():
            assert said in causes[name]
    finally:
        for name in parts:
            serve.delete(name, _blocking=False)


def test_serve_run(start: Any, own_port: tuple[Path, str]) -> None:
    config, url = own_port
    process, log = start(str(BIN / "serve"), "run", str(config))
    wait_for_answer(url, process, log)
    answer = httpx.post(f"{url}/v1/route", json={"input": "Translate to English: Ein Hund schläft."}, timeout=60).json()
    assert answer["data"][0]["adapters"][0]["name"] == "multi30k_deen"
