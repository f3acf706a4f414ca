"""What other servers' own HTTP tests need in place of the server that they start: a running one by their names for it.

A pytest plugin (`-p other_servers_shim`) of `other_servers.py`. The models that a test names are the service's base
model, its LoRA modules are adapters of the pool; a proxy puts one for the other in requests and in answers. Whatever
else a test imports of its own server is there by name and does nothing.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.abc
import importlib.machinery
import json
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from fnmatch import fnmatch
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import httpx
import pytest
import uvicorn
from other_servers_scope import NOT_CONCERNED
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

URL = os.environ["LORAUTER_URL"].rstrip("/")
TOKENIZER = os.environ["LORAUTER_TOKENIZER"]
ADAPTERS = ("sst2", "agnews", "dbpedia", "rte")
_STUBBED = ("vllm", "torch", "fastapi", "sglang", "wget", "tblib", "openai_harmony")
_SAMPLING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_SHORT = ("/chat/completions", "/completions", "/embeddings", "/responses", "/models")  # as llama.cpp has them too
_FIXTURES = {"server", "client", "async_client", "server_with_store", "remote_server"}


class Names:
    """The service's models by the names that tests give them.

    Args:
        any_name: whatever name a test gives, or none, is the base model.
    """

    def __init__(self, *, any_name: bool = False) -> None:
        self.served: dict[str, str] = {}
        self.any_name = any_name

    def add_model(self, name: str) -> None:
        self.served[name] = "base"

    def add_adapter(self, name: str) -> None:
        taken = [one for one in self.served.values() if one != "base"]
        self.served[name] = ADAPTERS[len(taken) % len(ADAPTERS)]

    def there(self, name: Any, path: str = "") -> Any:
        if path == "/v1/embeddings":
            return "lorauter"  # whose encoder it is
        if self.any_name or name is None:
            return "base"
        return self.served.get(name, name) if isinstance(name, str) else name


def start_proxy(names: Names) -> str:
    """A proxy of the service in a thread of this process; returns its URL."""
    client = httpx.AsyncClient(base_url=URL, timeout=300)

    async def forward(request: Request) -> Response:
        body, asked = await request.body(), None
        path = request.url.path
        path = f"/v1{path}" if path in _SHORT else path
        try:
            content = json.loads(body)
            if isinstance(content, dict):
                asked = content.get("model")  # none of these servers needs a name
                content["model"] = names.there(asked, path)
                if path in _SAMPLING:
                    content.setdefault("temperature", 1.0)  # as these servers have it
                body = json.dumps(content).encode()
        except ValueError:
            pass
        headers = {k: v for k, v in request.headers.items() if k not in ("host", "content-length", "accept-encoding")}
        sent = client.build_request(request.method, path, params=request.query_params, content=body, headers=headers)
        answering, leaving = (asyncio.ensure_future(one) for one in (client.send(sent, stream=True), request.receive()))
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not answering.done():
            answering.cancel()
            return Response(status_code=499)
        answer = answering.result()
        own = (f'"model": {json.dumps(names.there(asked))}', f'"model":{json.dumps(names.there(asked))}')
        kept = {k: v for k, v in answer.headers.items() if k in ("content-type", "retry-after", "x-request-id")}

        def renamed(text: bytes) -> bytes:
            for one in own if asked in names.served else ():
                text = text.replace(one.encode(), f'"model": {json.dumps(asked)}'.encode())
            return text

        if answer.headers.get("content-type", "").startswith("text/event-stream"):

            async def events() -> AsyncIterator[bytes]:
                try:
                    async for line in answer.aiter_lines():
                        yield renamed(f"{line}\n".encode())
                finally:
                    await answer.aclose()

            return StreamingResponse(events(), answer.status_code, kept)
        whole = renamed(await answer.aread())
        await answer.aclose()
        if request.url.path == "/v1/models":
            whole = _listed(whole, names)
        return Response(whole, answer.status_code, kept)

    methods = ["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS"]
    app = Starlette(routes=[Route("/{path:path}", forward, methods=methods)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{port}"


def _listed(whole: bytes, names: Names) -> bytes:
    """A list of models with what tests call them, in the order in which they named them."""
    listed = json.loads(whole)
    rows = {row["id"]: row for row in listed["data"]}
    places = {"root": names.served, "parent": names.served}
    data = []
    for name, own in names.served.items():
        row = {**rows[own], "id": name}
        for key, served in places.items():
            row[key] = next(
                (other for other, one in served.items() if one == row[key] and row[key] is not None), row[key]
            )
        data.append({**row, "root": name if own == "base" else row["root"]})
    return json.dumps({**listed, "data": data}).encode()


class RemoteOpenAIServer:
    """vLLM's: what its tests start a server by."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(self, model: str, arguments: Sequence[str] = (), **_: Any) -> None:
        names = Names()
        names.add_model(model)
        for place, one in enumerate(arguments):
            if one == "--served-model-name":
                for name in arguments[place + 1 :]:
                    if name.startswith("--"):
                        break
                    names.add_model(name)
            if one == "--lora-modules":
                for module in arguments[place + 1 :]:
                    if module.startswith("--"):
                        break
                    names.add_adapter(json.loads(module)["name"] if module.startswith("{") else module.split("=")[0])
        self.model = model
        self.url_root = start_proxy(names)

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *parts])

    def get_client(self, **options: Any) -> Any:
        import openai

        options = {"timeout": 300, "max_retries": 0, **options}
        return openai.OpenAI(base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, **options)

    def get_async_client(self, **options: Any) -> Any:
        import openai

        options = {"timeout": 300, "max_retries": 0, **options}
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, **options)

    def get_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.Anthropic(base_url=self.url_root, api_key=self.DUMMY_API_KEY, max_retries=0, **options)

    def get_async_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(base_url=self.url_root, api_key=self.DUMMY_API_KEY, max_retries=0, **options)


