"""Requests' bodies, as far as they are read: no further than a limit, and JSON from clients that say so alone.

A page of another site can make a browser send a local service any text, but not with the content type of JSON: that
takes a leave that the service does not give.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.exceptions import HTTPException
from starlette.requests import Request

JSON, FORM = "application/json", "multipart/form-data"


def content_type(request: Request) -> str:
    """The type of a request's body, without parameters and in lower case; empty where it names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body's parts. Raises HTTPException beyond the limit."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes; send a smaller one")
        yield part


async def read_json(request: Request, limit: int) -> bytes:
    """The whole body. Raises HTTPException if it is too large, or not said to be JSON."""
    if (kind := content_type(request)) != JSON:
        raise HTTPException(
            415, f"got the content type {kind[:100]!r}, needed {JSON}; send the header 'Content-Type: {JSON}'"
        )
    return b"".join([part async for part in limited(request, limit)])
