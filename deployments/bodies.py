"""Bodies of JSON. Requests' are read no further than a limit, and from clients alone that say what they are.

A page of another site can make a browser send a local service any text, but not with the content type of JSON: that
takes a leave that the service does not give.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from deployments.encoded import encoded

_CODINGS = ("gzip", "deflate")
_EITHER = 32 + zlib.MAX_WBITS  # zlib tells the two apart
JSON, FORM = "application/json", "multipart/form-data"


class Json(Response):
    """An answer's body of plain values."""

    media_type = JSON

    def render(self, content: Any) -> bytes:
        return encoded(content)


def content_type(request: Request) -> str:
    """The type of a request's body, without parameters and in lower case; empty where it names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body's parts, decompressed. Raises HTTPException beyond the limit, as it comes or as it is then."""
    coding, size = request.headers.get("content-encoding", "identity").strip().lower(), 0
    async for part in request.stream() if coding == "identity" else _decompressed(request, limit, coding):
        size = _within(limit, size + len(part))
        yield part


def _within(limit: int, size: int) -> int:
    if size > limit:
        raise HTTPException(413, f"the body is larger than {limit} bytes; send a smaller one")
    return size


async def _decompressed(request: Request, limit: int, coding: str) -> AsyncGenerator[bytes, None]:
    if coding not in _CODINGS:
        raise HTTPException(
            415,
            f"got the content encoding {coding[:100]!r}, needed one of {', '.join(_CODINGS)}, or none",
            {"Accept-Encoding": ", ".join(_CODINGS)},
        )
    decoder, came = zlib.decompressobj(_EITHER), 0
    try:
        async for part in request.stream():
            came = _within(limit, came + len(part))
            while part:
                if decoder.eof:  # a file of several, one after the other
                    decoder = zlib.decompressobj(_EITHER)
                yield decoder.decompress(part, limit + 1)
                part = decoder.unconsumed_tail or decoder.unused_data
        yield decoder.flush()
    except zlib.error as error:
        raise HTTPException(400, f"the body is not {coding}: {error}") from error
    if not decoder.eof:
        raise HTTPException(400, f"the body ends before its {coding} does; send all of it")


async def read_json(request: Request, limit: int) -> bytes:
    """The whole body. Raises HTTPException if it is too large, or not said to be JSON."""
    if (kind := content_type(request)) != JSON:
        raise HTTPException(
            415, f"got the content type {kind[:100]!r}, needed {JSON}; send the header 'Content-Type: {JSON}'"
        )
    return b"".join([part async for part in limited(request, limit)])
