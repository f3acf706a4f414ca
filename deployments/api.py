"""The HTTP API: OpenAI's endpoints, routing, and errors in OpenAI's shape, over a service that does the work.

Knows HTTP and JSON; knows nothing of Ray. `Service` is what `deployments.router.Router` implements.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from deployments import observe
from deployments.access import Access, Caller, Reservation
from deployments.admin import ReadChange
from deployments.bodies import read_json
from deployments.calls import Admitted, CatalogDescription, GenerateCall, Prompt
from deployments.config import AccessSettings, ApiSettings, explain, first_field
from deployments.openai_answers import (
    CHAT,
    LAST_EVENT,
    TEXT,
    EventEncoder,
    Shape,
    error_answer,
    event,
    usage,
)
from deployments.openai_types import BASE_MODEL, ROUTED_MODEL, ChatBody, CompletionBody, GenerationBody, RouteBody
from deployments.rights import ROLES, check_change
from deployments.scope import ScopedOptions, visible, visible_tasks
from deployments.told import Audience, without_places
from lorauter.engine.config import EngineConfig
from lorauter.engine.types import Chunk
from lorauter.errors import (
    AdapterError,
    AdapterNotFound,
    InvalidRequest,
    LorauterError,
    Overloaded,
    Unauthenticated,
)
from lorauter.names import RULE, is_valid_name
from lorauter.routing.compose import AdapterWeight, LeftOut, RoutingDecision, cause_of
from lorauter.routing.options import RoutingOptions

logger = logging.getLogger("lorauter.api")

_HEADER_ITEMS = 16
_DECISIONS = 3  # that are tried for a request whose adapters turn out to be gone or broken
_CHARS_A_TOKEN = 4  # about; an answer's end settles what it was


class Service(Protocol):
    """What the API needs behind it. Every method raises LorauterError."""

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        """A decision for each text."""

    def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        """`Admitted`, then the answer's chunks. Closing the iterator cancels the call."""

    def check_load(self) -> None:
        """Raise Overloaded if `generate` would."""

    async def versions(self, names: Sequence[str]) -> Mapping[str, str]:
        """Which versions of adapters are served; without those that are not."""

    async def describe(self) -> CatalogDescription:
        """The tasks and adapters there are."""

    async def check_ready(self) -> None:
        """Raise if the parts of the service do not fit together."""


Body = TypeVar("Body", bound=BaseModel)
Endpoint = Callable[[Request], Awaitable[Response]]
_Answer = AsyncGenerator[Admitted | Chunk]
_Ask = Callable[[RoutingDecision], _Answer]


def build_api(
    service: Service,
    settings: ApiSettings,
    access: Access | None = None,
    admin: Sequence[tuple[str, str, ReadChange]] = (),
    *,
    max_model_len: int = EngineConfig().max_model_len,
) -> Starlette:
    """The ASGI application over a service.

    Args:
        service: does the work.
        settings: the API's.
        access: who may use it; everybody, if it is left out.
        admin: the admin API's endpoints.
        max_model_len: tokens that a prompt and its answer can take together.
    """
    access = access or Access(AccessSettings())
    api = _Api(service, settings, max_model_len)

    def route(method: str, path: str, endpoint: Endpoint, *, reserves: bool = False) -> Route:
        """A route for callers with one of the endpoint's roles; an endpoint that reserves tokens counts its requests
        with them, but for those that fail before."""
        roles = ROLES[method, path]

        async def guarded(request: Request) -> Response:
            observe.current().endpoint = path
            if not roles:
                return await endpoint(request)
            visit = request.state.visit = access.require(request, *roles)
            request.state.caller = visit.caller
            if not reserves:
                await visit.count()
            try:
                return await endpoint(request)
            except Exception:
                await visit.count()
                raise

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
            route("POST", "/v1/route", api.route, reserves=True),
            route("GET", "/v1/models", api.models),
            route("GET", "/v1/models/{model}", api.model),
            route("GET", "/v1/tasks", api.tasks),
            route("GET", "/healthz", api.health),
            *[change(method, path, read) for method, path, read in admin],
        ],
        exception_handlers=handlers,
        lifespan=lifespan,
    )


