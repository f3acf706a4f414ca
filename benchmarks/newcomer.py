"""A newcomer's path, timed: from a fresh copy of this tree to the first routed answer on the page, in a real browser.

python benchmarks/newcomer.py

Does what the README's first screen says, `make serve`, in a temporary folder with an environment, a package cache and a
LORAUTER_HOME of its own, and prints the seconds of each step. All packages come from the registry. Needs Debian's
chromium, and playwright in the environment that runs this.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from browsing import open_browser
from local_s3 import free_port
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Translate to English: Zwei Hunde spielen im Schnee."
ANSWER, ADAPTER = "Two dogs play in the snow.", "multi30k_deen"
TARGET_S, GIVE_UP_S = 180, 1200


class Steps:
    """Prints how long each step took when the next begins."""

    def __init__(self) -> None:
        self.begun = self._last = time.monotonic()
        self._name = ""

    def begin(self, name: str) -> None:
        now = time.monotonic()
        if self._name:
            print(f"{now - self._last:7.1f} s  {self._name}", flush=True)
        self._name, self._last = name, now


def copy_tree(target: Path) -> None:
    """What a clone would hold, changes that are not committed included."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@contextmanager
def made(tree: Path, environment: Mapping[str, str], said: Callable[[str], None]) -> Iterator[threading.Event]:
    """`make serve`; each line that it prints is given to `said`. Yields what is set once it serves, or has ended."""
    process = subprocess.Popen(
        ["make", "serve"], cwd=tree, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said(line.rstrip())
            if line.startswith("serving on "):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield ready
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        reader.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        tree, port = Path(folder) / "lorauter", free_port()
        steps = Steps()
        steps.begin("a copy of the tree")
        copy_tree(tree)
        settings = tree / "serve_config.yaml"
        settings.write_text(re.sub(r"port: 8000", f"port: {port}", settings.read_text()))
        environment = {  # a newcomer's shell sets nothing of Python's
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
        }
        environment |= {"LORAUTER_HOME": f"{folder}/home", "PIP_CACHE_DIR": f"{folder}/pip"}

        def said(line: str) -> None:
            lines.append(line)
            if line.endswith(" ..."):
                steps.begin(line)

        steps.begin("make")
        with made(tree, environment, said) as ready:
            if not ready.wait(GIVE_UP_S) or not any(line.startswith("serving on ") for line in lines):
                raise SystemExit("make serve did not come to serve:\n" + "\n".join(lines))
            steps.begin("the page, in a browser")
            with open_browser() as browser:
                page = browser.new_page()
                page.goto(f"http://127.0.0.1:{port}/")
                asked = page.locator("#ask").get_by_label("Your question")
                asked.fill(QUESTION)
                steps.begin("the question")
                asked.press("Enter")
                panel = page.locator("#ask")
                expect(panel.locator(".timings")).to_have_count(1, timeout=120_000)
                shown = panel.inner_text()
                seconds = time.monotonic() - steps.begun
                steps.begin("")
            if ANSWER not in shown or ADAPTER not in shown:
                raise SystemExit(f"the page shows no routed answer:\n{shown}")
            print(f"newcomer_s {seconds:.1f}")
            verdict = "within" if seconds <= TARGET_S else "over"
            print(
                f"{verdict} {TARGET_S} s, on {os.cpu_count()} cores under a load of {os.getloadavg()[0]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
