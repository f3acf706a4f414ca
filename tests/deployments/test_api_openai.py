"""OpenAI's own client against the HTTP API in process."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from fake_service import FakeService
from in_process import with_openai

from lorauter.errors import (
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    ContextLengthExceeded,
    Overloaded,
)

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


def test_openai_chat_and_completion() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        extra = {"lorauter": {"top_k": 1}}
        answer = await client.chat.completions.create(
            model="lorauter", messages=MESSAGES, max_completion_tokens=9, extra_body=extra
        )
        assert answer.choices[0].message.content == "Héllo"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == 10
        assert answer.model_extra is not None
        assert answer.model_extra["lorauter"]["adapters"][0] == {"name": "adder", "version": "a1", "weight": 0.75}
        plain = await client.completions.create(model="poet", prompt="hi", stop=["."], seed=1)
        assert plain.choices[0].text == "Héllo"
        raw = await client.chat.completions.with_raw_response.create(model="poet", messages=MESSAGES)
        assert raw.headers["x-lorauter-adapters"] == "poet=1.0000"

    service = FakeService()
    with_openai(service, use)
    assert service.routed[0][1].top_k == 1
    assert [call.sampling.max_tokens for call in service.calls] == [9, 256, 256]


def test_openai_streams() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model="lorauter", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        pieces = [piece async for piece in stream]
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "Héllo"
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.completion_tokens == 3
        texts = await client.completions.create(model="base", prompt="hi", stream=True)
        assert "".join([piece.choices[0].text async for piece in texts]) == "Héllo"

    with_openai(FakeService(), use)


def test_openai_does_not_trip_over_pings() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        for _ in range(2):
            stream = await client.chat.completions.create(model="lorauter", messages=MESSAGES, stream=True)
            pieces = [piece async for piece in stream]
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "Héllo"
            texts = await client.completions.create(model="base", prompt="hi", stream=True)
            assert "".join([piece.choices[0].text async for piece in texts]) == "Héllo"
        raw = await client.chat.completions.with_raw_response.create(model="poet", messages=MESSAGES, stream=True)
        lines = [line async for line in raw.http_response.aiter_lines()]
        assert lines.count(": ping") > 2

    with_openai(FakeService(pause=lambda: asyncio.sleep(0.1)), use)


def test_openai_models() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == ["lorauter", "base", "adder", "poet"]
        adapter = await client.models.retrieve("adder")
        assert adapter.model_extra is not None
        assert (adapter.id, adapter.model_extra["parent"], adapter.model_extra["root"]) == ("adder", "base", "adder")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nowhere")

    with_openai(FakeService(), use)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ContextLengthExceeded(5000, 2048), openai.BadRequestError),
        (AdapterNotFound("not there", adapter="poet"), openai.NotFoundError),
        (AdapterRejected("has NaNs", adapter="poet"), openai.UnprocessableEntityError),
        (Overloaded("full", retry_after_s=1), openai.RateLimitError),
        (AdapterUnavailable("store down", adapter="poet"), openai.InternalServerError),
        (RuntimeError("?"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_openai_error_classes(error: Exception, kind: type[openai.APIStatusError], stream: bool) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model="poet", messages=MESSAGES, stream=stream)
        assert type(caught.value) is kind
        assert isinstance(caught.value.body, dict)
        assert set(caught.value.body) == {"message", "type", "param", "code"}

    with_openai(FakeService(first_error=error), use)


def test_openai_sees_a_stream_break_and_a_body_too_large() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="poet", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="store down"):
            async for _ in stream:
                pass
        large: list[Any] = [{"role": "user", "content": "x" * 1000}]
        with pytest.raises(openai.APIStatusError, match="1000 bytes") as caught:
            await client.chat.completions.create(model="poet", messages=large)
        assert caught.value.status_code == 413

    with_openai(FakeService(late_error=AdapterUnavailable("store down", adapter="poet")), use, max_body_bytes=1000)
