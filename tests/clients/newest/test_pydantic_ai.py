"""pydantic-ai."""

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


@pytest.fixture
def provider(openai_url: str) -> OpenAIProvider:
    return OpenAIProvider(base_url=openai_url, api_key="none")


def test_an_agent(provider: OpenAIProvider, review: str, answer: str) -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        assert Agent(kind("lorauter", provider=provider)).run_sync(review).output == answer


def test_a_stream(provider: OpenAIProvider, review: str, answer: str) -> None:
    async def ask() -> str:
        async with Agent(OpenAIChatModel("lorauter", provider=provider)).run_stream(review) as result:
            return [piece async for piece in result.stream_text(delta=False)][-1]

    assert asyncio.run(ask()) == answer


@pytest.mark.parametrize("native", [False, True])
def test_structured_answers(provider: OpenAIProvider, review: str, schema: Any, native: bool) -> None:
    agent = Agent(
        OpenAIChatModel("lorauter", provider=provider), output_type=NativeOutput(schema) if native else schema
    )
    assert isinstance(agent.run_sync(review).output, schema)
