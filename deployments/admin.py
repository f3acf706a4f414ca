"""The admin API: adapters and tasks added, removed and composed while the service runs.

Knows HTTP; who may do it is for `deployments.rights` to say, and what is done is `deployments.catalog_editor`'s.
Adapters come as uploads, or are in the service's own store already: no client names a place for the server to read
from. An upload is on the disk while it comes and until it is taken in; few are taken at once.
"""

from __future__ import annotations

import asyncio
import json
import mmap
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from deployments import changes
from deployments.access import Caller
from deployments.bodies import FORM, JSON, content_type, limited, read_json
from deployments.config import ApiSettings
from deployments.options import parse_body
from deployments.rights import Change
from deployments.text_types import CompositionBody, LoadAdapterBody, UnloadAdapterBody
from lorauter.adapters.provenance import composed_name
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE
from lorauter.errors import ConfigError, InvalidRequest, Overloaded, ServiceUnavailable, TaskNotFound
from lorauter.names import RESERVED, RULE, is_valid_name
from lorauter.tasks import Task

ReadChange = Callable[[Request], AbstractAsyncContextManager[Change]]
"""Reads what a request asks for, a change or what became of one; what it is made of is kept until the end."""

_MAX_EXAMPLES = 512
_MAX_CHANGES_BYTES = 16 << 20
_UPLOADS, _UPLOADS_A_KEY = 4, 2  # that a replica of the ingress takes at once
_UPLOAD_S = 600.0  # for which one may come
_PARTS = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE}


class Editor(Protocol):
    """What the admin API needs behind it. Every method raises LorauterError, and returns what to answer.

    It makes of what is asked for what the caller may change as things are then.
    """

    async def put_task(self, caller: Caller, task: Task) -> dict[str, Any]:
        """Add or replace a task."""

    async def remove_task(self, caller: Caller, name: str) -> dict[str, Any]:
        """Take a task out."""

    async def put_adapter(self, caller: Caller, name: str, files: Mapping[str, Any] | None) -> dict[str, Any]:
        """Add or replace an adapter, of these files' bytes or as the store has it."""

    async def remove_adapter(self, caller: Caller, name: str) -> dict[str, Any]:
        """Take an adapter out."""

    async def change(self, caller: Caller, wanted: Sequence[changes.Change]) -> dict[str, Any]:
        """Make all of these changes at once, or none."""

    async def use_version(self, version: str) -> dict[str, Any]:
        """Make another version of the catalog the current one."""

    async def compose(self, caller: Caller, task: str) -> dict[str, Any]:
        """Ask for an adapter that is composed for a task; says how it can be followed."""

    async def compositions(self, caller: Caller) -> dict[str, Any]:
        """What was asked for, as far as the caller may see it."""

    async def composition(self, caller: Caller, id: str) -> dict[str, Any]:
        """How one of them is."""

    async def cancel_composition(self, caller: Caller, id: str) -> dict[str, Any]:
        """Have one made no further."""


def admin_endpoints(editor: Editor | None, settings: ApiSettings) -> list[tuple[str, str, ReadChange]]:
    """Method, path and function of each; without an editor, where what is served is the examples, they refuse."""
    admin = _Admin(editor, settings)
    return [
        ("POST", "/v1/tasks", admin.put_task),
        ("DELETE", "/v1/tasks/{name}", admin.remove_task),
        ("POST", "/v1/adapters", admin.put_adapter),
        ("DELETE", "/v1/adapters/{name}", admin.remove_adapter),
        ("POST", "/v1/catalog/changes", admin.change),
        ("POST", "/v1/catalog/current", admin.use_version),
        ("POST", "/v1/compositions", admin.compose),
        ("GET", "/v1/compositions", admin.compositions),
        ("GET", "/v1/compositions/{id}", admin.composition),
        ("POST", "/v1/compositions/{id}/cancel", admin.cancel_composition),
        ("POST", "/v1/load_lora_adapter", admin.load_adapter),
        ("POST", "/v1/unload_lora_adapter", admin.unload_adapter),
    ]


