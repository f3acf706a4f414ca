"""The HTTP API: OpenAI's endpoints, routing, and errors in OpenAI's shape, over a service that does the work.

Knows HTTP and JSON; knows nothing of Ray. `Service` is what `deployments.router.Router` implements.
"""

from __future__ import annotations

import math
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
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import lorauter
from deployments import observe
from deployments.access import Access, Caller, Visit
from deployments.admin import ReadChange
from deployments.anthropic_answers import MessagesShape, error_body, speaks_anthropic
from deployments.anthropic_types import MessagesBody
from deployments.bodies import Json, read_json
from deployments.config import AccessSettings, ApiSettings
from deployments.generation import Generating, Generation
from deployments.listings import Listed, Listings
from deployments.openai_answers import CHAT, FUNCTIONS, TEXT, error_answer, error_object
from deployments.openai_types import ChatBody, CompletionBody
from deployments.openapi import document, page
from deployments.options import parse_body
from deployments.responses_answers import ResponsesShape
from deployments.responses_types import ResponsesBody
from deployments.rights import HEALTH, ROLES, check_change, check_reading
from deployments.scope import visible
from deployments.texts import Texts, TextService
from deployments.web import asset, index_of
from lorauter.defaults import DEFAULT
from lorauter.engine.config import EngineConfig
from lorauter.errors import (
    LorauterError,
    Overloaded,
    Unauthenticated,
)


class Service(Generating, TextService, Listed, Protocol):
    """What the API needs behind it. Every method raises LorauterError."""

    async def metrics(self) -> str:
        """Metrics, as Prometheus reads them."""

    async def check_ready(self) -> None:
        """Raise if the parts of the service do not fit together."""


Body = TypeVar("Body", bound=BaseModel)
_PROMETHEUS = "text/plain; version=0.0.4"
_GZIP = [Middleware(GZipMiddleware, minimum_size=1024, compresslevel=4)]
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
    listings = Listings(service, max_model_len, base_model)

    def route(method: str, path: str, endpoint: Endpoint, *, reserves: bool = False, compressed: bool = True) -> Route:
        """A route for callers with one of the endpoint's roles; an endpoint that reserves tokens counts its requests
        with them, but for those that fail before. Answers of a model are short or streams, and never compressed."""
        roles = ROLES[method, path]

        async def guarded(request: Request) -> Response:
            observe.current().endpoint = path
            if not roles:
                return await endpoint(request)
            visit = access.require(request, *roles)
            request.state.caller = visit.caller
            check_reading(visit.caller, method, path)
            if not reserves:
                await visit.count()
            try:
                response = await endpoint(request)
            except Exception:
                await visit.count()
                raise
            if limits := visit.headers:
                response.headers.update(limits)
            return response

        return Route(path, _Answered(guarded), methods=[method], middleware=_GZIP if compressed else [])

    def change(method: str, path: str, read: ReadChange) -> Route:
        """The same for an endpoint that changes something, which takes the right to just that."""

        async def changed(request: Request) -> Response:
            async with read(request) as wanted:
                await check_change(request.state.caller, wanted, service)
                return Json(visible(await wanted.make(request.state.caller), request.state.caller.permitted))

        return route(method, path, changed)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.check_ready()
        yield

    return _App(
        routes=[
            route("POST", "/v1/chat/completions", api.chat, reserves=True, compressed=False),
            route("POST", "/v1/completions", api.completion, reserves=True, compressed=False),
            route("POST", "/v1/responses", api.responses, reserves=True, compressed=False),
            route("POST", "/v1/messages", api.messages, reserves=True, compressed=False),
            route("POST", "/v1/messages/count_tokens", texts.count_tokens),
            route("POST", "/v1/route", texts.route, reserves=True),
            route("POST", "/v1/embeddings", texts.embeddings, reserves=True),
            route("POST", "/tokenize", texts.tokenize),
            route("POST", "/detokenize", texts.detokenize),
            route("GET", "/v1/models", listings.models),
            route("GET", "/v1/models/{model}", listings.model),
            route("GET", "/v1/tasks", listings.tasks),
            route("GET", "/v1/tasks/{name}", listings.task),
            route("GET", "/v1/adapters", listings.adapters),
            route("GET", "/v1/map", listings.map),
            route("GET", "/v1/deployments", listings.deployments),
            route("GET", "/v1/access", listings.access),
            route("GET", "/v1/catalog/versions", listings.versions),
            *[route(method, path, api.health) for method, path in HEALTH],
            route("GET", "/version", api.version),
            route("GET", "/load", api.load),
            route("GET", "/metrics", api.metrics),
            route("GET", "/openapi.json", api.openapi),
            route("GET", "/docs", api.docs),
            route("GET", "/", index_of(closed=access.closed)),
            route("GET", "/page/{digest}/{file}", asset),
            *[change(method, path, read) for method, path, read in admin],
        ],
        middleware=_cors(access),
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


class _App(Starlette):
    """Endpoints answer their own errors: Starlette's layers for these, of which each looks at every piece of an answer,
    are left out. Only the router's are left, that there is no such path or method."""

    def build_middleware_stack(self) -> ASGIApp:
        async def routed(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await self.router(scope, receive, send)
            except HTTPException as error:
                await _http(Request(scope), error)(scope, receive, send)

        app: ASGIApp = routed
        for layer, args, kwargs in reversed(self.user_middleware):
            app = layer(app, *args, **kwargs)
        return app


class _Answered:
    """An endpoint, whose errors are answers too, as long as it has not begun to answer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        unknown: Exception | None = None
        try:
            response = await self._endpoint(request)
        except ClientDisconnect:  # nobody reads it; what is raised beyond this, Serve logs as a failure
            response = Response(status_code=observe.LEFT)
        except HTTPException as error:
            response = _http(request, error)
        except Exception as error:  # noqa: BLE001 (it is told to nobody, and raised once that is said)
            response = _known(request, error)
            unknown = None if isinstance(error, LorauterError) else error
        await response(scope, receive, send)
        if unknown is not None:
            raise unknown


class _Api:
    def __init__(self, service: Service, settings: ApiSettings, context: int, base_model: str) -> None:
        self._service = service
        self._settings = settings
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

    async def health(self, _: Request) -> Response:
        return Json({"status": "ok"})

    async def version(self, _: Request) -> Response:
        return Json({"version": lorauter.__version__})

    async def load(self, _: Request) -> Response:
        return Json({"server_load": self._generation.running})

    async def metrics(self, _: Request) -> Response:
        return Response(await self._service.metrics(), media_type=_PROMETHEUS)

    async def openapi(self, _: Request) -> Response:
        return Json(document())

    async def docs(self, _: Request) -> Response:
        return HTMLResponse(page())

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        """The request's body, validated."""
        return parse_body(kind, await read_json(request, self._settings.max_body_bytes))


def _known(request: Request, error: Exception) -> Response:
    caller: Caller = getattr(request.state, "caller", Caller())
    status, body = error_answer(error, caller.audience)
    visit: Visit | None = getattr(request.state, "visit", None)
    headers = dict(visit.headers) if visit is not None else {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return _error(request, status, body, headers)


def _http(request: Request, error: HTTPException) -> Response:
    return _error(request, error.status_code, error_object(error.detail), error.headers)


def _error(request: Request, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None) -> Response:
    """An error in the shape of the API that the request is of."""
    return Json(error_body(status, body) if speaks_anthropic(request.url.path) else body, status, headers)