class _Api:
    def __init__(self, service: Service, settings: ApiSettings, context: int) -> None:
        self._service = service
        self._settings = settings
        self._context = context

    async def chat(self, request: Request) -> Response:
        body = await self._body(request, ChatBody)
        text = body.routed_text(self._settings.route_on)
        return await self._answer(request, body, text, Prompt(messages=body.turns()), CHAT)

    async def completion(self, request: Request) -> Response:
        body = await self._body(request, CompletionBody)
        return await self._answer(request, body, body.text, Prompt(text=body.text), TEXT)

    async def route(self, request: Request) -> Response:
        body = await self._body(request, RouteBody)
        texts = body.texts()
        if len(texts) > self._settings.max_inputs:
            raise InvalidRequest(
                f"got {len(texts)} texts; at most {self._settings.max_inputs} are routed at once", param="input"
            )
        self._check_length(max(map(len, texts)), "input")
        visit, tokens = request.state.visit, sum(min(_tokens(len(text)), self._context) for text in texts)
        options = _scoped(body, visit.caller)
        _, decisions = await visit.reserve(tokens, lambda: self._service.route(texts, options), at_least=tokens)
        permitted = visit.caller.permitted
        data = [{"index": i, **visible(decision.to_json(), permitted)} for i, decision in enumerate(decisions)]
        return JSONResponse({"object": "list", "data": data})

    async def models(self, request: Request) -> Response:
        catalog = await self._service.describe()
        permitted = filter(request.state.caller.permits, catalog.adapters)
        rows = [_model_row(name) for name in (ROUTED_MODEL, BASE_MODEL, *permitted)]
        return JSONResponse({"object": "list", "data": rows})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in (ROUTED_MODEL, BASE_MODEL) and not (
            request.state.caller.permits(name) and await self._service.versions([name])
        ):
            raise AdapterNotFound("no such model; see GET /v1/models", adapter=_short(name))
        return JSONResponse(_model_row(name))

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

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        """The request's body, validated."""
        raw = await read_json(request, self._settings.max_body_bytes)
        try:
            return kind.model_validate_json(raw)
        except ValidationError as error:
            raise InvalidRequest(explain(error, "option"), param=first_field(error)) from error

    def _check_length(self, characters: int, param: str) -> None:
        """Raise InvalidRequest for a text that is not even to be tokenised."""
        if characters > self._settings.max_prompt_chars:
            raise InvalidRequest(
                f"got {characters} characters; at most {self._settings.max_prompt_chars} are taken", param=param
            )

    async def _decide(self, body: GenerationBody, text: str, caller: Caller) -> RoutingDecision:
        """The adapters for a request: by hand, by the model's name, or routed; all such as the caller may use."""
        chosen = body.chosen()
        if chosen is None:
            decision = (await self._service.route([text], _scoped(body.lorauter, caller)))[0]
            if not all(caller.permits(adapter.name) for adapter in decision.adapters):
                raise LorauterError("the router chose an adapter that the key may not use")
            return decision
        if len(chosen) > self._settings.max_adapters:
            raise InvalidRequest(
                f"got {len(chosen)} adapters; at most {self._settings.max_adapters} can be mixed",
                param="lorauter.adapters",
            )
        for name in chosen:
            if not is_valid_name(name):
                raise AdapterNotFound(f"no such adapter; a name is {RULE}", adapter=_short(name))
            if not caller.permits(name):  # whether it exists or not
                raise AdapterNotFound("no such adapter; see GET /v1/models", adapter=name)
        versions = await self._service.versions(list(chosen)) if chosen else {}
        for name in chosen:
            if name not in versions:
                raise AdapterNotFound("no such adapter; see GET /v1/models", adapter=name)
        mixture = tuple(AdapterWeight(name, versions[name], weight) for name, weight in chosen.items() if weight)
        return RoutingDecision(None, (), mixture)

    async def _admit(
        self, body: GenerationBody, text: str, caller: Caller, decision: RoutingDecision, ask: _Ask
    ) -> tuple[RoutingDecision, _Answer, Admitted]:
        """The decision in the end, and the answer as it comes; until it is admitted an error can still have its own
        status.

        Adapters that are gone or broken are no fault of a request that named none. A replica goes on without them, as
        long as one is left; where none is, the request is routed anew without them, and in the end answered by the
        base model, unless they may be back soon.
        """
        left_out: list[LeftOut] = []
        for attempt in range(_DECISIONS + 1):
            if left_out:
                gone = {adapter.name for adapter in left_out}
                routed = body.lorauter.model_copy(update={"exclude_adapters": body.lorauter.exclude_adapters | gone})
                decision = await self._decide(body.model_copy(update={"lorauter": routed}), text, caller)
                decision = replace(decision, left_out=tuple(left_out))
            if attempt == _DECISIONS:
                decision = replace(decision, adapters=())
            stream = ask(decision)
            try:
                admitted = await anext(stream)
            except AdapterError as error:
                cause = cause_of(error)
                last = attempt == _DECISIONS or (attempt == _DECISIONS - 1 and cause == "unavailable")
                if last or not decision.routed:
                    raise
                logger.warning("routed anew: %s", error)
                left_out += [LeftOut(adapter.name, adapter.version, cause) for adapter in decision.adapters]
                continue
            assert isinstance(admitted, Admitted)
            return decision.without(admitted.left_out), stream, admitted
        raise AssertionError("unreachable: the base model alone lacks no adapter")

    async def _answer(
        self, request: Request, body: GenerationBody, text: str, prompt: Prompt, shape: Shape
    ) -> Response:
        param = "prompt" if shape is TEXT else "messages"
        if not text.strip():
            raise InvalidRequest("the text to answer is empty", param=param)
        self._check_length(prompt.characters, param)
        settings, caller = self._settings, request.state.caller
        sampling = body.sampling(max_tokens=settings.default_max_tokens, temperature=settings.default_temperature)
        self._service.check_load()
        prompt_tokens = min(_tokens(prompt.characters), self._context)
        reservation, decision = await request.state.visit.reserve(
            min(prompt_tokens + sampling.max_tokens, self._context),
            lambda: self._decide(body, text, caller),
            at_least=prompt_tokens,
        )

        def ask(decision: RoutingDecision) -> _Answer:
            call = GenerateCall(prompt, decision.adapters, sampling, routed=decision.routed, tenant=caller.name)
            return _metered(self._service.generate(call), reservation)

        try:
            decision, stream, admitted = await self._admit(body, text, caller, decision, ask)
        except BaseException as error:
            await reservation.drop(error)
            raise
        observe.current().decided(body.model, len(decision.adapters), decision.confidence)
        head = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "object": shape.piece if body.stream else shape.whole,
            "created": int(time.time()),
            "model": body.model,
        }
        headers = {
            "x-lorauter-tasks": _header((task.name, task.score) for task in decision.tasks),
            "x-lorauter-adapters": _header((adapter.name, adapter.weight) for adapter in decision.adapters),
        }
        shown = visible(decision.to_json(), caller.permitted)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(stream, admitted, head, shown, shape, with_usage=with_usage, audience=caller.audience)
            return _EventStream(events, stream, headers, settings.ping_s)
        chunks = [item async for item in stream if isinstance(item, Chunk)]
        text = "".join(chunk.text for chunk in chunks)
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        took = usage(admitted.prompt_tokens, tokens, cached_tokens=admitted.cached_tokens)
        answer = {**head, **shape.answer(text, chunks[-1].finish_reason), "usage": took}
        return JSONResponse({**answer, "lorauter": shown}, headers=headers)


