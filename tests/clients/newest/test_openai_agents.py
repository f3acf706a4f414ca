"""openai-agents, by its default model class, which asks /v1/responses."""

import asyncio
from typing import Any

import agents
import pytest
from openai import AsyncOpenAI


@pytest.fixture(autouse=True)
def _service(openai_url: str) -> None:
    agents.set_default_openai_client(AsyncOpenAI(base_url=openai_url, api_key="none"), use_for_tracing=False)
    agents.set_tracing_disabled(True)


def test_an_agent(review: str, answer: str) -> None:
    agent = agents.Agent(name="critic", model="lorauter")
    assert agents.Runner.run_sync(agent, review).final_output == answer


def test_a_stream(review: str, answer: str) -> None:
    async def ask() -> Any:
        result = agents.Runner.run_streamed(agents.Agent(name="critic", model="lorauter"), review)
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert asyncio.run(ask()) == answer


def test_a_structured_answer(review: str, schema: Any) -> None:
    agent = agents.Agent(name="critic", model="lorauter", output_type=schema)
    assert isinstance(agents.Runner.run_sync(agent, review).final_output, schema)


def test_tools() -> None:
    asked = []

    @agents.function_tool
    def forecast(city: str, days: int) -> str:
        """The weather of a city for some days."""
        asked.append((city, days))
        return "Sunny."

    agent = agents.Agent(
        name="weather",
        model="base",
        tools=[forecast],
        model_settings=agents.ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=128),
    )
    result = agents.Runner.run_sync(agent, "How is the weather in Rome for three days?")
    assert asked
    assert isinstance(result.final_output, str)
