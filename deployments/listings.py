"""What there is, listed over HTTP: models, tasks, adapters, deployments, the catalog's versions.

Each list comes in pages by `limit` and `after`, and of those who have names, by what they contain. A caller sees what
it may use. Knows HTTP and JSON; knows nothing of Ray.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from deployments.access import Caller
from deployments.bodies import Json
from deployments.calls import CatalogDescription, Residency
from deployments.generation import short
from deployments.openai_types import BASE_MODEL, ROUTED_MODEL
from deployments.scope import Permitted, is_hidden, visible, visible_tasks
from deployments.told import without_places
from lorauter.errors import AdapterNotFound, InvalidRequest, TaskNotFound
from lorauter.names import AdapterKey
from lorauter.uris import called

_MOST = 10_000  # rows of a page
_DETAILED = 1000  # the same, of what is looked up for each row
_VERSIONS = 100  # the same, of versions, which are read one by one
_EXAMPLES = 512  # of a task


class Listed(Protocol):
    """What lists need behind them. Every method raises LorauterError."""

    async def describe(self) -> CatalogDescription:
        """The tasks and adapters there are."""

    async def versions(self, names: Sequence[str]) -> Mapping[str, str]:
        """Which versions of adapters are served; without those that are not."""

    async def examples(
        self, names: Sequence[str], most: int, permitted: Permitted
    ) -> Mapping[str, list[dict[str, str]]]:
        """The first validation examples of tasks; without those that are not there, or not to be told a caller."""

    async def layout(self, permitted: Permitted, named: Sequence[str]) -> dict[str, Any]:
        """The tasks in two dimensions, of those that a caller may see."""

    async def residency(self, keys: Sequence[AdapterKey]) -> Sequence[Residency]:
        """Where versions of adapters are, and how much they were wanted."""

    async def deployments(self) -> list[dict[str, Any]]:
        """The service's parts."""

    async def history(self, limit: int, after: str | None) -> dict[str, Any]:
        """The catalog's versions in the store."""


