"""A batch job on a cluster that a service has taken says what it waits for, goes on once it is there, or gives up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

# In a process of its own, as this one's Ray is the session's. The replica takes 2 of 2.5 CPUs, and the job wants 1.5.
SCRIPT = """
import json, os, sys, threading, time
import ray
from ray import serve
from deployments.batch.config import BatchConfig
from deployments.batch.job import run_job
from deployments.room import look
from lorauter.errors import BatchError, ConfigError

source, output, port = sys.argv[1:]
ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})

@serve.deployment(ray_actor_options={"num_cpus": 2.5})
class LoraModel:
    pass

serve.run(LoraModel.bind(), name="lorauter")

def job(name, **settings):
    begun, told = time.time(), []
    say = lambda line: told.append((time.time() - begun, line))
    config = BatchConfig.parse({"route_only": True, "route_workers": {"cpus": 1.5}, **settings})
    try:
        rows, error = run_job(source, f"{output}/{name}", config, notify=say).tally.rows, ""
    except (BatchError, ConfigError) as problem:
        rows, error = 0, str(problem)
    return {"rows": rows, "error": error, "told": told, "seconds": time.time() - begun}

results = {"bounded": job("bounded", worker_wait_s=14), "too large": job("large", route_workers={"cpus": 4})}
threading.Timer(14, lambda: serve.delete("lorauter")).start()
results["in the end"] = job("out")
print("RESULTS " + json.dumps(results))
serve.shutdown()
"""


def test_what_a_job_waits_for_is_told_and_bounded(tmp_path: Path, free_port: int) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Is the sky blue?"}) + "\n")
    command = [sys.executable, "-c", SCRIPT, tmp_path / "rows.jsonl", tmp_path / "out", str(free_port)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    [line] = [line for line in ran.stdout.splitlines() if line.startswith("RESULTS ")]
    results: dict[str, Any] = json.loads(line.removeprefix("RESULTS "))

    for name in ("bounded", "in the end"):
        [(at, told)] = [told for told in results[name]["told"] if told[1].startswith("waiting for room")]
        assert 10 <= at < 60
        assert "1 of RouteStage of the batch job" in told
        assert "1.5 CPUs; free are 0.5 of 3 CPUs" in told
        assert "LoraModel of the service 'lorauter' (2.5 CPUs)" in told
    assert "gave up after 14 s (worker_wait_s) of waiting for room" in results["bounded"]["error"]
    assert results["bounded"]["seconds"] < 90
    assert "ask for" in results["too large"]["error"]
    assert (results["in the end"]["rows"], results["in the end"]["error"]) == (1, "")
