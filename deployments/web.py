"""The page at `/`, from the files in the folder `page`: it asks of the service what anybody may ask over HTTP.

Its files have their hash in their address, and may be kept for good; the document that names them is asked for anew.
Nothing comes from elsewhere, and no browser runs or loads anything else in it. Knows nothing of what it shows.
"""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

FOLDER = Path(__file__).parent / "page"
_INDEX = "index.html"
_DIGEST, _KEYS = b"{digest}", b"{keys}"  # what stands in the document for the hash of all files, and for "needed"
_FOR_GOOD = "public, max-age=31536000, immutable"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@cache
def files() -> tuple[str, dict[str, bytes]]:
    """The hash of all files, and each by its name."""
    found = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.is_file()}
    digest = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]
    return digest, {**found, _INDEX: found[_INDEX].replace(_DIGEST, digest.encode())}


def index_of(*, closed: bool) -> Callable[[Request], Awaitable[Response]]:
    """`GET /`, of a service that asks for keys or does not. What the page names is relative to it, whatever the
    service's own path is."""
    digest, content = files()
    document = content[_INDEX].replace(_KEYS, b"needed" if closed else b"none")

    async def index(request: Request) -> Response:
        if not request.url.path.endswith("/"):
            return RedirectResponse(f"{request.url.path.rpartition('/')[2]}/")
        return _answer(request, _INDEX, document, f"{digest}-{closed:d}", "no-cache")

    return index


async def asset(request: Request) -> Response:
    """`GET /page/{digest}/{file}`."""
    digest, content = files()
    name, asked = request.path_params["file"], request.path_params["digest"]
    if name not in content or name == _INDEX:
        raise HTTPException(404)
    # Another hash is that of a replica of another lorauter: its files come when all replicas are alike.
    return _answer(request, name, content[name], digest, _FOR_GOOD if asked == digest else "no-store")


def _answer(request: Request, name: str, content: bytes, tag: str, caching: str) -> Response:
    headers = {**_HEADERS, "Cache-Control": caching, "ETag": f'"{tag}"'}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
    return Response(content, media_type=kind, headers=headers)
