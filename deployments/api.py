"""The HTTP API: OpenAI's endpoints, routing, and errors in OpenAI's shape, over a service that does the work.

Knows HTTP and JSON; knows nothing of Ray. `Service` is what `deployments.router.Router` implements.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

import lorauter
from deployments import observe
from deployments.access import Access, Caller, Visit
from deployments.admin import ReadChange
from deployments.anthropic_answers import MessagesShape, error_body, speaks_anthropic
from deployments.anthropic_types import MessagesBody
from deployments.bodies import read_json
from deployments.calls import CatalogDescription
from deployments.config import AccessSettings, ApiSettings
from deployments.generation import Generating, Generation, short
from deployments.openai_answers import CHAT, FUNCTIONS, TEXT, error_answer
from deployments.openai_types import BASE_MODEL, ROUTED_MODEL, ChatBody, CompletionBody
from deployments.openapi import document, page
from deployments.options import parse_body
from deployments.responses_answers import ResponsesShape
from deployments.responses_types import ResponsesBody
from deployments.rights import HEALTH, ROLES, check_change
from deployments.scope import visible, visible_tasks
from deployments.texts import Texts, TextService
from deployments.told import without_places
from lorauter.defaults import DEFAULT
from lorauter.engine.config import EngineConfig
from lorauter.errors import (
    AdapterNotFound,
    InvalidRequest,
    LorauterError,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
)


class Service(Generating, TextService, Protocol):
    """What the API needs behind it. Every method raises LorauterError."""

    async def describe(self) -> CatalogDescription:
        """The tasks and adapters there are."""

    async def metrics(self) -> str:
        """Metrics, as Prometheus reads them."""

    async def check_ready(self) -> None:
        """Raise if the parts of the service do not fit together."""


Body = TypeVar("Body", bound=BaseModel)
_PROMETHEUS = "text/plain; version=0.0.4"
_PAGE = 10_000  # rows of a list
_WORTH_GZIP, _GZIP_LEVEL = 1024, 4  # bytes of an answer; streams are never compressed
Endpoint = Callable[[Request], Awaitable[Response]]


def build_api(
    service: Service,
    settings: ApiSettings,
    access: Access | None = None,
    admin: Sequence[tuple[str, str, ReadChange]] = (),
    *,
    max_model_len: int = EngineConfig().max_model_len,
    base_model: str = DEFAULT,
) -> Starlette:
    """The ASGI application over a service.

    Args:
        service: does the work.
        settings: the API's.
        access: who may use it; everybody, if it is left out.
        admin: the admin API's endpoints.
        max_model_len: tokens that a prompt and its answer can take together.
        base_model: the base model's name.
    """
    access = access or Access(AccessSettings())
    api = _Api(service, settings, max_model_len, base_model)
    texts = Texts(service, settings, max_model_len)

    def route(method: str, path: str, endpoint: Endpoint, *, reserves: bool = False) -> Route:
        """A route for callers with one of the endpoint's roles; an endpoint that reserves tokens counts its requests
        with them, but for those that fail before."""
        roles = ROLES[method, path]

        async def guarded(request: Request) -> Response:
            observe.current().endpoint = path
            if not roles:
                return await endpoint(request)
            visit = access.require(request, *roles)
            request.state.caller = visit.caller
            if not reserves:
                await visit.count()
            try:
                response = await endpoint(request)
            except Exception:
                await visit.count()
                raise
            response.headers.update(visit.headers)
            return response

        return Route(path, guarded, methods=[method])

    def change(method: str, path: str, read: ReadChange) -> Route:
        """The same for an endpoint that changes something, which takes the right to just that."""

        async def changed(request: Request) -> Response:
            async with read(request) as wanted:
                await check_change(request.state.caller, wanted, service)
                return JSONResponse(visible(await wanted.make(request.state.caller), request.state.caller.permitted))

        return route(method, path, changed)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.check_ready()
        yield

    handlers: Any = {LorauterError: _known, HTTPException: _http, ClientDisconnect: _left, Exception: _known}
    return Starlette(
        routes=[
            route("POST", "/v1/chat/completions", api.chat, reserves=True),
            route("POST", "/v1/completions", api.completion, reserves=True),
            route("POST", "/v1/responses", api.responses, reserves=True),
            route("POST", "/v1/messages", api.messages, reserves=True),
            route("POST", "/v1/messages/count_tokens", texts.count_tokens),
            route("POST", "/v1/route", texts.route, reserves=True),
            route("POST", "/v1/embeddings", texts.embeddings, reserves=True),
            route("POST", "/tokenize", texts.tokenize),
            route("POST", "/detokenize", texts.detokenize),
            route("GET", "/v1/models", api.models),
            route("GET", "/v1/models/{model}", api.model),
            route("GET", "/v1/tasks", api.tasks),
            *[route(method, path, api.health) for method, path in HEALTH],
            route("GET", "/version", api.version),
            route("GET", "/load", api.load),
            route("GET", "/metrics", api.metrics),
            route("GET", "/openapi.json", api.openapi),
            route("GET", "/docs", api.docs),
            *[change(method, path, read) for method, path, read in admin],
        ],
        exception_handlers=handlers,
        middleware=[Middleware(GZipMiddleware, minimum_size=_WORTH_GZIP, compresslevel=_GZIP_LEVEL), *_cors(access)],
        lifespan=lifespan,
    )


def _cors(access: Access) -> list[Middleware]:
    """What lets pages of other sites use the service, if some may."""
    if not access.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(access.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    ]


class _Api:
    def __init__(self, service: Service, settings: ApiSettings, context: int, base_model: str) -> None:
        self._service = service
        self._settings = settings
        self._context = context
        self._base_model = base_model.rstrip("/").rsplit("/", 1)[-1]  # a folder's place is nobody's business
        self._started = int(time.time())
        self._generation = Generation(service, settings, context, base_model)

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, ChatBody)
        return await self._generation.answer(request, body, FUNCTIONS if body.functions else CHAT)

    async def completion(self, request: Request) -> Response:
        return await self._generation.answer(request, await self._body(request, CompletionBody), TEXT)

    async def responses(self, request: Request) -> Response:
        body = await self._body(request, ResponsesBody)
        return await self._generation.answer(request, body.chat(), ResponsesShape(body))

    async def messages(self, request: Request) -> Response:
        body = await self._body(request, MessagesBody)
        return await self._generation.answer(request, body.chat(), MessagesShape())

    async def models(self, request: Request) -> Response:
        catalog = await self._service.describe()
        permitted = filter(request.state.caller.permits, catalog.adapters)
        rows = [self._model_row(name) for name in (ROUTED_MODEL, BASE_MODEL, *permitted)]
        return JSONResponse(_page(rows, request))

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in (ROUTED_MODEL, BASE_MODEL) and not (
            request.state.caller.permits(name) and await self._service.versions([name])
        ):
            raise AdapterNotFound("no such model; see GET /v1/models", adapter=short(name))
        return JSONResponse(self._model_row(name))

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
        catalog, caller = await self._service.describe(), request.state.caller
        refused = {}
        if catalog.refused and (caller.audience == "operator" or caller.key is None):
            version, reason = catalog.refused
            reason = reason if caller.audience == "operator" else without_places(reason)
            refused = {"refused": {"version": version, "reason": reason}}
        tasks = visible_tasks(catalog.tasks, caller.permitted)
        told = {"object": "list", "catalog_version": catalog.version, **refused, "data": tasks}
        return JSONResponse(visible(told, caller.permitted))

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": lorauter.__version__})

    async def load(self, _: Request) -> Response:
        return JSONResponse({"server_load": self._generation.running})

    async def metrics(self, request: Request) -> Response:
        caller: Caller = request.state.caller
        if caller.key is not None and caller.audience != "operator":
            raise PermissionDenied(
                f"the key {caller.name!r} has not the role 'admin' over all adapters, of which this tells"
            )
        return Response(await self._service.metrics(), media_type=_PROMETHEUS)

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document())

    async def docs(self, _: Request) -> Response:
        return HTMLResponse(page())

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        """The request's body, validated."""
        return parse_body(kind, await read_json(request, self._settings.max_body_bytes))