class _AdapterBody(BaseModel):
    """`POST /v1/adapters` as JSON: an adapter that the store has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str


class _VersionBody(BaseModel):
    """`POST /v1/catalog/current`: a version of the catalog that the store has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: str


class _Admin:
    def __init__(self, editor: Editor | None, settings: ApiSettings) -> None:
        self._editor = editor
        self._settings = settings
        self._uploads: Counter[str | None] = Counter()

    @asynccontextmanager
    async def put_task(self, request: Request) -> AsyncIterator[Change]:
        editor = self._open()
        raw = await read_json(request, self._settings.max_body_bytes)
        try:
            task = await asyncio.to_thread(lambda: _task(json.loads(raw)))  # a schema may take seconds
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the body is no JSON: {error}") from error
        yield Change(lambda caller: editor.put_task(caller, task), tasks=(task.name,))

    @asynccontextmanager
    async def remove_task(self, request: Request) -> AsyncIterator[Change]:
        editor, name = self._open(), request.path_params["name"]
        if not is_valid_name(name):
            raise TaskNotFound(name[:128])
        yield Change(lambda caller: editor.remove_task(caller, name), tasks=(name,))

    @asynccontextmanager
    async def put_adapter(self, request: Request) -> AsyncIterator[Change]:
        editor, kind = self._open(), content_type(request)
        if kind == FORM:
            with self._slot(request.state.caller.name):
                async with self._form(request) as form:
                    name, files = _adapter(form)
                    yield Change(lambda caller: editor.put_adapter(caller, name, files), adapters=(name,))
        elif kind == JSON:
            raw = await read_json(request, self._settings.max_body_bytes)
            known = _name(parse_body(_AdapterBody, raw).name)
            yield Change(lambda caller: editor.put_adapter(caller, known, None), adapters=(known,))
        else:
            raise HTTPException(
                415, f"send {FORM} (name, config, weights), or {JSON} with the name of an adapter in the store"
            )

    @asynccontextmanager
    async def remove_adapter(self, request: Request) -> AsyncIterator[Change]:
        editor, name = self._open(), _name(request.path_params["name"])
        yield Change(lambda caller: editor.remove_adapter(caller, name), adapters=(name,))

    @asynccontextmanager
    async def load_adapter(self, request: Request) -> AsyncIterator[Change]:
        editor = self._open()
        body = parse_body(LoadAdapterBody, await read_json(request, self._settings.max_body_bytes))
        name = _name(body.lora_name, "lora_name")
        if body.lora_path not in (None, body.lora_name):
            raise InvalidRequest(
                f"lora_path is not {body.lora_name!r}: adapters come from the service's own store, by their names; "
                "push it there, or upload it to /v1/adapters",
                param="lora_path",
            )
        yield Change(lambda caller: editor.put_adapter(caller, name, None), adapters=(name,))

    @asynccontextmanager
    async def unload_adapter(self, request: Request) -> AsyncIterator[Change]:
        editor = self._open()
        body = parse_body(UnloadAdapterBody, await read_json(request, self._settings.max_body_bytes))
        name = _name(body.lora_name, "lora_name")
        yield Change(lambda caller: editor.remove_adapter(caller, name), adapters=(name,))

    @asynccontextmanager
    async def use_version(self, request: Request) -> AsyncIterator[Change]:
        editor = self._open()
        body = parse_body(_VersionBody, await read_json(request, self._settings.max_body_bytes))
        if not is_valid_name(body.version):
            raise InvalidRequest("the version is none; see GET /v1/catalog/versions", param="version")
        yield Change(lambda _: editor.use_version(body.version), whole=True)

    @asynccontextmanager
    async def compose(self, request: Request) -> AsyncIterator[Change]:
        editor = self._open()
        task = parse_body(CompositionBody, await read_json(request, self._settings.max_body_bytes)).task
        if not is_valid_name(task):
            raise TaskNotFound(task[:128])
        try:
            adapter = composed_name(task)
        except ConfigError as error:
            raise InvalidRequest(str(error), param="task") from error
        yield Change(lambda caller: editor.compose(caller, task), adapters=(adapter,), tasks=(task,))

    @asynccontextmanager
    async def compositions(self, _: Request) -> AsyncIterator[Change]:
        yield Change(self._open().compositions)

    @asynccontextmanager
    async def composition(self, request: Request) -> AsyncIterator[Change]:
        editor, id = self._open(), request.path_params["id"]
        yield Change(lambda caller: editor.composition(caller, id))

    @asynccontextmanager
    async def cancel_composition(self, request: Request) -> AsyncIterator[Change]:
        editor, id = self._open(), request.path_params["id"]
        yield Change(lambda caller: editor.cancel_composition(caller, id))

    @asynccontextmanager
    async def change(self, request: Request) -> AsyncIterator[Change]:
        editor = self._open()
        raw = await read_json(request, max(_MAX_CHANGES_BYTES, self._settings.max_body_bytes))
        wanted = await asyncio.to_thread(changes.parse_changes, raw, task=_task, adapter=_name)
        tasks, adapters = (tuple(of.name for of in wanted if of.kind == kind) for kind in ("task", "adapter"))
        yield Change(lambda caller: editor.change(caller, wanted), adapters=adapters, tasks=tasks)

    def _open(self) -> Editor:
        """The editor, if there is something to edit."""
        if self._editor is None:
            raise HTTPException(409, "the examples are not changed; set `adapters` and `catalog` to stores of your own")
        return self._editor

    @contextmanager
    def _slot(self, key: str | None) -> Iterator[None]:
        """A place among the uploads that are taken at once. Raises Overloaded."""
        if self._uploads.total() >= _UPLOADS or self._uploads[key] >= _UPLOADS_A_KEY:
            raise Overloaded(
                f"too many uploads at once; at most {_UPLOADS} are taken, {_UPLOADS_A_KEY} of them with one key; "
                "try again",
                retry_after_s=5.0,
            )
        self._uploads[key] += 1
        try:
            yield
        finally:
            self._uploads[key] -= 1

    @asynccontextmanager
    async def _form(self, request: Request) -> AsyncIterator[FormData]:
        """An upload, whose large parts are files."""
        stream = limited(request, self._settings.max_adapter_bytes)
        parser = MultiPartParser(request.headers, stream, max_files=len(_PARTS), max_fields=1)
        try:
            async with asyncio.timeout(_UPLOAD_S):
                form = await parser.parse()
        except MultiPartException as error:
            raise InvalidRequest(f"the upload cannot be read: {error.message}") from error
        except TimeoutError as error:
            raise HTTPException(408, f"the upload did not end within {_UPLOAD_S:g} s; send it faster") from error
        except OSError as error:
            raise ServiceUnavailable(f"the upload cannot be kept: {error.strerror}") from error
        try:
            yield form
        finally:
            await form.close()


def _adapter(form: FormData) -> tuple[str, dict[str, NDArray[np.uint8]]]:
    """An uploaded adapter's name and files. Raises InvalidRequest."""
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
        files[file] = _mapped(upload.file)
    return _name(parts["name"]), files


def _mapped(file: BinaryIO) -> NDArray[np.uint8]:
    """A file's bytes, which stay on the disk until they are read."""
    descriptor = file.fileno()  # from here on a small one is on the disk too
    file.flush()
    if not file.seek(0, 2):
        return np.zeros(0, np.uint8)
    return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)


def _task(data: Any) -> Task:
    """A task of JSON. Raises TaskError, InvalidRequest (it is too large)."""
    task = Task.from_json(data, source="the task")
    if len(task.validation) > _MAX_EXAMPLES:
        raise InvalidRequest(
            f"got {len(task.validation)} validation examples; at most {_MAX_EXAMPLES} are taken, 20 do",
            param="validation",
        )
    return task


def _name(name: str, param: str = "name") -> str:
    """A name that an adapter may have. Raises InvalidRequest."""
    if not is_valid_name(name) or name.lower() in RESERVED:
        raise InvalidRequest(f"the name is not allowed; use {RULE}, and none of {sorted(RESERVED)}", param=param)
    return name
