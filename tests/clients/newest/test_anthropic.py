"""The official client of Anthropic's API."""

import asyncio
from typing import Any

import anthropic
import pytest


@pytest.fixture(scope="module")
def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def asked(text: str, **options: Any) -> dict[str, Any]:
    return {"model": "lorauter", "max_tokens": 64, "messages": [{"role": "user", "content": text}], **options}


def test_a_message(client: anthropic.Anthropic, url: str, review: str, answer: str) -> None:
    made = client.messages.create(**asked(review))
    assert (made.content[0].text, made.stop_reason) == (answer, "end_turn")
    assert made.usage.output_tokens > 0
    other = anthropic.AsyncAnthropic(base_url=url, api_key="none")
    assert asyncio.run(other.messages.create(**asked(review))).content[0].text == answer


def test_a_stream(client: anthropic.Anthropic, review: str, answer: str) -> None:
    with client.messages.stream(**asked(review)) as stream:
        assert "".join(stream.text_stream) == answer
        assert stream.get_final_message().stop_reason == "end_turn"


def test_tools(client: anthropic.Anthropic, tool: dict[str, Any]) -> None:
    function = tool["function"]
    tools: Any = [
        {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
    ]
    choice = {"type": "any", "disable_parallel_tool_use": True}
    question = "How is the weather in Rome for three days?"
    made = client.messages.create(**asked(question, model="base", tools=tools, tool_choice=choice))
    call, *_ = [block for block in made.content if block.type == "tool_use"]
    assert (made.stop_reason, call.name, call.input.keys()) == ("tool_use", "forecast", {"city", "days"})
    with client.messages.stream(**asked(question, model="base", tools=tools, tool_choice=choice)) as stream:
        last = stream.get_final_message()
    assert [block.name for block in last.content if block.type == "tool_use"][:1] == ["forecast"]
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "Sunny."}
        for block in made.content
        if block.type == "tool_use"
    ]
    messages: Any = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": made.content},
        {"role": "user", "content": results},
    ]
    told = client.messages.create(model="base", max_tokens=32, tools=tools, messages=messages)
    assert told.content


def test_counted_tokens(client: anthropic.Anthropic, review: str) -> None:
    messages: Any = [{"role": "user", "content": review}]
    assert client.messages.count_tokens(model="lorauter", messages=messages).input_tokens > 10


def test_errors(client: anthropic.Anthropic, review: str) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**asked(review, model="nonsense"))
