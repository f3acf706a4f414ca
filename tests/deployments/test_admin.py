"""The admin API in process, over an editor that is a few lines long."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import tracemalloc
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.access import Access, Caller
from deployments.admin import admin_endpoints
from deployments.api import build_api
from deployments.changes import MAX_CHANGES, Change
from deployments.config import AccessSettings, ApiSettings
from lorauter.errors import (
    AdapterNotFound,
    AdapterRejected,
    CatalogError,
    CompositionNotFound,
    Conflict,
    LorauterError,
    TaskNotFound,
)
from lorauter.keys import hash_key
from lorauter.tasks import Task

KEY = "an admin's key"
SECOND, THIRD = "another's key", "a third one's key"
ASKER = "a user's key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
TASK = {"name": "sums", "domain": "maths", "metric": "em", "validation": [{"input": "1 + 1", "target": "2"}]}
FILES = {"config": b"{}", "weights": b"\x00\xff" * 5}
ENDPOINTS = [
    ("POST", "/v1/tasks"),
    ("DELETE", "/v1/tasks/x"),
    ("POST", "/v1/adapters"),
    ("DELETE", "/v1/adapters/x"),
    ("POST", "/v1/catalog/changes"),
    ("POST", "/v1/catalog/current"),
    ("POST", "/v1/compositions"),
    ("GET", "/v1/compositions"),
    ("GET", "/v1/compositions/x"),
    ("POST", "/v1/compositions/x/cancel"),
]


@dataclass
class FakeEditor:
    """Says what it was asked to do."""

    error: LorauterError | None = None
    done: list[tuple[Any, ...]] = field(default_factory=list)

    async def _do(self, *what: Any) -> dict[str, Any]:
        if self.error:
            raise self.error
        self.done.append(what)
        return {"id": str(what[0]), "catalog_version": "v2"}

    async def put_task(self, caller: Caller, task: Task) -> dict[str, Any]:
        return await self._do("put_task", task)

    async def use_version(self, version: str) -> dict[str, Any]:
        return await self._do("use_version", version)

    async def remove_task(self, caller: Caller, name: str) -> dict[str, Any]:
        return await self._do("remove_task", name)

    async def put_adapter(self, caller: Caller, name: str, files: Mapping[str, Any] | None) -> dict[str, Any]:
        return await self._do("put_adapter", name, files and {key: of.tobytes() for key, of in files.items()})

    async def remove_adapter(self, caller: Caller, name: str) -> dict[str, Any]:
        return await self._do("remove_adapter", name)

    async def change(self, caller: Caller, wanted: Sequence[Change]) -> dict[str, Any]:
        return await self._do("change", *wanted)

    async def compose(self, caller: Caller, task: str) -> dict[str, Any]:
        return await self._do("compose", task)

    async def compositions(self, caller: Caller) -> dict[str, Any]:
        return await self._do("compositions")

    async def composition(self, caller: Caller, id: str) -> dict[str, Any]:
        return await self._do("composition", id)

    async def cancel_composition(self, caller: Caller, id: str) -> dict[str, Any]:
        return await self._do("cancel_composition", id)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"name": "operator", "sha256": hash_key(KEY), "roles": ["admin"]},
        {"name": "asker", "sha256": hash_key(ASKER)},
        {"name": "second", "sha256": hash_key(SECOND), "roles": ["admin"]},
        {"name": "third", "sha256": hash_key(THIRD), "roles": ["admin"]},
    ]
    monkeypatch.setenv("KEYS", json.dumps(rows))


def send(
    editor: FakeEditor | None,
    method: str,
    path: str,
    *,
    headers: Any = AUTHORIZED,
    access: Access | None = None,
    **content: Any,
) -> Any:
    async def talk() -> httpx.Response:
        settings = ApiSettings(max_body_bytes=2000, max_adapter_bytes=3000)
        app = build_api(
            object(), settings, access or Access(AccessSettings(keys_env="KEYS")), admin_endpoints(editor, settings)
        )  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://lorauter") as client:
            return await client.request(method, path, headers=headers, **content)

    return asyncio.run(talk())


def upload(editor: FakeEditor, name: str | None = "adder", **parts: bytes) -> Any:
    files = {part: (part, content) for part, content in parts.items()}
    return send(editor, "POST", "/v1/adapters", data={} if name is None else {"name": name}, files=files)


def message(response: Any) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_a_task_is_added_and_removed() -> None:
    editor = FakeEditor()
    added = send(editor, "POST", "/v1/tasks", json=TASK)
    assert (added.status_code, added.json()["catalog_version"]) == (200, "v2")
    assert send(editor, "DELETE", "/v1/tasks/sums").status_code == 200
    assert editor.done == [("put_task", Task.from_json(TASK, source="")), ("remove_task", "sums")]


def test_an_adapter_is_uploaded_named_and_removed() -> None:
    editor = FakeEditor()
    assert upload(editor, **FILES).status_code == 200
    assert send(editor, "POST", "/v1/adapters", json={"name": "poet"}).status_code == 200
    assert send(editor, "DELETE", "/v1/adapters/adder").status_code == 200
    files = {"adapter_config.json": FILES["config"], "adapter_model.safetensors": FILES["weights"]}
    assert editor.done == [("put_adapter", "adder", files), ("put_adapter", "poet", None), ("remove_adapter", "adder")]


def test_a_composition_is_asked_for_followed_and_cancelled() -> None:
    editor = FakeEditor()
    assert send(editor, "POST", "/v1/compositions", json={"task": "sums"}).status_code == 200
    assert send(editor, "GET", "/v1/compositions").status_code == 200
    assert send(editor, "GET", "/v1/compositions/0f").status_code == 200
    assert send(editor, "POST", "/v1/compositions/0f/cancel").status_code == 200
    assert editor.done == [("compose", "sums"), ("compositions",), ("composition", "0f"), ("cancel_composition", "0f")]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "task"),
        ({"task": 5}, 400, "task"),
        ({"task": "sums", "to": "s3://elsewhere"}, 400, "to"),
        ({"task": "../sums"}, 404, "no such task"),
        ({"task": "x" * 125}, 400, "give task"),
    ],
)
def test_a_wrong_composition_is_refused(body: dict[str, Any], status: int, said: str) -> None:
    editor = FakeEditor()
    response = send(editor, "POST", "/v1/compositions", json=body)
    assert response.status_code == status
    assert said in message(response)
    assert editor.done == []


def test_a_composition_that_is_not_there_is_told() -> None:
    response = send(FakeEditor(CompositionNotFound("0f")), "GET", "/v1/compositions/0f")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "composition_not_found")


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": "Bearer \xff".encode("latin-1")},
        {"Authorization": f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}"},
    ],
)
def test_who_has_no_key_changes_nothing(method: str, path: str, headers: Any) -> None:
    editor = FakeEditor()
    response = send(editor, method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in message(response)
    assert editor.done == []


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_without_configured_keys_nobody_may_and_is_told_how(method: str, path: str) -> None:
    editor = FakeEditor()
    response = send(editor, method, path, access=Access(AccessSettings()))
    assert response.status_code == 403
    assert "no keys are configured" in message(response)
    assert editor.done == []


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_a_key_for_inference_changes_nothing(method: str, path: str) -> None:
    editor = FakeEditor()
    response = send(editor, method, path, headers={"Authorization": f"Bearer {ASKER}"})
    assert response.status_code == 403
    assert "'asker'" in message(response)
    assert editor.done == []


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_the_examples_are_not_changed(method: str, path: str) -> None:
    response = send(None, method, path)
    assert response.status_code == 409
    assert "stores of your own" in message(response)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "no JSON"),
        (b"[]", "a task is a JSON object"),
        (b"[" * 900, "no JSON"),
        (b'{"name": "x"}', "missing domain, metric, validation"),
        (b'{"name": "../x", "domain": "", "metric": "em", "validation": []}', "not allowed"),
        (b'{"name": "x", "domain": "", "metric": "em", "validation": []}', "validation is empty"),
    ],
)
def test_a_wrong_task_is_refused(body: bytes, said: str) -> None:
    headers = {**AUTHORIZED, "Content-Type": "application/json"}
    response = send(FakeEditor(), "POST", "/v1/tasks", headers=headers, content=body)
    assert response.status_code == 400
    assert said in message(response)


def test_a_task_of_too_many_examples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.admin._MAX_EXAMPLES", 1)
    response = send(FakeEditor(), "POST", "/v1/tasks", json={**TASK, "validation": TASK["validation"] * 2})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "validation")


@pytest.mark.parametrize("name", ["../etc", "a b", "", "base", "Lorauter", "x" * 200])
def test_a_wrong_name_is_refused(name: str) -> None:
    editor = FakeEditor()
    assert upload(editor, name, **FILES).status_code == 400
    assert send(editor, "POST", "/v1/adapters", json={"name": name}).status_code == 400
    assert editor.done == []


@pytest.mark.parametrize("name", ["x" * 10_000, "a%0Ab", "%2e%2e"])
def test_a_name_that_no_task_can_have_is_not_found(name: str) -> None:
    editor = FakeEditor()
    response = send(editor, "DELETE", f"/v1/tasks/{name}")
    assert response.status_code == 404
    assert len(message(response)) < 300
    assert editor.done == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (None, FILES),
        ("adder", {"config": b"{}"}),
        ("adder", {**FILES, "code": b"import os"}),
        ("adder", {"config": b"{}", "weight": b""}),
        ("adder", {}),
    ],
)
def test_an_upload_of_other_parts_is_refused(name: str | None, parts: dict[str, bytes]) -> None:
    editor = FakeEditor()
    response = upload(editor, name, **parts)
    assert response.status_code in (400, 415)
    assert editor.done == []


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "multipart/form-data", 400),
        (b"nonsense", "multipart/form-data; boundary=x", 400),
        (b"{}", "text/plain", 415),
        (b"{}", "", 415),
        (b"{}", "application/json", 400),
        (b'{"name": "x", "source": "file:///etc"}', "application/json", 400),
        (b'{"name": 5}', "application/json", 400),
    ],
)
def test_what_is_no_upload_is_refused(content: bytes, kind: str, status: int) -> None:
    headers = {**AUTHORIZED, "Content-Type": kind}
    assert send(FakeEditor(), "POST", "/v1/adapters", headers=headers, content=content).status_code == status


def test_a_part_that_is_no_file_is_refused() -> None:
    data = {"name": "adder", "config": "{}"}
    response = send(FakeEditor(), "POST", "/v1/adapters", data=data, files={"weights": ("w", b"1")})
    assert response.status_code == 400


def test_bodies_have_their_limits() -> None:
    editor = FakeEditor()
    assert upload(editor, config=b"{}", weights=b"0" * 4000).status_code == 413
    assert upload(editor, config=b"{}", weights=b"0" * 2100).status_code == 200
    assert send(editor, "POST", "/v1/tasks", json={**TASK, "domain": "x" * 2000}).status_code == 413
    assert send(editor, "POST", "/v1/adapters", json={"name": "x" * 2000}).status_code == 413


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TaskNotFound("sums"), 404),
        (AdapterNotFound("not there", adapter="adder"), 404),
        (AdapterRejected("has rank 1000", adapter="adder"), 422),
        (CatalogError("is damaged", uri="s3://b/c"), 503),
    ],
)
def test_what_the_editor_refuses_has_its_status(error: LorauterError, status: int) -> None:
    response = send(FakeEditor(error), "DELETE", "/v1/tasks/sums")
    assert (response.status_code, message(response)) == (status, str(error))


def talk_to(editor: Any, work: Any, **settings: Any) -> Any:
    """`work(client)` with a client that may change what is served; `settings` are the API's."""

    async def talk() -> Any:
        api = ApiSettings(**settings)
        app = build_api(object(), api, Access(AccessSettings(keys_env="KEYS")), admin_endpoints(editor, api))  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://lorauter", headers=AUTHORIZED) as client:
            return await work(client)

    return asyncio.run(talk())


