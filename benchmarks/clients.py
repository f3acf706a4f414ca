"""Clients of an HTTP server that ask one prompt after the other, in several processes that share the prompts.

Each process has its share of the clients, and a client takes the next prompt that nobody has taken, from a pipe that
holds their numbers: so the last answers do not wait for one process's share. All begin together. The processes live
from load to load. HTTP is parsed by httptools: an asked prompt costs a process a tenth of what it would with aiohttp,
and what the clients cost is told, so that one sees whether it is they who bound a figure.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import time
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools  # comes with Ray Serve's uvicorn

_NUMBER = 4  # bytes, which a pipe hands out together
_PIPE = 1 << 20  # bytes: prompts of a load, times four
_ANSWER_S = 300.0
_END = b"data: [DONE]\n\n"


@dataclass
class Cell:
    """What became of one load.

    Attributes:
        seconds: from the first request to the last answer.
        firsts: seconds to each streamed answer's first token.
        errors: what went wrong.
        texts: whole answers, by the prompt's number.
        timings: what the service says of them, where it was asked to: seconds of each step.
        clients_cpu: seconds of CPU time that the clients took.
        clients_busy: the share of the time for which the busiest process of them computed.
        cpu: seconds of CPU time by process of the service.
    """

    seconds: float = 0.0
    firsts: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    texts: dict[int, str] = field(default_factory=dict)
    timings: list[dict[str, float | None]] = field(default_factory=list)
    clients_cpu: float = 0.0
    clients_busy: float = 0.0
    cpu: Counter[str] = field(default_factory=Counter)


class Clients:
    """The processes, from here to the block's end.

    Args:
        processes: how many.
    """

    def __init__(self, processes: int) -> None:
        self._read, self._write = os.pipe()
        fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, _PIPE)
        os.set_blocking(self._read, False)
        command = [sys.executable, __file__, str(self._read)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[self._read])
            for _ in range(processes)
        ]

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with suppress(OSError):
                process.communicate("")
        os.close(self._read)
        os.close(self._write)

    def ask(self, url: str, bodies: list[dict[str, Any]], clients: int) -> Cell:
        """Post each body once, so many at a time."""
        if len(bodies) > _PIPE // _NUMBER:
            raise ValueError(f"got {len(bodies)} requests; a load has at most {_PIPE // _NUMBER}")
        os.write(self._write, b"".join(i.to_bytes(_NUMBER) for i in range(len(bodies))))
        count = len(self._processes)
        for place, process in enumerate(self._processes):
            load = {"url": url, "bodies": bodies, "clients": clients // count + (place < clients % count)}
            self._say(process, json.dumps(load))
        for process in self._processes:
            self._hear(process)  # it is ready
        for process in self._processes:
            self._say(process, "go")
        found = [json.loads(self._hear(process)) for process in self._processes]
        seconds = max(one["ended"] for one in found) - min(one["began"] for one in found)
        return Cell(
            seconds,
            [first for one in found for first in one["firsts"]],
            sum((Counter(one["errors"]) for one in found), Counter()),
            {int(i): text for one in found for i, text in one["texts"].items()},
            [timing for one in found for timing in one["timings"]],
            sum(one["cpu"] for one in found),
            max(one["cpu"] for one in found) / seconds,
        )

    @staticmethod
    def _say(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()

    @staticmethod
    def _hear(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of clients ended with status {process.wait()}")
        return line


# --- in each process


@dataclass
class _Found:
    firsts: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    texts: dict[int, str] = field(default_factory=dict)
    timings: list[dict[str, float | None]] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One client's connection, on which it asks one thing at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # TCP's

    async def post(self, head: bytes, body: bytes) -> tuple[int, bytes, float]:
        """The status, the body, and the seconds until its first piece. Raises ConnectionError, TimeoutError."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._first: float | None = None
        self._coding = b""
        self._answer = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self._transport.write(b"%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body))
        async with asyncio.timeout(_ANSWER_S):
            await self._answer
        whole = b"".join(self._pieces)
        whole = zlib.decompress(whole, 16 + zlib.MAX_WBITS) if self._coding == b"gzip" else whole
        return self._parser.get_status_code(), whole, (self._first or time.perf_counter()) - began

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the server has hung up ({error})"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- httptools'

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-encoding":
            self._coding = value

    def on_body(self, body: bytes) -> None:
        self._first = self._first or time.perf_counter()
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)


async def _connected(url: str) -> _Connection:
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(_Connection, parts.hostname, parts.port)
    return connection


async def _ask_all(load: dict[str, Any], numbers: int) -> dict[str, Any]:
    url, found = load["url"], _Found()
    parts = urlsplit(url)
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        "Accept-Encoding: gzip\r\n"
    ).encode()
    bodies = [(json.dumps(body).encode(), bool(body["stream"])) for body in load["bodies"]]
    connections = [await _connected(url) for _ in range(load["clients"])]
    print("ready", flush=True)
    sys.stdin.readline()

    async def client(connection: _Connection) -> None:
        while True:
            try:
                i = int.from_bytes(os.read(numbers, _NUMBER))
            except BlockingIOError:  # there are no more
                connection.close()
                return
            body, streamed = bodies[i]
            try:
                status, answer, first = await connection.post(head, body)
                if status != 200:
                    found.errors[f"{status} {answer[:200].decode(errors='replace')}"] += 1
                elif not streamed:
                    whole = json.loads(answer)
                    found.texts[i] = whole["choices"][0]["message"]["content"]
                    if timings := whole.get("lorauter", {}).get("timings"):
                        found.timings.append(timings)
                elif answer.endswith(_END):
                    found.firsts.append(first)
                else:
                    found.errors[f"a stream ended with {answer[-200:].decode(errors='replace')}"] += 1
            except (OSError, ValueError, KeyError, httptools.HttpParserError) as error:
                found.errors[repr(error)[:200]] += 1
                connection.close()
                connection = await _connected(url)

    began, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*map(client, connections))
    ended, cpu = time.monotonic(), time.process_time() - cpu
    return {**vars(found), "began": began, "ended": ended, "cpu": cpu}


def main() -> None:
    numbers = int(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(asyncio.run(_ask_all(json.loads(line), numbers))), flush=True)


if __name__ == "__main__":
    main()