class Listings:
    """The endpoints.

    Args:
        service: knows what there is.
        context: tokens that a prompt and its answer can take together.
        base_model: the base model's name.
    """

    def __init__(self, service: Listed, context: int, base_model: str) -> None:
        self._service = service
        self._context = context
        self._base_model = called(base_model)  # a folder's place is nobody's business
        self._started = int(time.time())

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        catalog = await self._service.describe()
        permitted = filter(request.state.caller.permits, catalog.adapters)
        rows = [self._model_row(name) for name in (ROUTED_MODEL, BASE_MODEL, *permitted)]
        return Json(_page(rows, request))

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        name = request.path_params["model"]
        if name not in (ROUTED_MODEL, BASE_MODEL) and not (
            request.state.caller.permits(name) and await self._service.versions([name])
        ):
            raise AdapterNotFound("no such model; see GET /v1/models", adapter=short(name))
        return Json(self._model_row(name))

    def _model_row(self, name: str) -> dict[str, Any]:
        served = {ROUTED_MODEL: (BASE_MODEL, None), BASE_MODEL: (self._base_model, None)}
        root, parent = served.get(name, (name, BASE_MODEL))
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "lorauter",
            "root": root,
            "parent": parent,
            "max_model_len": self._context,
        }

    async def tasks(self, request: Request) -> Response:
        """`GET /v1/tasks`."""
        catalog, caller = await self._service.describe(), request.state.caller
        refused = {}
        if catalog.refused and (caller.audience == "operator" or caller.key is None):
            version, reason = catalog.refused
            reason = reason if caller.audience == "operator" else without_places(reason)
            refused = {"refused": {"version": version, "reason": reason}}
        page = _page(visible_tasks(catalog.tasks, caller.permitted), request)
        if wanted := _number(request, "examples", _EXAMPLES, 0):
            page["data"] = await self._with_examples(page["data"], wanted, caller)
        return Json(visible({"catalog_version": catalog.version, **refused, **page}, caller.permitted))

    async def task(self, request: Request) -> Response:
        """`GET /v1/tasks/{name}`."""
        name, caller = request.path_params["name"], request.state.caller
        catalog = await self._service.describe()
        found = [task for task in visible_tasks(catalog.tasks, caller.permitted) if task["id"] == name]
        if not found:
            raise TaskNotFound(short(name))
        return Json((await self._with_examples(found, _EXAMPLES, caller))[0])

    async def _with_examples(self, rows: Sequence[dict[str, Any]], most: int, caller: Caller) -> list[dict[str, Any]]:
        examples = await self._service.examples([row["id"] for row in rows], most, caller.permitted)
        return [{**row, "examples": examples.get(row["id"], [])} for row in rows]

    async def adapters(self, request: Request) -> Response:
        """`GET /v1/adapters`."""
        catalog, caller = await self._service.describe(), request.state.caller
        names = [{"id": name, "object": "adapter"} for name in catalog.adapters if caller.permits(name)]
        page = _page(names, request, most=_DETAILED)
        rows = {row["id"]: row for row in page["data"]}
        versions = await self._service.versions(list(rows))
        keys = [AdapterKey(name, versions[name]) for name in rows if name in versions]
        found = dict(zip(keys, await self._service.residency(keys), strict=True))
        for key, (tiers, demand) in found.items():
            rows[key.name] |= {"version": key.version, "resident": tiers, "demand": round(demand, 3), "tasks": []}
        for task in catalog.tasks:
            if not is_hidden(_names(task), caller.permitted):
                for adapter in task.get("adapters", ()):
                    if adapter["name"] in rows and "tasks" in rows[adapter["name"]]:
                        rows[adapter["name"]]["tasks"].append({"id": task["id"], "score": adapter["score"]})
        page["data"] = [row for row in rows.values() if "tasks" in row]  # the others went meanwhile
        return Json(page)

    async def map(self, request: Request) -> Response:
        """`GET /v1/map`."""
        permitted = request.state.caller.permitted
        shown = await self._service.layout(permitted, request.query_params.getlist("task"))
        return Json(visible(shown, permitted))

    async def access(self, request: Request) -> Response:
        """`GET /v1/access`: what the caller's own key is for."""
        caller: Caller = request.state.caller
        key = caller.key
        return Json(
            {
                "object": "access",
                "name": caller.name,
                "roles": sorted(key.roles) if key else ["inference"],
                "adapters": None if caller.permitted is None else list(caller.permitted),
                "requests_per_minute": key.requests_per_minute if key else None,
                "tokens_per_minute": key.tokens_per_minute if key else None,
            }
        )

    async def deployments(self, _: Request) -> Response:
        """`GET /v1/deployments`."""
        return Json({"object": "list", "data": await self._service.deployments()})

    async def versions(self, request: Request) -> Response:
        """`GET /v1/catalog/versions`."""
        limit = _number(request, "limit", _VERSIONS, _VERSIONS, least=1)
        return Json(await self._service.history(limit, request.query_params.get("after")))


def _names(task: Mapping[str, Any]) -> Iterable[str]:
    return (adapter["name"] for adapter in task.get("adapters", ()))


def _number(request: Request, name: str, most: int, otherwise: int, *, least: int = 0) -> int:
    """A number that a query gives. Raises InvalidRequest."""
    given = request.query_params.get(name)
    if given is None:
        return otherwise
    if not (given.isascii() and given.isdigit() and len(given) < 10 and least <= int(given) <= most):
        raise InvalidRequest(f"got the {name} {given[:40]!r}, needed a number from {least} to {most}", param=name)
    return int(given)


def _page(rows: list[dict[str, Any]], request: Request, *, most: int | None = None) -> dict[str, Any]:
    """Rows as a list: those whose ids contain what `search` says, and of these the part that `limit` and `after` (an
    id) ask for. Raises InvalidRequest.

    Args:
        most: rows that come where no limit is given; None is all.
    """
    limit = _number(request, "limit", most or _MOST, most or max(len(rows), 1), least=1)
    search, after = request.query_params.get("search", "").lower(), request.query_params.get("after")
    rows = [row for row in rows if search in row["id"].lower()]
    start = 0
    if after is not None:
        start = 1 + next((place for place, row in enumerate(rows) if row["id"] == after), len(rows))
        if start > len(rows):
            raise InvalidRequest("after is no id of this list", param="after")
    end = min(start + limit, len(rows))
    data = rows[start:end]
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ids, "has_more": end < len(rows), "total": len(rows)}