def test_few_uploads_are_taken_at_once_and_the_others_told_to_come_again() -> None:
    class Slow(FakeEditor):
        async def put_adapter(self, caller: Caller, name: str, files: Mapping[str, Any] | None) -> dict[str, Any]:
            await asyncio.sleep(0.5)
            return await super().put_adapter(caller, name, None)

    async def send_all(client: httpx.AsyncClient) -> list[httpx.Response]:
        def send_one(key: str, i: int) -> Any:
            headers = {"Authorization": f"Bearer {key}"}
            return client.post("/v1/adapters", data={"name": f"a-{i}"}, files=FILES, headers=headers)

        first = await asyncio.gather(*[send_one(key, i) for i in range(4) for key in (KEY, SECOND, THIRD)])
        return [*first, await send_one(KEY, 9)]

    editor = Slow()
    *answers, last = talk_to(editor, send_all)
    assert last.status_code == 200
    for i, most in ((0, 2), (1, 2), (2, 2)):
        assert [answer.status_code for answer in answers[i::3]].count(200) <= most
    assert [answer.status_code for answer in answers].count(200) == 4
    for answer in answers:
        if answer.status_code != 200:
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
            assert "at most 4 are taken, 2 of them with one key" in message(answer)
    assert len(editor.done) == 5


