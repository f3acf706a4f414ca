"""`lorauter chat` against a server that says what it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from command_line import Cli
from local_s3 import free_port

EVENTS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}], "lorauter": {}},
    {"choices": [{"delta": {"content": "Hé"}}]},
    {"choices": [{"delta": {"content": "llo"}}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {}},
]


class Server(ThreadingHTTPServer):
    """Answers every POST with `status`, `headers` and `body`; or, with no status, with the raw `body`."""

    status: int | None = 200
    headers: dict[str, str]
    body: bytes
    asked: list[Any]
    authorization: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stream(self, *events: object) -> None:
        """Answer with server-sent events; text stands for itself."""
        self.body = b"".join(
            f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n".encode()
            for event in events
        )


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.authorization = self.headers["Authorization"]
        server.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        if server.status:
            self.send_response(server.status)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked, server.headers, server.body = [], {}, b""
        server.stream(*EVENTS, "[DONE]")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_chat_sends_a_key(cli: Cli, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("chat", "--url", server.url, "--key", "lr-a", "hi").code == 0
    assert server.authorization == "Bearer lr-a"
    monkeypatch.setenv("LORAUTER_API_KEY", "lr-b")
    assert cli("chat", "--url", server.url, "hi").code == 0
    assert server.authorization == "Bearer lr-b"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_chat_takes_the_address_as_other_clients_take_it(cli: Cli, server: Server, suffix: str) -> None:
    server.stream(*EVENTS, "[DONE]")
    cli("chat", "hi", "--url", server.url + suffix)
    assert [path for path, _ in server.asked] == ["/v1/chat/completions"]


def test_chat_prints_the_routing_and_the_answer(cli: Cli, server: Server) -> None:
    server.headers = {"x-lorauter-tasks": "sums=0.9,rain=0.2", "x-lorauter-adapters": ""}
    server.body = b": a proxy says it is alive\n\n" + server.body
    ran = cli("chat", "--url", f"{server.url}/", "--model", "poet", "--max-tokens", 9, "Is [bold]this[/bold] it?")
    assert (ran.code, ran.out) == (0, "Héllo\n")
    assert ran.err.splitlines() == ["tasks: sums=0.9  rain=0.2", "adapters: none"]
    [(path, body)] = server.asked
    assert path == "/v1/chat/completions"
    assert server.authorization is None
    assert body == {
        "model": "poet",
        "messages": [{"role": "user", "content": "Is [bold]this[/bold] it?"}],
        "stream": True,
        "max_tokens": 9,
    }


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (404, b'{"error": {"message": "no such [model]", "code": null}}', "no such [model]"),
        (400, b'{"error": {"message": "first\\nsecond"}}', "first second"),
        (502, b"<html>Bad gateway</html>", "502"),
        (500, b'{"error": "text"}', "500"),
        (500, b"", "500"),
        (200, [*EVENTS[:2], {"error": {"message": "the store is down"}}], "the store is down"),
        (200, EVENTS[:2], "broke off"),
        (200, [], "broke off"),
        (200, [*EVENTS, "{oops"], "not what lorauter"),
        (200, [{"choices": [{}]}], "not what lorauter"),
        (200, [{"choices": None}], "not what lorauter"),
        (200, ["{}"], "not what lorauter"),
        (200, ["[1]"], "not what lorauter"),
        (200, b"data: \xff\n\n", "not what lorauter"),
        (None, b"SSH-2.0-OpenSSH\r\n", "no server answers"),
        (None, b"", "no server answers"),
        (None, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nda", "broke off"),
    ],
)
def test_what_a_server_may_do_wrong(cli: Cli, server: Server, status: int | None, body: Any, cause: str) -> None:
    server.status = status
    if isinstance(body, bytes):
        server.body = body
    else:
        server.stream(*body)
    cli("chat", "--url", server.url, "hi").refused(cause)


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://127.0.0.1:{free}", "lorauter serve"),
        ("http://127.0.0.1:port", "http://127.0.0.1:port"),
        ("http://[", "http://["),
        ("http://", "http://"),
        ("127.0.0.1:8000", "must begin with http"),
        ("file:///etc/hostname", "must begin with http"),
    ],
)
def test_no_server(cli: Cli, url: str, cause: str) -> None:
    cli("chat", "--url", url.format(free=free_port()), "hi").refused(cause)
