"""A proxy in front of an S3 server that has no conditional writes, which gives it some, as AWS and MinIO have them.

It knows the tags of what is written through it. Passes bytes through, so that signatures stay right.
"""

from __future__ import annotations

import re
import threading

from faulty_s3 import FaultyS3

_FAULT = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class ConditionalS3(FaultyS3):
    """Honours `If-Match` and `If-None-Match: *` of PUT.

    Attributes:
        refused: how many were.
        failing_puts: of how many more conditional ones the answer is a fault.
        before_it_is_done: whether those are not done either.
        not_implemented: whether conditions are refused as unknown.
    """

    def __init__(self, port: int) -> None:
        self._tags: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        self.refused = self.failing_puts = 0
        self.before_it_is_done = self.not_implemented = False
        super().__init__(port)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, request: bytes) -> bytes:
        method, path = request.split(b" ", 2)[:2]
        path = path.partition(b"?")[0]
        with self._lock:
            match = re.search(rb"(?i)\r\nif-match: *([^\r]+)", request)
            none = re.search(rb"(?i)\r\nif-none-match: *\*", request)
            conditional = method == b"PUT" and bool(match or none)
            if conditional and self.not_implemented:
                return _error(501, b"NotImplemented")
            if conditional and self.failing_puts and self.before_it_is_done:
                self.failing_puts -= 1
                return _FAULT
            if method == b"PUT" and match and self._tags.get(path) is None:
                self.refused += 1
                return _error(404, b"NoSuchKey")
            if method == b"PUT" and ((match and self._tags[path] != match[1]) or (none and path in self._tags)):
                self.refused += 1
                return _error(412, b"PreconditionFailed")
            answer = super()._answer(request)
            tag = re.search(rb"(?i)\r\netag: *([^\r]+)", answer)
            if method == b"PUT" and tag:
                self._tags[path] = tag[1]
            if method == b"DELETE":
                self._tags.pop(path, None)
            if conditional and self.failing_puts:
                self.failing_puts -= 1
                return _FAULT
            return answer


def _error(status: int, code: bytes) -> bytes:
    body = b"<Error><Code>%s</Code><Message>injected</Message></Error>" % code
    head = b"HTTP/1.1 %d Refused\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    return head % (status, len(body)) + body