def test_an_upload_is_on_the_disk_and_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    chunk, chunks = b"x" * (1 << 20), 64
    seen: list[tuple[int, int, int]] = []

    class Checks(FakeEditor):
        async def put_adapter(self, caller: Caller, name: str, files: Mapping[str, Any] | None) -> dict[str, Any]:
            assert files is not None
            weights = files["adapter_model.safetensors"]
            seen.append((weights.nbytes, int(weights[-1]), tracemalloc.get_traced_memory()[1]))
            return {}

    async def body() -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="name"\r\n\r\nbig\r\n'
        for part in ("config", "weights"):
            yield f'--B\r\nContent-Disposition: form-data; name="{part}"; filename="f"\r\n\r\n'.encode()
            for _ in range(chunks if part == "weights" else 1):
                yield chunk
            yield b"\r\n"
        yield b"--B--\r\n"

    async def upload_big(client: httpx.AsyncClient) -> httpx.Response:
        headers = {"Content-Type": "multipart/form-data; boundary=B"}
        return await client.post("/v1/adapters", content=body(), headers=headers)

    tracemalloc.start()
    try:
        response = talk_to(Checks(), upload_big)
    finally:
        tracemalloc.stop()
    assert response.status_code == 200, response.text
    [(size, last, peak)] = seen
    assert (size, last) == (chunks << 20, ord("x"))
    assert peak < 16 << 20
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_does_not_end_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.admin._UPLOAD_S", 0.1)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"--B\r\n"
        await asyncio.sleep(0.5)
        yield b"--B--\r\n"

    async def stall_often(client: httpx.AsyncClient) -> set[int]:
        headers = {"Content-Type": "multipart/form-data; boundary=B"}
        return {(await client.post("/v1/adapters", content=stalled(), headers=headers)).status_code for _ in range(3)}

    assert talk_to(FakeEditor(), stall_often) == {408}