def start_any() -> str:
    """A proxy to which every model is the base model; returns its URL."""
    return start_proxy(Names(any_name=True))


def as_llama_server(utils: Any) -> None:
    """Put the service in the place of the server that llama.cpp's tests start."""
    url = httpx.URL(start_any())

    def start(server: Any, *_: Any, **__: Any) -> None:
        server.server_host, server.server_port, server.process = url.host, url.port, None

    utils.ServerProcess.start = start
    utils.ServerProcess.stop = lambda server: None
    utils.ServerPreset.load_all = staticmethod(lambda: None)


def get_tokenizer(*_: Any, **__: Any) -> Any:
    """The service's, whatever model is named."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


class _Config:
    """vLLM's ModelConfig, as far as tests ask it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def get_vocab_size(self) -> int:
        return len(get_tokenizer())


class _No:
    """A platform that is none of those that are asked about."""

    def __getattr__(self, _: str) -> Any:
        return lambda *a, **k: False


KNOWN: dict[str, dict[str, Any]] = {
    "vllm.tokenizers": {"get_tokenizer": get_tokenizer},
    "vllm.config": {"ModelConfig": _Config},
    "vllm.platforms": {"current_platform": _No()},
    "torch": {"iinfo": lambda _: SimpleNamespace(min=-(2**63), max=2**63 - 1)},
}


class _Stub(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = KNOWN.get(self.__name__, {})
        if name in known:
            return known[name]
        # A class may be inherited from, and an error caught.
        return type(name, (Exception,), {}) if name.endswith("Error") else MagicMock(name=name)


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in _STUBBED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return


sys.meta_path.insert(0, _Stubs())
sys.modules.setdefault("pybase64", base64)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of vLLM's tests, leave out what asks no server; skip what does not concern this one."""
    own = []
    for item in items:
        name = f"{item.path.name}::{item.name}"
        reason = next((why for pattern, why in NOT_CONCERNED.items() if fnmatch(name, pattern)), None)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"not concerned: {reason}"))
        if "entrypoints" not in item.path.parts or _FIXTURES & set(getattr(item, "fixturenames", ())):
            own.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in own])
    items[:] = own