def _page(rows: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    """Rows as a list, or the part of it that `limit` and `after` (an id) ask for. Raises InvalidRequest."""
    given, after = request.query_params.get("limit"), request.query_params.get("after")
    if given is not None and not (given.isascii() and given.isdigit() and 1 <= int(given[:9]) <= _PAGE):
        raise InvalidRequest(f"got the limit {given[:40]!r}, needed a number from 1 to {_PAGE}", param="limit")
    start = 0
    if after is not None:
        start = 1 + next((place for place, row in enumerate(rows) if row["id"] == after), len(rows))
        if start > len(rows):
            raise InvalidRequest("after is no id of this list", param="after")
    end = len(rows) if given is None else min(start + int(given), len(rows))
    data = rows[start:end]
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ids, "has_more": end < len(rows)}


async def _known(request: Request, error: Exception) -> Response:
    caller: Caller = getattr(request.state, "caller", Caller())
    status, body = error_answer(error, caller.audience)
    visit: Visit | None = getattr(request.state, "visit", None)
    headers = dict(visit.headers) if visit is not None else {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return _error(request, status, body, headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return _error(request, error.status_code, {"error": body}, error.headers)


def _error(request: Request, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None) -> Response:
    """An error in the shape of the API that the request is of."""
    return JSONResponse(error_body(status, body) if speaks_anthropic(request.url.path) else body, status, headers)


async def _left(_: Request, __: Exception) -> Response:
    """Nobody reads it; what is raised beyond this, Serve logs as a failure."""
    return Response(status_code=observe.LEFT)
