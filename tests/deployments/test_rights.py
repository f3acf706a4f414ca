"""Who may do what: each cell of the table in docs/access.md, and what a key that is limited to adapters may change."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_service import CHAT, COMPLETIONS, ROUTE, FakeService, chat, refused, text, transport

from deployments.access import Access, Caller
from deployments.admin import admin_endpoints
from deployments.api import build_api
from deployments.calls import CatalogDescription
from deployments.changes import Change
from deployments.config import AccessSettings, ApiSettings
from deployments.rights import ROLES
from lorauter.keys import hash_key
from lorauter.tasks import Task

PAGE = Path(__file__).parents[2] / "docs" / "access.md"
KEYS = {
    "inference": {},
    "inference, limited": {"adapters": ["team-a-*"]},
    "admin": {"roles": ["admin"]},
    "admin, limited": {"roles": ["admin"], "adapters": ["team-a-*"]},
    "both": {"roles": ["admin", "inference"]},
}
TASKS = {
    "team-a-own": ["team-a-one"],
    "sums": ["team-a-one", "team-a-two"],
    "shared": ["team-a-one", "team-b-one"],
    "team-b-merger": ["team-b-one"],
    "team-b-plans": [],
    "team-a-plans": [],
}
ADAPTERS = ["team-a-one", "team-a-two", "team-b-one"]


class Service(FakeService):
    async def describe(self) -> CatalogDescription:
        tasks = [
            {"id": name, "object": "task", "adapters": [{"name": adapter, "score": None} for adapter in adapters]}
            for name, adapters in TASKS.items()
        ]
        return CatalogDescription("v1", tasks, ADAPTERS, ("v2", "catalog s3://company/secret: adapter 'team-b-one'"))

    async def versions(self, names: Any) -> dict[str, str]:
        return {name: "1" for name in names if name in ADAPTERS}


@dataclass
class Editor:
    done: list[tuple[str, str]] = field(default_factory=list)

    async def put_task(self, caller: Caller, task: Task) -> dict[str, Any]:
        self.done.append(("put task", task.name))
        return {}

    async def remove_task(self, caller: Caller, name: str) -> dict[str, Any]:
        self.done.append(("remove task", name))
        return {}

    async def put_adapter(self, caller: Caller, name: str, files: Mapping[str, Any] | None) -> dict[str, Any]:
        self.done.append(("put adapter", name))
        return {}

    async def remove_adapter(self, caller: Caller, name: str) -> dict[str, Any]:
        self.done.append(("remove adapter", name))
        return {}

    async def change(self, caller: Caller, wanted: Sequence[Change]) -> dict[str, Any]:
        self.done += [("change", change.name) for change in wanted]
        return {}

    async def use_version(self, version: str) -> dict[str, Any]:
        self.done.append(("use version", version))
        return {}

    async def compose(self, caller: Caller, task: str) -> dict[str, Any]:
        self.done.append(("compose", task))
        return {}

    async def compositions(self, caller: Caller) -> dict[str, Any]:
        return {}

    async def composition(self, caller: Caller, id: str) -> dict[str, Any]:
        return {}

    async def cancel_composition(self, caller: Caller, id: str) -> dict[str, Any]:
        return {}


def ask(key: str | None, method: str, path: str, editor: Editor | None = None, **content: Any) -> httpx.Response:
    """One request with one of KEYS; None is a service without any."""

    async def talk() -> httpx.Response:
        settings = ApiSettings()
        access = Access(AccessSettings(keys_env="KEYS") if key is not None else AccessSettings())
        app = build_api(Service(), settings, access, admin_endpoints(editor or Editor(), settings))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport(app), base_url="http://lorauter", headers=headers) as client:
            return await client.request(method, path, **content)

    return asyncio.run(talk())


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": re.sub(r"\W+", "-", name), "sha256": hash_key(name), **row} for name, row in KEYS.items()]
    monkeypatch.setenv("KEYS", json.dumps(rows))


def task(name: str) -> dict[str, Any]:
    return {"name": name, "domain": "x", "metric": "em", "validation": [{"input": "a", "target": "b"}]}


CHANGES = "/v1/catalog/changes"


def changes(*of: dict[str, Any]) -> dict[str, Any]:
    return {"changes": list(of)}


FILES = {"config": b"{}", "weights": b"0" * 2_000_000}

# What the page's rows ask for: requests about what is a limited key's own, and about what is not.
ROWS: dict[str, tuple[list[Any], list[Any]]] = {
    "ask, route, embed, tokenize": (
        [
            ("POST", CHAT, {"json": chat("team-a-one")}),
            ("POST", COMPLETIONS, {"json": text("team-a-one")}),
            ("POST", CHAT, {"json": chat("base")}),
            ("POST", CHAT, {"json": chat(lorauter={"adapters": {"team-a-one": 1}})}),
            ("POST", "/v1/responses", {"json": {"model": "team-a-one", "input": "hi"}}),
            ("POST", "/v1/messages", {"json": {**chat("team-a-one"), "max_tokens": 9}}),
            ("POST", "/v1/messages/count_tokens", {"json": chat("team-a-one")}),
            ("POST", ROUTE, {"json": {"input": "hi"}}),
            ("POST", "/v1/embeddings", {"json": {"model": "lorauter", "input": "hi"}}),
            ("POST", "/tokenize", {"json": {"prompt": "hi"}}),
            ("POST", "/detokenize", {"json": {"tokens": [104]}}),
        ],
        [
            ("POST", CHAT, {"json": chat("team-b-one")}),
            ("POST", COMPLETIONS, {"json": text("team-b-one")}),
            ("POST", "/v1/responses", {"json": {"model": "team-b-one", "input": "hi"}}),
            ("POST", "/v1/messages", {"json": {**chat("team-b-one"), "max_tokens": 9}}),
            ("POST", CHAT, {"json": chat(lorauter={"adapters": {"team-a-one": 1, "team-b-one": 0}})}),
        ],
    ),
    "see models, adapters, tasks, version, load": (
        [
            *[("GET", path, {}) for path in ("/v1/models", "/v1/models/team-a-one", "/v1/tasks", "/version", "/load")],
            *[("GET", path, {}) for path in ("/v1/tasks/shared", "/v1/adapters", "/v1/map", "/v1/access")],
        ],
        [("GET", "/v1/models/team-b-one", {}), ("GET", "/v1/tasks/team-b-merger", {})],
    ),
    "change adapters": (
        [
            ("POST", "/v1/adapters", {"json": {"name": "team-a-new"}}),
            ("POST", "/v1/adapters", {"data": {"name": "team-a-one"}, "files": FILES}),
            ("DELETE", "/v1/adapters/team-a-one", {}),
            ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "team-a-new", "lora_path": "team-a-new"}}),
            ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": "team-a-one"}}),
            ("POST", CHANGES, {"json": changes({"put_adapter": "team-a-new"}, {"remove_adapter": "team-a-one"})}),
        ],
        [
            ("POST", CHANGES, {"json": changes({"put_adapter": "team-a-new"}, {"put_adapter": "team-b-one"})}),
            ("POST", CHANGES, {"json": changes({"remove_adapter": "team-b-new"})}),
            ("POST", "/v1/adapters", {"json": {"name": "team-b-one"}}),
            ("POST", "/v1/adapters", {"data": {"name": "team-b-one"}, "files": FILES}),
            ("POST", "/v1/adapters", {"json": {"name": "team-b-new"}}),
            ("DELETE", "/v1/adapters/team-b-one", {}),
            ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "team-b-new"}}),
            ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": "team-b-one"}}),
        ],
    ),
    "change tasks": (
        [
            ("POST", "/v1/tasks", {"json": task("sums")}),
            ("POST", "/v1/tasks", {"json": task("team-a-new")}),
            ("POST", "/v1/tasks", {"json": task("team-a-plans")}),
            ("DELETE", "/v1/tasks/sums", {}),
            ("DELETE", "/v1/tasks/team-a-own", {}),
            ("POST", CHANGES, {"json": changes({"put_task": task("sums")}, {"remove_task": "team-a-own"})}),
        ],
        [
            ("POST", CHANGES, {"json": changes({"remove_task": "team-a-own"}, {"put_task": task("shared")})}),
            ("POST", CHANGES, {"json": changes({"put_adapter": "team-a-one"}, {"remove_task": "team-b-plans"})}),
            ("POST", "/v1/tasks", {"json": task("shared")}),
            ("POST", "/v1/tasks", {"json": task("team-b-merger")}),
            ("POST", "/v1/tasks", {"json": task("new")}),
            ("DELETE", "/v1/tasks/shared", {}),
            ("DELETE", "/v1/tasks/team-b-merger", {}),
            ("DELETE", "/v1/tasks/team-b-plans", {}),
        ],
    ),
    "have adapters composed": (
        [("POST", "/v1/compositions", {"json": {"task": "team-a-own"}})],
        [
            ("POST", "/v1/compositions", {"json": {"task": "sums"}}),  # sums.composed is not called as its adapters are
            ("POST", "/v1/compositions", {"json": {"task": "shared"}}),
            ("POST", "/v1/compositions", {"json": {"task": "team-b-merger"}}),
        ],
    ),
    "see and cancel compositions": (
        [
            ("GET", "/v1/compositions", {}),
            ("GET", "/v1/compositions/0f", {}),
            ("POST", "/v1/compositions/0f/cancel", {}),
        ],
        [],
    ),
    "change the catalog's version": ([], [("POST", "/v1/catalog/current", {"json": {"version": "v1"}})]),
    "read the catalog's versions": ([], [("GET", "/v1/catalog/versions", {})]),
    "read metrics, replicas": ([], [("GET", "/metrics", {}), ("GET", "/v1/deployments", {})]),
    "read causes": ([("GET", "/v1/tasks", {})], [("GET", "/v1/tasks", {})]),
    "/health, /openapi.json, /docs, the page": (
        [
            *[("GET", path, {}) for path in ("/healthz", "/health", "/ping", "/openapi.json", "/docs")],
            *[("GET", path, {}) for path in ("/", "/page/x/app.js")],
            ("POST", "/ping", {}),
        ],
        [],
    ),
}
COLUMNS = {"no keys": None, "no key": "", **{f"`{name}`": name for name in KEYS if name != "both"}}
COLUMNS = {name.replace(", limited`", "` with `adapters`"): key for name, key in COLUMNS.items()}


def table() -> dict[tuple[str, str], str]:
    """The page's cells by row and column."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(lines) if line.startswith("| who may |"))
    columns = [cell.strip() for cell in lines[start].strip("|").split("|")][1:]
    cells = {}
    for line in lines[start + 2 : start + 2 + len(ROWS)]:
        name, *row = [cell.strip() for cell in line.strip("|").split("|")]
        cells |= {(name, column): cell for column, cell in zip(columns, row, strict=True)}
    return cells


