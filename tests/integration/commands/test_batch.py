"""Batch jobs: submitted to a cluster of two nodes, in a Ray of its own, killed on the way, and as data sets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from families import command, end, family, kill

from lorauter.adapters import open_store
from lorauter.catalog import Catalog, without_tasks
from lorauter.defaults import resolve_catalog

pytestmark = pytest.mark.integration

BIN = Path(sys.executable).parent
SETTINGS = {
    "shard_rows": 2,  # of which eleven are enough to lose some and to have some left
    "sampling": {"max_tokens": 12, "temperature": 0.7, "seed": 5},
    # One thread: two engines share two cores.
    "engine": {"max_batch": 4, "max_model_len": 512, "max_rank": 32, "threads": 1},
    "answer_workers": {"cpus": 2},
}
ROWS = 20


@pytest.fixture(scope="module")
def place(s3_server: Any) -> Iterator[str]:
    """An empty bucket, to which this process's AWS settings point, and those of its children."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_server.env, "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        s3_server.start()
        yield s3_server.bucket("batch-jobs")


@pytest.fixture(scope="module")
def rows(examples: Any) -> list[dict[str, Any]]:
    """Questions of the example tasks, with bad rows among them."""
    tasks = ("sst2", "dbpedia", "multi30k_deen", "tomqa", "sentiment140", "agnews")  # of short questions
    rows: list[dict[str, Any]] = [{"id": i, "prompt": examples(tasks[i % 6])[i // 6 % 10].input} for i in range(ROWS)]
    rows[1]["prompt"] = ""
    rows[2]["prompt"] = ["not", "a", "text"]
    rows[3]["prompt"] = "far too long " * 1000
    rows[4]["adapters"] = {"no-such-adapter": 1.0}
    rows[5]["temperature"] = "sunny"
    rows[6]["adapters"] = {"sst2": 0.5, "rte": 0.5}
    rows[7] = {
        "id": 7,
        "messages": [{"role": "user", "content": "Is the sky blue?"}],
        "max_tokens": 2,
        "temperature": 0,
    }
    rows[8] |= {"adapters": {}}
    body = {"model": "base", "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 3, "stop": "[INST]"}
    rows[9] = {"id": 9, "custom_id": "r-9", "method": "POST", "url": "/v1/chat/completions", "body": body}
    rows[10] |= {"error": "from upstream", "stop": "[INST]"}
    return rows


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "batch.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture(scope="module")
def start(
    place: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Path]]]:
    """`start(*command)`: a command of the environment, and its log; ended with all its children afterwards."""
    logs = tmp_path_factory.mktemp("logs")
    started: list[subprocess.Popen[bytes]] = []

    def run(name: str, *arguments: str | Path) -> tuple[subprocess.Popen[bytes], Path]:
        log = logs / f"{len(started)}-{name}"
        with log.open("wb") as out:
            process = subprocess.Popen([str(BIN / name), *map(str, arguments)], stdout=out, stderr=out)
        started.append(process)
        return process, log

    yield run
    for process in started:
        end(process)


@dataclass(frozen=True)
class TwoNodes:
    """A Ray cluster: where drivers connect to, and the URL that jobs are submitted to."""

    address: str
    jobs: str


# A process of its own: in this one the session's Ray runs. Agents' ports are the same in every cluster otherwise.
CLUSTER = """
import socket, sys
from ray.cluster_utils import Cluster
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
ports = [s.getsockname()[1] for s in sockets]
for s in sockets:
    s.close()
nodes = [{"num_cpus": 3, "dashboard_agent_listen_port": port} for port in ports[:2]]
server = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": ports[2]}
cluster = Cluster(initialize_head=True, head_node_args={**nodes[0], **server})
cluster.add_node(**nodes[1])
print("READY", cluster.address, f"http://{cluster.webui_url}", flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(place: str) -> Iterator[TwoNodes]:
    """Two nodes, each with room for one engine, and a job server."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temporary:  # a short path
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_TMPDIR": temporary},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            said = next(line for line in process.stdout if line.startswith("READY "))
            yield TwoNodes(*said.split()[1:])
        finally:
            begun = family(process)
            process.stdin.close()
            _, left = psutil.wait_procs([*begun, process], timeout=20)
            kill(left)
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def undisturbed(start: Any, cluster: TwoNodes, place: str, rows: list[dict[str, Any]], settings: Path) -> str:
    """Where the output is of a job that was submitted to the cluster, with two answering workers; its input is `in`."""
    content = "".join(json.dumps(row) + "\n" for row in rows) + "no row\n"
    open_store(place).write("in/rows.jsonl", content.encode())
    submit = ("job", "submit", "--address", cluster.jobs, "--", BIN / "lorauter", "batch")
    job = ("--input", f"{place}/in", "--output", f"{place}/whole", "--config", settings, "--workers", "2")
    log = ended(*start("ray", *submit, *job))
    assert f"{ROWS + 1} rows are in {place}/whole: 6 errors" in log
    assert "in 2 workers" in log
    return f"{place}/whole"


def ended(process: subprocess.Popen[bytes], log: Path) -> str:
    """The log of a command that has ended well."""
    assert process.wait(240) == 0, log.read_text()
    return log.read_text()


def parts(uri: str) -> list[str]:
    return [key for key in open_store(uri).files() if key.startswith("part-")]


def wait_for_parts(uri: str, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 400
    while len(parts(uri)) < count:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def output(uri: str) -> list[dict[str, Any]]:
    """All rows, in the order of the parts, without the one column that is a time."""
    store = open_store(uri)
    found = [json.loads(line) for key in parts(uri) for line in store.read(key).splitlines()]
    assert all((row.pop("latency_s") is None) == (row["error"] is not None) for row in found)
    return found


def workers(process: subprocess.Popen[bytes], stage: str) -> list[psutil.Process]:
    return [child for child in family(process) if "MapWorker(" in (title := command(child)) and stage in title]


def test_every_row_of_a_submitted_job_has_an_answer_or_says_why_not(undisturbed: str) -> None:
    answered = output(undisturbed)
    assert [row.get("id") for row in answered] == [*range(ROWS), None]
    errors = {i: row["error"] for i, row in enumerate(answered) if row["error"] is not None}
    assert list(errors) == [1, 2, 3, 4, 5, ROWS]
    for i, words in {1: "empty", 2: "list", 3: "tokens", 4: "AdapterNotFound", 5: "temperature", ROWS: "JSON"}.items():
        assert words in errors[i]
    assert [a["name"] for a in answered[6]["adapters"]] == ["sst2", "rte"]
    assert answered[7]["completion_tokens"] <= 2
    assert answered[8]["adapters"] == answered[9]["adapters"] == []
    assert 0 < answered[9]["completion_tokens"] <= 3
    assert (answered[10]["input_error"], answered[10]["error"]) == ("from upstream", None)
    for row in (row for row in answered if row["error"] is None):
        assert row["finish_reason"] in ("stop", "length")
        assert row["prompt_tokens"] > 0
        assert 0 < row["completion_tokens"] <= 12
    manifest = json.loads(open_store(undisturbed).read("_manifest.json"))
    assert (manifest["state"], manifest["counts"]["rows"], manifest["counts"]["errors"]) == ("complete", ROWS + 1, 6)
    assert manifest["catalog"]["version"]
    assert manifest["model"] == "default"
    assert manifest["settings"]["sampling"]["seed"] == 5


def test_a_killed_job_ends_as_an_undisturbed_one_does(
    start: Any, cluster: TwoNodes, place: str, undisturbed: str, settings: Path
) -> None:
    """It is begun on a Ray of its own, which ends with it, and goes on where another one runs."""
    killed, catalog = f"{place}/killed", Catalog.load(resolve_catalog("default"))
    catalog.save(f"{place}/catalog")
    again = ("lorauter", "batch", "--input", f"{place}/in", "--output", killed, "--config", settings)
    again += ("--catalog", f"{place}/catalog")
    process, log_file = start(*again)
    wait_for_parts(killed, 1, process, log_file)
    assert workers(process, "AnswerStage")
    kill([*workers(process, "AnswerStage"), *workers(process, "RouteStage")])
    wait_for_parts(killed, 3, process, log_file)  # Ray has put others in their places
    begun = family(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(begun, timeout=10)
    assert all("Agent" in said for said in map(command, left) if said), left  # Ray's own take their time to notice
    kill(left)
    before = {key: open_store(killed).fingerprint(key) for key in parts(killed)}
    assert 3 <= len(before) < len(parts(undisturbed))
    assert json.loads(open_store(killed).read("_manifest.json"))["state"] == "running"
    without_tasks(catalog, ["sst2", "dbpedia"]).save(f"{place}/catalog")  # somebody publishes meanwhile
    again += ("--address", cluster.address)
    ended(*start(*again))
    assert output(killed) == output(undisturbed)
    assert sum(open_store(killed).fingerprint(key) == tag for key, tag in before.items()) >= len(before) - 1
    assert f"{ROWS + 1} rows are in" in ended(*start(*again))  # nothing is left to do, and nothing is done


def test_route_only_writes_other_formats_and_stops_at_too_many_errors(
    start: Any, cluster: TwoNodes, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    settings = tmp_path / "batch.yaml"
    settings.write_text(yaml.safe_dump({**SETTINGS, "state_model": None}))  # it takes most of a worker's start

    def job(name: str, *options: str, of: list[dict[str, Any]]) -> tuple[subprocess.Popen[bytes], Path]:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
        places = ("--input", tmp_path / f"{name}.jsonl", "--output", tmp_path / name)
        common = ("--config", settings, "--route-only", "--address", cluster.address)
        started: tuple[subprocess.Popen[bytes], Path] = start("lorauter", "batch", *places, *common, *options)
        return started

    log = ended(*job("out", "--format", "parquet", of=rows))
    assert "rows by first task" in log
    table = pq.read_table(tmp_path / "out")  # the manifest and the records are left out by their names
    assert table.num_rows == ROWS
    assert table["tasks"].to_pylist()[0][0]["name"] == "sst2"
    assert "answer" not in table.column_names
    assert [i for i, error in enumerate(table["error"].to_pylist()) if error is not None] == [1, 2, 4]
    assert table["input_error"][10].as_py() == "from upstream"

    process, log_file = job("strict", "--max-errors", "1", of=rows[:4])
    assert process.wait(120) == 1
    assert "max_errors is 1" in log_file.read_text()
    assert "Traceback" not in log_file.read_text()


def test_reports_of_a_running_shard_reach_the_job_and_are_cleared(cluster: TwoNodes) -> None:
    script = """
import json, ray, sys, time
from deployments.batch.reports import Reports, reporting
from lorauter.engine import Completion
from lorauter.engine.feed import Outcome
ray.init(address=sys.argv[1], log_to_driver=False)
reports, seen = Reports("a-job"), []

@ray.remote(num_cpus=0.1)
def worker():
    with reporting(3, reports) as ended:
        ended(Outcome(Completion("yes", (1, 2, 3), "stop")))
        ended(Outcome(ValueError("no")))
        time.sleep(2)

running = worker.remote()
while not seen and not ray.wait([running], timeout=0.1)[0]:
    seen = reports.running([])
ray.get(running)
reports.clear()
print("SEEN " + json.dumps([seen, reports.running([])]))
"""
    ran = subprocess.run([sys.executable, "-c", script, cluster.address], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert [line for line in ran.stdout.splitlines() if line.startswith("SEEN ")] == ["SEEN [[[2, 3, 1]], []]"]


def test_a_data_set_is_answered_into_a_data_set(cluster: TwoNodes) -> None:
    script = """
import json, ray, sys
from deployments.batch.config import BatchConfig
from deployments.batch.pipeline import answer_dataset
ray.init(address=sys.argv[1], log_to_driver=False)
question = "Translate to English: Zwei Hunde spielen im Schnee."
rows = [{"text": question, "n": n} for n in range(4)] + [{"text": "", "n": 4}]
rows += [{"text": "Tell me a joke.", "n": 5, "temperature": 1.5}] * 4
engine = {"max_batch": 4, "threads": 1}
config = BatchConfig.parse({"columns": {"prompt": "text"}, "sampling": {"max_tokens": 12}, "engine": engine})
answered = answer_dataset(ray.data.from_items(rows, override_num_blocks=2), config).take_all()
print("ROWS " + json.dumps(sorted(answered, key=lambda row: row["n"])))
"""
    ran = subprocess.run([sys.executable, "-c", script, cluster.address], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    [line] = [line for line in ran.stdout.splitlines() if line.startswith("ROWS ")]
    rows = json.loads(line[5:])
    good, [bad], equal = rows[:4], rows[4:5], rows[5:]
    assert [row["n"] for row in good] == [0, 1, 2, 3]
    assert len({row["answer"] for row in equal}) == 4  # each has a seed of its own
    assert {row["answer"] for row in good} == {"Two dogs play in the snow."}
    assert all(row["adapters"][0]["name"] == "multi30k_deen" for row in good)
    assert "empty" in bad["error"]
