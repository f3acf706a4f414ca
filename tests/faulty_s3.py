"""A proxy in front of an S3 server that is slow, fails, cuts answers off, or is gone, as told.

Passes bytes through, so that signatures stay right; one request a connection, so that each can be treated on its own.
"""

from __future__ import annotations

import random
import re
import socket
import socketserver
import struct
import threading
import time
from types import TracebackType

_FAULT = b"<Error><Code>SlowDown</Code><Message>injected</Message></Error>"
_REFUSAL = b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(_FAULT), _FAULT)


class FaultyS3:
    """Listens on a free port of the loopback, in a thread for each connection.

    Attributes:
        endpoint: the URL that clients use.
        delay_s: the pause before each answer.
        failing: share of the requests that are answered with 503.
        cutting: share of the answers of which only half is sent, and the connection reset.
        down: whether every connection is reset at once.
        requests, faults: how many there were so far.
    """

    def __init__(self, port: int) -> None:
        """In front of the server on this port."""
        self._upstream = port
        self._random = random.Random(0)
        self.requests = self.faults = 0
        self.heal()
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                proxy._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:  # either side may leave when it likes
                return

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def heal(self) -> None:
        """Pass everything through."""
        self.delay_s = self.failing = self.cutting = 0.0
        self.down = False

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> FaultyS3:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.heal()

    def _serve(self, client: socket.socket) -> None:
        self.requests += 1
        if self.down:
            self._reset(client)
            return
        request = _read_request(client)
        if not request:
            return
        time.sleep(self.delay_s)
        if self._random.random() < self.failing:
            self.faults += 1
            client.sendall(_REFUSAL)
            return
        answer = self._answer(request)
        if len(answer) > 1000 and self._random.random() < self.cutting:
            client.sendall(answer[: len(answer) // 2])
            self._reset(client)
        else:
            client.sendall(answer)

    def _answer(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self._upstream)) as server:
            server.sendall(request)
            return b"".join(iter(lambda: server.recv(1 << 16), b""))

    def _reset(self, client: socket.socket) -> None:
        self.faults += 1
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()


def _read_request(client: socket.socket) -> bytes:
    """One request, told to be the last of its connection; that header is not among the signed ones."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (piece := client.recv(1 << 16)):
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    if b"100-continue" in head.lower():
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = re.sub(rb"(?i)\r\nexpect: 100-continue", b"", head)
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    while length and len(body) < int(length[1]):
        if not (piece := client.recv(1 << 16)):
            return b""
        body += piece
    return re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head) + b"\r\nConnection: close\r\n\r\n" + body