async def _metered(stream: _Answer, reservation: Reservation) -> _Answer:
    """The same stream; what it took is counted in place of what was reserved.

    Where it is refused before it is admitted, the reservation stands for another attempt. If the client leaves before
    that, nobody knows what it took, and the prompt is counted.
    """
    used: int | None = None
    refused = False
    try:
        async for item in stream:
            used = (used or 0) + (item.prompt_tokens if isinstance(item, Admitted) else len(item.token_ids))
            yield item
    except Exception:
        refused = used is None
        raise
    finally:
        await stream.aclose()
        if not refused:
            await reservation.settle(reservation.at_least if used is None else used)


def _scoped(options: RoutingOptions, caller: Caller) -> RoutingOptions:
    """A request's routing options within what its caller may use."""
    return options if caller.permitted is None else ScopedOptions.of(options, caller.permitted)


class _EventStream(StreamingResponse):
    """Server-sent events. However the response ends, the service's stream is closed, and with it the call.

    Where none comes for `ping_s` seconds, a comment is sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        source: AsyncGenerator[Admitted | Chunk],
        headers: dict[str, str],
        ping_s: float | None,
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._source = source
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass  # the status is sent, and nobody is there
        finally:
            await self._source.aclose()

    async def stream_response(self, send: Send) -> None:
        if (ping_s := self._ping_s) is None:
            await super().stream_response(send)
            return
        last = time.monotonic()

        async def send_noted(message: Message) -> None:
            nonlocal last
            last = time.monotonic()
            await send(message)

        async def ping() -> None:
            while True:
                silent = time.monotonic() - last
                await asyncio.sleep(ping_s - silent if silent < ping_s else 0.0)
                if time.monotonic() - last >= ping_s:
                    await send_noted({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})

        pinging = asyncio.create_task(ping())
        try:
            await super().stream_response(send_noted)
        finally:
            pinging.cancel()
            await asyncio.wait([pinging])


async def _events(
    stream: AsyncGenerator[Admitted | Chunk],
    admitted: Admitted,
    head: dict[str, Any],
    decision: dict[str, Any],
    shape: Shape,
    *,
    with_usage: bool,
    audience: Audience,
) -> AsyncGenerator[bytes]:
    """Server-sent events: the decision with the first, then the answer as it comes, then `[DONE]`."""

    encoder = EventEncoder(head, shape)
    tokens = 0
    yield encoder.first(decision)
    try:
        async for item in stream:
            if isinstance(item, Chunk):
                tokens += len(item.token_ids)
                if item.text or item.finish_reason:
                    yield encoder.piece(item.text, item.finish_reason)
    except Exception as error:  # noqa: BLE001 (the status is sent; the error has to go into the stream)
        observe.current().broken, body = error_answer(error, audience)
        yield event(body)
        return
    if with_usage:
        yield encoder.usage(usage(admitted.prompt_tokens, tokens, cached_tokens=admitted.cached_tokens))
    yield LAST_EVENT


def _header(pairs: Iterable[tuple[str, float]]) -> str:
    """`name=0.1234,...`, no longer than proxies take; the body has them all."""
    return ",".join(f"{name}={value:.4f}" for name, value in islice(pairs, _HEADER_ITEMS))


def _tokens(characters: int) -> int:
    """About how many tokens a text has."""
    return math.ceil(characters / _CHARS_A_TOKEN)


def _short(name: str) -> str:
    """A name fit for a message, whatever the client called a name."""
    return name if len(name) <= 128 else name[:125] + "..."


def _model_row(name: str) -> dict[str, Any]:
    row = {"id": name, "object": "model", "created": 0, "owned_by": "lorauter"}
    return row if name in (ROUTED_MODEL, BASE_MODEL) else {**row, "parent": BASE_MODEL}


async def _known(request: Request, error: Exception) -> Response:
    caller: Caller = getattr(request.state, "caller", Caller())
    status, body = error_answer(error, caller.audience)
    headers = {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return JSONResponse(body, status, headers)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, error.status_code, error.headers)


async def _left(_: Request, __: Exception) -> Response:
    """Nobody reads it; what is raised beyond this, Serve logs as a failure."""
    return Response(status_code=observe.LEFT)
