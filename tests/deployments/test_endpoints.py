"""The endpoints beside the generating ones, and what HTTP brings along: compression, pages of other sites."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fake_service import CHAT, FakeService, chat, post, refused, send, transport

import lorauter
from deployments.access import Access
from deployments.api import build_api
from deployments.config import AccessSettings, ApiSettings
from lorauter.encoder import HashingEncoder
from lorauter.engine.types import Prompt
from lorauter.errors import ConfigError

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["one two", "three", "four five six"]
VECTORS = HashingEncoder(8).encode(TEXTS)


def with_openai(use: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def talk() -> Any:
        http = httpx.AsyncClient(transport=transport(build_api(FakeService(), ApiSettings())))
        async with openai.AsyncOpenAI(
            base_url="http://lorauter/v1", api_key="unused", max_retries=0, http_client=http
        ) as client:
            return await use(client)

    return asyncio.run(talk())


@pytest.mark.parametrize("model", ["lorauter", "hashing-8"])
def test_openais_client_embeds(model: str) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        answer = await client.embeddings.create(model=model, input=TEXTS)  # asks for base64
        assert np.allclose([row.embedding for row in answer.data], VECTORS)
        assert [row.index for row in answer.data] == [0, 1, 2]
        assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
        short = await client.embeddings.create(model=model, input="one two", dimensions=3, encoding_format="float")
        [row] = short.data
        assert len(row.embedding) == 3
        expected = VECTORS[0, :3] / max(float(np.linalg.norm(VECTORS[0, :3])), 1e-12)
        assert np.allclose(row.embedding, expected)

    with_openai(use)


def test_an_embedding_as_base64_is_of_little_endian_floats() -> None:
    [row] = post(
        FakeService(), EMBEDDINGS, {"model": "lorauter", "input": "three", "encoding_format": "base64"}
    ).json()["data"]
    assert np.array_equal(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), VECTORS[1])


@pytest.mark.parametrize(
    ("options", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input[1]"),
        ({"input": [1, 2]}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"input": "x" * 200_001}, 400, "input"),
        ({"dimensions": 9}, 400, "dimensions"),
        ({"dimensions": 0}, 400, "dimensions"),
        ({"encoding_format": "int8"}, 400, "encoding_format"),
        ({"surprise": 1}, 400, "surprise"),
        ({"model": "text-embedding-3-small"}, 404, "model"),
        ({"model": "poet"}, 404, "model"),
    ],
)
def test_what_is_not_embedded(options: dict[str, Any], status: int, param: str | None) -> None:
    response = post(FakeService(), EMBEDDINGS, {"model": "lorauter", "input": "a", **options})
    assert refused(response, status, "model_not_found" if status == 404 else None)["param"] == param


@dataclass
class Tokens(FakeService):
    asked: list[Prompt] = field(default_factory=list)

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        self.asked.append(prompt)
        return await super().tokenize(prompt)


def test_text_becomes_tokens_and_text_again() -> None:
    service = Tokens()
    answer = post(service, "/tokenize", {"model": "base", "prompt": "Hé", "add_special_tokens": False}).json()
    assert answer == {"count": 3, "max_model_len": 2048, "tokens": list("Hé".encode()), "token_strs": None}
    assert post(service, "/detokenize", {"model": "base", "tokens": answer["tokens"]}).json() == {"prompt": "Hé"}
    body = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    assert post(service, "/tokenize", body).json()["count"] == 2
    assert service.asked == [
        Prompt(text="Hé", add_special_tokens=False),
        Prompt(messages=({"role": "user", "content": "hi"},), add_generation_prompt=False),
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"prompt": ["a"]}),
        ("/tokenize", {"prompt": "x" * 200_001}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {}),
    ],
)
def test_what_is_neither(path: str, body: Any) -> None:
    refused(post(FakeService(), path, body), 400)


def test_what_the_service_says_of_itself() -> None:
    def get(path: str) -> Any:
        response = send(FakeService(), "GET", path)
        assert response.status_code == 200
        return response.json()

    assert get("/health") == get("/ping") == get("/healthz") == {"status": "ok"}
    assert get("/version") == {"version": lorauter.__version__}
    assert get("/load") == {"server_load": 0}


def test_load_counts_the_answers_under_way() -> None:
    async def ask() -> tuple[Any, Any]:
        waiting, go_on = asyncio.Event(), asyncio.Event()

        async def pause() -> None:
            waiting.set()
            await go_on.wait()

        app = build_api(FakeService(pause=pause), ApiSettings())
        async with httpx.AsyncClient(transport=transport(app), base_url="http://lorauter") as client:
            answer = asyncio.create_task(client.post(CHAT, json=chat()))
            await waiting.wait()
            during = (await client.get("/load")).json()
            go_on.set()
            await answer
            return during, (await client.get("/load")).json()

    assert asyncio.run(ask()) == ({"server_load": 1}, {"server_load": 0})


def test_the_document_has_every_endpoint_and_its_options() -> None:
    document = send(FakeService(), "GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) >= {CHAT, "/v1/models/{model}", "/v1/adapters/{name}", "/health"}
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert {"messages", "temperature", "tools"} <= set(schema["properties"])
    assert schema["required"] == ["model", "messages"]
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= set(document["components"]["schemas"])
    page = send(FakeService(), "GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "chat_template_kwargs" in page.text
    assert "http" not in page.text  # it loads nothing


def test_models_come_in_pages() -> None:
    def page(**query: Any) -> tuple[list[str], bool]:
        answer = send(FakeService(), "GET", "/v1/models", params=query).json()
        ids = [row["id"] for row in answer["data"]]
        assert (answer["first_id"], answer["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
        return ids, answer["has_more"]

    assert page() == (["lorauter", "base", "adder", "poet"], False)
    assert page(limit=3) == (["lorauter", "base", "adder"], True)
    assert page(limit=3, after="adder") == (["poet"], False)
    assert page(after="poet") == ([], False)
    for wrong in ({"limit": 0}, {"limit": "x"}, {"limit": -1}, {"limit": 10**9}, {"limit": "1" * 5000}, {"after": "x"}):
        error = refused(send(FakeService(), "GET", "/v1/models", params=wrong), 400)
        assert error["param"] in wrong


def test_a_model_says_what_it_is_made_of_and_no_place() -> None:
    async def ask() -> Any:
        app = build_api(FakeService(), ApiSettings(), max_model_len=77, base_model="/models/secret/SmolLM2/")
        async with httpx.AsyncClient(transport=transport(app), base_url="http://lorauter") as client:
            return (await client.get("/v1/models")).json()["data"]

    routed, base, adder, _ = asyncio.run(ask())
    assert (routed["root"], routed["parent"]) == ("base", None)
    assert (base["root"], base["parent"], base["max_model_len"]) == ("SmolLM2", None, 77)
    assert (adder["root"], adder["parent"]) == ("adder", "base")
    assert adder["created"] > 1_600_000_000


COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("coding", COMPRESS)
def test_a_body_may_come_compressed(coding: str) -> None:
    def ask(content: bytes, coding: str = coding, **settings: Any) -> Any:
        headers = {"Content-Type": "application/json", "Content-Encoding": coding}
        return send(service, "POST", CHAT, settings, content=content, headers=headers)

    service, compress = FakeService(), COMPRESS[coding]
    body = json.dumps(chat("base")).encode()
    assert ask(compress(body)).status_code == 200
    assert ask(body, "identity").status_code == 200
    if coding == "gzip":
        assert ask(compress(body[:9]) + compress(body[9:])).status_code == 200
    assert service.calls[0].prompt.messages[0]["content"] == "hi"
    bomb = compress(b" " * 30_000_000)
    assert len(bomb) < 100_000
    assert "larger than" in refused(ask(bomb), 413)["message"]
    assert "ends before" in refused(ask(compress(body)[:-5]), 400)["message"]
    assert "larger than" in refused(ask(gzip.compress(b"") * 100, max_body_bytes=1000), 413)["message"]  # of nothing
    assert f"is not {coding}" in refused(ask(body), 400)["message"]
    response = ask(body, "br")
    assert "gzip" in refused(response, 415)["message"]
    assert "gzip" in response.headers["accept-encoding"]


def test_a_large_answer_goes_compressed_and_a_stream_never() -> None:
    def ask(body: Any, accept: str) -> Any:
        return send(FakeService(), "POST", EMBEDDINGS, json=body, headers={"Accept-Encoding": accept})

    many = {"model": "lorauter", "input": TEXTS * 20}
    assert ask(many, "gzip").headers["content-encoding"] == "gzip"
    assert ask(many, "gzip").json() == ask(many, "identity").json()
    assert "content-encoding" not in ask(many, "identity").headers
    assert "content-encoding" not in ask({**many, "input": "a"}, "gzip").headers
    stream = send(FakeService(), "POST", CHAT, json=chat(text="hi", stream=True), headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in stream.headers


def browse(origins: Sequence[str], method: str, path: str, origin: str, **content: Any) -> httpx.Response:
    """A request as a browser sends it for a page."""

    async def talk() -> httpx.Response:
        app = build_api(FakeService(), ApiSettings(), Access(AccessSettings(cors_origins=tuple(origins))))
        headers = {"Origin": origin, **content.pop("headers", {})}
        async with httpx.AsyncClient(transport=transport(app), base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers, **content)

    return asyncio.run(talk())


def test_pages_of_the_origins_that_are_set_may_ask_and_no_others() -> None:
    ours, other = "https://app.example", "https://other.example"
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    before = browse([ours], "OPTIONS", CHAT, ours, headers=asking)
    assert before.status_code == 200
    assert before.headers["access-control-allow-origin"] == ours
    answered = browse([ours], "POST", CHAT, ours, json=chat("base"))
    assert (answered.status_code, answered.headers["access-control-allow-origin"]) == (200, ours)
    wrong = browse([ours], "POST", CHAT, ours, json=chat(n=0))
    assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (400, ours)
    for origins in ([ours], []):
        assert "access-control-allow-origin" not in browse(origins, "OPTIONS", CHAT, other, headers=asking).headers
        refusal = browse(origins, "POST", CHAT, other, json=chat("base"))
        assert refusal.status_code == 403
        assert "access-control-allow-origin" not in refusal.headers
    assert browse([], "OPTIONS", CHAT, ours, headers=asking).status_code == 405


def test_all_pages_need_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs keys"):
        AccessSettings(cors_origins=("*",))
    AccessSettings(cors_origins=("*",), keys_env="KEYS")
    with pytest.raises(ConfigError):
        Access(AccessSettings(cors_origins=("*",), keys_env="NO_SUCH_VARIABLE"))