def test_the_table_is_whole() -> None:
    assert {row for row, _ in table()} == set(ROWS)
    assert {column for _, column in table()} == set(COLUMNS)
    asked = {
        (method, re.sub(r"(models|adapters|tasks|page|compositions)/.+", r"\1/", path))
        for own, others in ROWS.values()
        for method, path, _ in own + others
    }
    assert asked == {(method, re.sub(r"\{.*", "", path)) for method, path in ROLES}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_each_cell_of_the_table(row: str, column: str) -> None:
    cell, key = table()[row, column], COLUMNS[column]
    assert cell in ("all", "its own", "no")
    own, others = ROWS[row]
    for requests, allowed in ((own, cell != "no"), (others, cell == "all")):
        for method, path, content in requests:
            editor = Editor()
            response = ask(key, method, path, editor, **content)
            if row == "read causes":
                assert ("s3://company/secret" in response.text) == (cell == "all")
            elif allowed:
                assert response.status_code == 200, response.text
                assert bool(editor.done) == row.startswith(("change", "have"))
            else:
                assert response.status_code in ({"": [401]}.get(key or "", [403, 404]) if key is not None else [403])
                assert editor.done == []


def test_a_key_of_both_roles_may_do_what_each_may() -> None:
    for own, others in ROWS.values():
        for method, path, content in own + others:
            assert ask("both", method, path, **content).status_code == 200


