"""The admin API: adapters and tasks added and removed while the service runs.

Knows HTTP; what is done is `deployments.catalog_editor`'s. Adapters come as uploads, or are in the
service's own store already: no client names a place for the server to read from.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deployments.config import ApiSettings, explain, first_field
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE
from lorauter.errors import InvalidRequest
from lorauter.names import RESERVED, RULE, is_valid_name
from lorauter.tasks import Task

Endpoint = Callable[[Request], Awaitable[Response]]
_MAX_EXAMPLES = 512
_PARTS = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}


class Editor(Protocol):
    """What the admin API needs behind it. Every method raises LorauterError, and returns what to answer."""

    async def put_task(self, task: Task) -> dict[str, Any]:
        """Add or replace a task."""

    async def remove_task(self, name: str) -> dict[str, Any]:
        """Take a task out."""

    async def put_adapter(self, name: str, files: Mapping[str, Any] | None) -> dict[str, Any]:
        """Add or replace an adapter, of these files' bytes or as the store has it."""

    async def remove_adapter(self, name: str) -> dict[str, Any]:
        """Take an adapter out."""


def admin_endpoints(editor: Editor | None, settings: ApiSettings) -> list[tuple[str, str, Endpoint]]:
    """Method, path and function of each; without an editor, where what is served is the examples, they refuse."""
    admin = _Admin(editor, settings)
    return [
        ("POST", "/v1/tasks", admin.put_task),
        ("DELETE", "/v1/tasks/{name}", admin.remove_task),
        ("POST", "/v1/adapters", admin.put_adapter),
        ("DELETE", "/v1/adapters/{name}", admin.remove_adapter),
    ]


class _AdapterBody(BaseModel):
    """`POST /v1/adapters` as JSON: an adapter that the store has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str


class _Admin:
    def __init__(self, editor: Editor | None, settings: ApiSettings) -> None:
        self._editor = editor
        self._settings = settings

    async def put_task(self, request: Request) -> Response:
        editor = self._open()
        raw = await self._raw(request)
        try:
            task = Task.from_json(json.loads(raw), source="the task")
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the body is no JSON: {error}") from error
        if len(task.validation) > _MAX_EXAMPLES:
            raise InvalidRequest(
                f"got {len(task.validation)} validation examples; at most {_MAX_EXAMPLES} are taken, 20 do",
                param="validation",
            )
        return JSONResponse(await editor.put_task(task))

    async def remove_task(self, request: Request) -> Response:
        return JSONResponse(await self._open().remove_task(request.path_params["name"]))

    async def put_adapter(self, request: Request) -> Response:
        editor = self._open()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            name, files = await self._upload(request)
            return JSONResponse(await editor.put_adapter(name, files))
        if kind != "application/json":
            raise HTTPException(
                415, "send multipart/form-data (name, config, weights), or JSON with the name of one in the store"
            )
        try:
            body = _AdapterBody.model_validate_json(await self._raw(request))
        except ValidationError as error:
            raise InvalidRequest(explain(error, "option"), param=first_field(error)) from error
        return JSONResponse(await editor.put_adapter(_name(body.name), None))

    async def remove_adapter(self, request: Request) -> Response:
        return JSONResponse(await self._open().remove_adapter(_name(request.path_params["name"])))

    def _open(self) -> Editor:
        """The editor, if there is something to edit."""
        if self._editor is None:
            raise HTTPException(409, "the examples are not changed; set `adapters` and `catalog` to stores of your own")
        return self._editor

    async def _raw(self, request: Request) -> bytes:
        return b"".join([part async for part in _limited(request, self._settings.max_body_bytes)])

    async def _upload(self, request: Request) -> tuple[str, dict[str, Any]]:
        """An adapter's name and files. Large ones are on the disk while they come."""
        stream = _limited(request, self._settings.max_adapter_bytes)
        try:
            form = await MultiPartParser(request.headers, stream, max_files=len(_PARTS), max_fields=1).parse()
        except MultiPartException as error:
            raise InvalidRequest(f"the upload cannot be read: {error.message}") from error
        try:
            parts = dict(form.multi_items())
            wrong = sorted({"name", *_PARTS} ^ parts.keys())
            if wrong or not isinstance(parts["name"], str):
                raise InvalidRequest(
                    f"got the parts {', '.join(sorted(parts)) or 'none'}; needed are name, config "
                    f"({CONFIG_FILE}) and weights ({WEIGHTS_FILE})",
                    param=wrong[0] if wrong else "name",
                )
            files = {}
            for part, file in _PARTS.items():
                upload = parts[part]
                if not isinstance(upload, UploadFile):
                    raise InvalidRequest(f"the part {part} is no file; send the content of {file} as one", param=part)
                files[file] = np.frombuffer(await upload.read(), np.uint8)
            return _name(parts["name"]), files
        finally:
            await form.close()


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body's parts, no further than the limit."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes; send a smaller one")
        yield part


def _name(name: str) -> str:
    """A name that an adapter may have. Raises InvalidRequest."""
    if not is_valid_name(name) or name.lower() in RESERVED:
        raise InvalidRequest(f"the name is not allowed; use {RULE}, and none of {sorted(RESERVED)}", param="name")
    return name