def test_where_the_disk_is_full_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("starlette.datastructures.UploadFile.write", full)
    response = upload(FakeEditor(), config=b"{}", weights=b"0" * 100)
    assert (response.status_code, message(response)) == (503, "the upload cannot be kept: No space left on device")


def test_many_changes_are_made_at_once() -> None:
    editor = FakeEditor()
    changes = [{"put_task": TASK}, {"remove_task": "poems"}, {"put_adapter": "poet"}, {"remove_adapter": "adder"}]
    response = send(editor, "POST", "/v1/catalog/changes", json={"changes": changes})
    assert (response.status_code, response.json()["catalog_version"]) == (200, "v2")
    assert editor.done == [
        (
            "change",
            Change("task", "sums", task=Task.from_json(TASK, source="")),
            Change("task", "poems", remove=True),
            Change("adapter", "poet"),
            Change("adapter", "adder", remove=True),
        )
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "send"),
        ({}, "send"),
        ({"changes": []}, "1 to 1000"),
        ({"changes": [{"put_adapter": f"a{i}"} for i in range(MAX_CHANGES + 1)]}, "1 to 1000"),
        ({"changes": [{"put_adapter": "a"}], "more": 1}, "send"),
        ({"changes": [{"put_adapter": "a"}, "remove"]}, "change 1: got"),
        ({"changes": [{"put_adapter": "a", "remove_adapter": "b"}]}, "change 0: got"),
        ({"changes": [{"put_adapter": 7}]}, "change 0: got"),
        ({"changes": [{"rename_adapter": "a"}]}, "a change is one of"),
        ({"changes": [{}]}, "change 0"),
        ({"changes": [{"put_adapter": "../x"}]}, "name is not allowed"),
        ({"changes": [{"remove_adapter": "base"}]}, "name is not allowed"),
        ({"changes": [{"put_task": {"name": "sums"}}]}, "validation"),
        ({"changes": [{"put_adapter": "a"}, {"remove_adapter": "a"}]}, "adapter 'a' is changed twice"),
        ({"changes": [{"put_task": TASK}, {"remove_task": "sums"}]}, "task 'sums' is changed twice"),
    ],
)
def test_a_list_of_changes_that_is_wrong_changes_nothing(body: Any, said: str) -> None:
    editor = FakeEditor()
    response = send(editor, "POST", "/v1/catalog/changes", json=body)
    assert response.status_code == 400
    assert said in message(response)
    assert editor.done == []


def test_a_conflict_is_told() -> None:
    response = send(FakeEditor(Conflict("theirs stays")), "DELETE", "/v1/tasks/sums")
    assert (response.status_code, message(response)) == (409, "theirs stays")
    assert response.json()["error"]["code"] == "conflict"