LIMITED = "admin, limited"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/v1/adapters/{}", None),
        ("POST", "/v1/adapters", lambda name: {"json": {"name": name}}),
        ("POST", "/v1/adapters", lambda name: {"data": {"name": name}, "files": FILES}),
        ("DELETE", "/v1/tasks/{}", None),
        ("POST", "/v1/tasks", lambda name: {"json": task(name)}),
        ("POST", CHANGES, lambda name: {"json": changes({"put_adapter": name})}),
        ("POST", CHANGES, lambda name: {"json": changes({"remove_adapter": name})}),
        ("GET", "/v1/models/{}", None),
    ],
)
def test_what_is_anothers_is_as_what_is_not_there(method: str, path: str, body: Any) -> None:
    there = ["team-b-one"] if "/v1/tasks" not in path else ["shared", "team-b-merger", "team-b-plans"]
    told = {
        response.text.replace(name, "X")
        for name in [*there, "team-b-none"]
        for response in [ask(LIMITED, method, path.format(name), **(body(name) if body else {}))]
        if refused(response, response.status_code, response.json()["error"]["code"]) and response.status_code > 402
    }
    assert len(told) == 1


def test_a_refusal_says_what_may_be_changed() -> None:
    error = refused(ask(LIMITED, "DELETE", "/v1/adapters/team-b-one"), 403, "permission_denied")
    assert "adapters called team-a-* alone" in error["message"]
    error = refused(ask(LIMITED, "DELETE", "/v1/tasks/shared"), 403, "permission_denied")
    assert "every adapter that serves it" in error["message"]
    assert "team-b" not in error["message"]


def test_lists_show_a_limited_key_its_own() -> None:
    for key in (LIMITED, "inference, limited"):
        tasks = ask(key, "GET", "/v1/tasks").json()
        assert {row["id"] for row in tasks["data"]} == {"team-a-own", "sums", "shared"}
        assert "team-b" not in json.dumps(tasks)
        assert "refused" not in tasks
        models = ask(key, "GET", "/v1/models").json()["data"]
        assert [row["id"] for row in models] == ["lorauter", "base", "team-a-one", "team-a-two"]
