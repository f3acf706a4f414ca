"""The ways a user starts the service, each from nothing to an answer and back to nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from families import end, family
from local_s3 import free_port
from otlp import Collector, attributes
from wheels import Wheel

from lorauter.defaults import BASE_MODEL, resolve_model
from lorauter.keys import hash_key, new_key

pytestmark = pytest.mark.integration

_SAID = (
    r".* \.\.\.$|serving \S+ with the catalog default: 12 tasks, 12 adapters, version \w+$|  (page|OpenAI API)  +http|"
    r"serving on http.*; stop with Ctrl-C\. Try:$|  .*lorauter chat --url|(building|converting|copying) the "
)
"""Phases, what is made ready once, what is served where, and how to ask."""
BIN = Path(sys.executable).parent
CANARY = "xylophagous-canary"


def configured(root: Path, folder: Path, port: int, **args: Any) -> Path:
    """The shipped configuration with a port of its own."""
    data = yaml.safe_load((root / "serve_config.yaml").read_text())
    data["http_options"]["port"] = port
    data["applications"][0]["args"] |= {"adapters": "examples/adapters", **args}  # relative to where the command runs
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@contextmanager
def started(cwd: Path, folder: Path, environment: Mapping[str, str] = os.environ) -> Iterator[Any]:
    """`start(command)`: run it, its output in a file in a folder; ended with all its children afterwards."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = folder / "log"
        with log.open("wb") as out:
            env = {**environment, "RAY_USAGE_STATS_ENABLED": "0"}
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=cwd, env=env, start_new_session=True)
        processes.append(process)
        return process, log

    try:
        yield run
    finally:
        for process in processes:
            end(process)


@pytest.fixture
def own_port(root: Path, tmp_path: Path) -> tuple[Path, str]:
    """A configuration, and the URL that it serves; with few rows, which are warmed in less time."""
    port = free_port()
    return configured(root, tmp_path, port, engine={"max_batch": 2, "threads": 1}), f"http://127.0.0.1:{port}"


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Iterator[Any]:
    with started(root, tmp_path) as start:
        yield start


def wait_for_answer(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 480) -> None:
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


