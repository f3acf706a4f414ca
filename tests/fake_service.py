"""A service that is a few lines long behind the HTTP API in process, and the requests that its tests send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from deployments.api import build_api
from deployments.calls import Admitted, CatalogDescription, GenerateCall, Residency
from deployments.config import ApiSettings
from deployments.scope import Permitted
from lorauter.encoder import Embeddings, HashingEncoder
from lorauter.engine.types import Chunk, Prompt
from lorauter.names import AdapterKey
from lorauter.routing import AdapterWeight, RoutingDecision, RoutingOptions, TaskScore, check_text
from lorauter.tasks import Answers

CHAT, COMPLETIONS, ROUTE = "/v1/chat/completions", "/v1/completions", "/v1/route"
DECISION = RoutingDecision(
    "v1",
    (TaskScore("sums", 0.91239, 0.8), TaskScore("poems", 0.5, 0.2)),
    (AdapterWeight("adder", "a1", 0.75), AdapterWeight("poet", "p1", 0.25)),
    0.64,
)
VERSIONS = {"adder": "a1", "poet": "p1"}
BY_HAND = {"catalog_version": None, "tasks": [], "confidence": None}
SECRET = "the secret in the prompt"


@dataclass
class FakeService:
    """Says "Hello" in three tokens, and keeps what it was asked. Calls of tools are written as Hermes has them.

    Attributes:
        answer: what it says instead.
        route_error: raised by `route`, `versions`, `describe` and `check_ready`.
        load_error: raised by `check_load`.
        first_error: raised by `generate` at once.
        late_error: raised by `generate` after its first chunk.
        pause: awaited by `generate` after its first chunk.
        answers: of the task that everything is routed to.
    """

    answer: Sequence[Chunk] = (Chunk("Hé", (1,)), Chunk("", (2,)), Chunk("llo", (3,), "stop"))
    route_error: Exception | None = None
    load_error: Exception | None = None
    first_error: Exception | None = None
    late_error: Exception | None = None
    pause: Callable[[], Awaitable[object]] | None = None
    answers: Answers | None = None
    routed: list[tuple[list[str], RoutingOptions]] = field(default_factory=list)
    calls: list[GenerateCall] = field(default_factory=list)
    running: int = 0
    placed: list[tuple[Permitted, list[str]]] = field(default_factory=list)

    async def route(self, texts: Sequence[str], options: RoutingOptions) -> list[RoutingDecision]:
        for i, text in enumerate(texts):
            check_text(text, param=f"input[{i}]")
        await self.check_ready()
        self.routed.append((list(texts), options))
        answers = self.answers if options.constrain else None
        return [replace(DECISION, constrain=options.constrain, answers=answers)] * len(texts)

    async def versions(self, names: Sequence[str]) -> dict[str, str]:
        await self.check_ready()
        return {name: VERSIONS[name] for name in names if name in VERSIONS}

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        await self.check_ready()
        return HashingEncoder(8).encode(texts)

    async def encoder(self) -> str:
        return "hashing-8"

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        await self.check_ready()
        said = "".join(m["content"] for m in prompt.messages) if prompt.text is None else prompt.text
        return tuple(said.encode()) if prompt.token_ids is None else prompt.token_ids

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        await self.check_ready()
        return bytes(token_ids).decode()

    def check_load(self) -> None:
        if self.load_error:
            raise self.load_error

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        self.calls.append(call)
        self.running += 1
        try:
            if self.first_error:
                raise self.first_error
            yield Admitted(7, tool_format="hermes" if call.prompt.tools else None)
            first, *rest = self.answer
            yield first
            if self.pause:
                await self.pause()
            if self.late_error:
                raise self.late_error
            for chunk in rest:
                yield chunk
        finally:
            self.running -= 1

    async def metrics(self) -> str:
        return "ray_lorauter_requests_total 1.0\n"

    async def describe(self) -> CatalogDescription:
        await self.check_ready()
        return CatalogDescription("v1", [{"id": "sums", "object": "task"}], list(VERSIONS))

    async def examples(self, names: Sequence[str], most: int, permitted: Permitted) -> dict[str, list[dict[str, str]]]:
        return {name: [{"input": "1 + 1", "target": "2"}, {"input": "2 + 2", "target": "4"}][:most] for name in names}

    async def layout(self, permitted: Permitted, named: Sequence[str]) -> dict[str, Any]:
        self.placed.append((permitted, list(named)))
        return {"object": "list", "catalog_version": "v1", "data": [], "total": 0}

    async def residency(self, keys: Sequence[AdapterKey]) -> list[Residency]:
        return [Residency({"device": 2, "disk": 1}, 1.5) for _ in keys]

    async def deployments(self) -> list[dict[str, Any]]:
        return [{"id": "LoraModel", "object": "deployment", "status": "HEALTHY", "replicas": {"RUNNING": 1}}]

    async def history(self, limit: int, after: str | None) -> dict[str, Any]:
        return {"object": "list", "data": [], "total": 0, "has_more": False, "asked": [limit, after]}

    async def check_ready(self) -> None:
        if self.route_error:
            raise self.route_error


def transport(app: Starlette) -> httpx.ASGITransport:
    return httpx.ASGITransport(app, raise_app_exceptions=False)


def send(service: FakeService, method: str, path: str, settings: dict[str, Any] | None = None, **content: Any) -> Any:
    """One request; `content` is httpx's."""

    async def talk() -> httpx.Response:
        app = build_api(service, ApiSettings(**(settings or {})))
        async with httpx.AsyncClient(transport=transport(app), base_url="http://lorauter") as client:
            return await client.request(method, path, **content)

    return asyncio.run(talk())


def post(service: FakeService, path: str, body: Any, **settings: Any) -> Any:
    """POST a JSON value, or raw bytes, or an async iterator of bytes."""
    if not hasattr(body, "__aiter__") and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return send(service, "POST", path, settings, content=body, headers={"Content-Type": "application/json"})


def chat(model: str = "lorauter", text: Any = "hi", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **options}


def text(model: str = "lorauter", prompt: Any = "hi", **options: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, **options}


BOTH = pytest.mark.parametrize(("path", "body"), [(CHAT, chat), (COMPLETIONS, text)], ids=["chat", "text"])


def events(response: httpx.Response) -> list[Any]:
    """A stream's events, decoded; `[DONE]` stays a string."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, end = response.text.split("\n\n")
    assert end == ""
    assert all(piece.startswith("data: ") and "\n" not in piece for piece in pieces)
    data = [piece.removeprefix("data: ") for piece in pieces]
    return [piece if piece == "[DONE]" else json.loads(piece) for piece in data]


def refused(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The error of a response in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1000
    return error
