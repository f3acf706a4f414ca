"""A batch job on a cluster that a service has taken says what it waits for, goes on once it is there, or gives up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_s3 import free_port

pytestmark = pytest.mark.integration

BIN = Path(sys.executable).parent
# In a process of its own, as this one's Ray is the session's. It ends the service at a line, and itself at the end.
CLUSTER = """
import sys
import ray
from ray import serve

context = ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})

@serve.deployment(ray_actor_options={"num_cpus": 2.5})
class LoraModel:
    pass

serve.run(LoraModel.bind(), name="lorauter")
print("READY", context.address_info["gcs_address"], flush=True)
sys.stdin.readline()
serve.delete("lorauter")
sys.stdin.read()
"""


@pytest.fixture
def cluster() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A cluster of 3 CPUs, of which a service has 2.5: its process, and its address."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", CLUSTER, str(free_port())], stdin=pipe, stdout=pipe, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process, next(line.split()[1] for line in process.stdout if line.startswith("READY"))
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def test_what_a_job_waits_for_is_told_and_bounded(cluster: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    process, address = cluster
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Is the sky blue?"}) + "\n")
    (tmp_path / "job.yaml").write_text("{route_workers: {cpus: 1.5}, state_model: null}")
    (tmp_path / "large.yaml").write_text("route_workers: {cpus: 4}")

    def job(name: str, *options: str, config: str = "job.yaml") -> subprocess.Popen[str]:
        command = [BIN / "lorauter", "batch", "--route-only", "--address", address, "--config", tmp_path / config]
        command += ["--input", tmp_path / "rows.jsonl", "--output", tmp_path / name, *options]
        return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    waiting = re.compile(
        r"waiting for room in the cluster: wanted are 1 of RouteStage of the batch job \w+ with 1\.5 CPUs; "
        r"free are 0\.5 of 3 CPUs; the rest is held by LoraModel of the service 'lorauter' \(2\.5 CPUs\): end or shrink"
    )
    begun = time.monotonic()
    bounded, large = job("bounded", "--worker-wait", "14"), job("large", config="large.yaml")
    patient = job("patient")
    _, said = bounded.communicate(timeout=120)
    *_, told, last = said.splitlines()
    assert waiting.match(told), said
    assert last.startswith("error: gave up after 14 s (worker_wait_s) of waiting for room in the cluster")
    assert time.monotonic() - begun < 90

    _, said = large.communicate(timeout=120)
    assert said.splitlines()[-1].startswith("error: the pools need 4 CPUs, and the cluster has 3; ask for fewer")

    assert patient.stderr is not None
    assert process.stdin is not None
    before = []
    while not waiting.match(line := patient.stderr.readline()):
        assert line, before
        before.append(line)
    process.stdin.write("\n")  # the service goes
    process.stdin.flush()
    _, said = patient.communicate(timeout=120)
    assert patient.returncode == 0, said
    assert "1 rows are in" in said