@dataclass(frozen=True)
class Served:
    """What `lorauter serve` serves, with keys and traces."""

    url: str
    config: Path
    keys: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path
    collector: Collector

    def headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[key]}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, wheel: Wheel) -> Iterator[Served]:
    """From the wheel, and far from any checkout."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    keys = {"any": new_key(), "few": new_key()}
    rows = [{"name": name, "sha256": hash_key(key)} for name, key in keys.items()]
    rows[1]["requests_per_minute"] = 2
    collector = Collector()
    environment = wheel.environment | {
        "SOME_KEYS": yaml.safe_dump(rows),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with started(folder, folder, environment) as start:
        configured(wheel.shipped, folder, port, adapters="default", access={"keys_env": "SOME_KEYS"})
        command, url = (str(wheel.bin / "lorauter"), "serve"), f"http://127.0.0.1:{port}"
        process, log = start(*command)
        try:
            wait_for_answer(url, process, log, 240)
        except AssertionError:
            if not log.read_text().endswith("starting Ray ...\n"):
                raise
            end(process)  # on a busy machine a Ray may never come up: none of its processes hears of another
            process, log = start(*command)
            wait_for_answer(url, process, log)
        yield Served(url, folder / "serve_config.yaml", keys, process, log, collector)
        collector.close()


def test_the_wheel_puts_nothing_but_its_own_names_at_the_top(wheel: Wheel, tmp_path: Path) -> None:
    code = "import importlib.util as u, lorauter; print(lorauter.__file__, u.find_spec('deployments'))"
    command = [wheel.bin / "python", "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=wheel.environment, capture_output=True, text=True, check=True)
    assert ran.stdout == f"{wheel.shipped.parent / '__init__.py'} None\n"
    site = wheel.shipped.parents[1]
    own = {path.name for path in site.iterdir()} - {"dependencies.pth"}
    assert {name for name in own if not name.endswith(".dist-info")} == {"lorauter", "lorauter_cli"}
    assert {path.name for path in wheel.shipped.iterdir()} == {"deployments", "examples", "serve_config.yaml"}


def test_the_wheel_answers_the_readmes_question_and_shows_the_page(served: Served, root: Path) -> None:
    [asked] = re.findall(r'"content": "(Translate to English: [^"]+)"', (root / "README.md").read_text())
    with httpx.Client(base_url=served.url, headers=served.headers("any"), timeout=120) as http:
        body = {"model": "lorauter", "messages": [{"role": "user", "content": asked}]}
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == "Two dogs play in the snow."
        assert answer["lorauter"]["adapters"][0]["name"] == "multi30k_deen"
        page = http.get("/")
        assert "<title>lorauter</title>" in page.text
        parts = re.findall(r'(?:src|href)="([^"#:]+)"', page.text)
        assert any(part.endswith(".js") for part in parts)
        assert {http.get(part).status_code for part in parts} == {200}


def test_lorauter_chat(served: Served) -> None:
    question = (
        "Title: Anax imperator\nText: The emperor dragonfly is a large species.\nWhat kind of thing is described here?"
    )
    command = [BIN / "lorauter", "chat", "--url", served.url, "--key", served.keys["any"], question]
    chat = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert chat.stdout.strip() == "Animal"
    assert "tasks: dbpedia=" in chat.stderr
    assert "adapters: dbpedia=" in chat.stderr


def test_a_second_one_on_its_port_says_so(served: Served) -> None:
    command = [BIN / "lorauter", "serve", "--config", served.config]
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert "--port" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_requests_spans_reach_the_collector_as_one_trace(served: Served) -> None:
    body = {"model": "lorauter", "messages": [{"role": "user", "content": f"{CANARY}: good?"}], "max_tokens": 4}
    key = served.headers("few")
    with httpx.Client(base_url=served.url, timeout=120) as http:
        answer = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "traced-1", **key})
        assert answer.status_code == 200, answer.text
        assert http.post("/v1/chat/completions", json=body).status_code == 401
        limited = [http.get("/v1/models/base", headers=key).status_code for _ in range(3)]  # traces of their own
    assert limited == [200, 429, 429]
    collector = served.collector
    calls = ("QueryEmbedder.embed", "TaskRetriever.decide", "LoraModel.generate")
    names = {f"lorauter.{name}" for name in ("request", "route", "embed", "retrieve", "compose", "generate", *calls)}

    def ours() -> list[Any]:
        spans = [span for span in list(collector.spans) if span.name.startswith("lorauter.")]
        return [span for span in spans if attributes(span).get("request_id") == "traced-1"]

    def answered() -> list[Any]:
        traces = {span.trace_id for span in ours()}
        return [span for span in list(collector.spans) if span.name == "chat lorauter" and span.trace_id in traces]

    deadline = time.monotonic() + 60
    while not (names <= {span.name for span in ours()} and answered()):
        assert time.monotonic() < deadline, {span.name for span in collector.spans}
        time.sleep(0.5)
    [said] = map(attributes, answered())
    assert said["gen_ai.operation.name"] == "chat" and said["gen_ai.usage.output_tokens"] > 0
    unsure = {"lorauter.read", "lorauter.QueryEmbedder.states"}  # where words are
    assert {span.name for span in ours()} - unsure == names
    assert len({span.trace_id for span in ours()}) == 1
    for span in ours():
        above = collector.above(span)
        if span.name in ("lorauter.embed", "lorauter.retrieve", "lorauter.compose"):
            deployment = "QueryEmbedder" if span.name == "lorauter.embed" else "TaskRetriever"
            assert deployment in above[0]
            assert "lorauter.route" in above
        if span.name == "lorauter.generate":
            assert attributes(span)["completion_tokens"] > 0
            assert "LoraModel" in above[0]
        assert [span.name, *above][-1] == "lorauter.request"  # the ingress is the trace's root
    assert '"stringValue": "lorauter"' in collector.text  # the service's name
    assert CANARY not in collector.text


def test_ctrl_c_ends_it_and_nothing_was_said_that_nobody_can_act_on(served: Served) -> None:
    """The last that it is asked."""
    begun = family(served.process)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0, served.log.read_text()
    said = served.log.read_text()
    assert f"serving on {served.url}" in said
    noise = [line for line in said.splitlines() if not re.match(_SAID, line)]
    assert noise == []  # warnings and bars of Ray and of model libraries are in the log
    _, alive = psutil.wait_procs(begun, timeout=20)
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
    begun: list[psutil.Process] = []
    while process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()
        begun = family(process) or begun
        time.sleep(0.2)
    assert process.returncode == 1
    *before, last = log.read_text().splitlines()
    assert last.startswith("error: LoraModel cannot start: the base model's weights are damaged: ")
    assert [line for line in before if not re.match(_SAID, line)] == []
    _, alive = psutil.wait_procs(begun, timeout=20)
    assert not alive


def test_serve_run(start: Any, own_port: tuple[Path, str]) -> None:
    """Ray's command gives its node 30 s to start, which on a busy machine may be too few: it is asked again then."""
    config, url = own_port
    for tries_left in (1, 0):
        process, log = start(str(BIN / "serve"), "run", str(config))
        try:
            wait_for_answer(url, process, log)
            break
        except AssertionError:
            if not tries_left or "The current node timed out during startup" not in log.read_text():
                raise
            end(process)
    answer = httpx.post(f"{url}/v1/route", json={"input": "Translate to English: Ein Hund schläft."}, timeout=60).json()
    assert answer["data"][0]["adapters"][0]["name"] == "multi30k_deen"
