"""Runs the clients' tests: starts the service on the example pool, and each environment's tests against it.

    .venv/bin/python tests/clients/run.py [--url URL] [NAME ...]

NAME is an environment, and the folder of its tests; `make clients` makes the environments and runs them all. A service
that is running already is named by --url; it has to be on the example pool.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorauter.defaults import resolve_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMES = ("newest", "openai2", "evaluation", "load")
START_S = 300.0


@contextmanager
def service() -> Iterator[str]:
    """A service of its own, and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("lorauter")), "serve", "--port", str(port)]
    with tempfile.TemporaryFile() as said:
        running = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_S
            while not answers(url):
                if running.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise SystemExit(f"the service does not start:\n{said.read().decode()[-3000:]}")
                time.sleep(1)
            yield url
        finally:
            running.terminate()
            running.wait(60)


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/health", timeout=5).status == 200)
    except (OSError, urllib.error.URLError):
        return False


def run(name: str, url: str) -> bool:
    """Whether an environment's tests pass."""
    environment = {**os.environ, "LORAUTER_URL": url, "LORAUTER_TOKENIZER": resolve_model("default")}
    environment.pop("PYTHONPATH", None)
    command = [str(ROOT / ".venv-clients" / name / "bin" / "python"), "-m", "pytest", "-q", str(HERE / name)]
    command += ["-c", str(HERE / "pytest.ini"), "--confcutdir", str(HERE)]
    print(f"== {name}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES)
    given = parser.parse_args()
    if given.url:
        passed = [run(name, given.url) for name in given.names]
    else:
        with service() as url:
            passed = [run(name, url) for name in given.names]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
