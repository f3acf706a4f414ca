"""The official client of OpenAI's API."""

import asyncio
import json
from typing import Any

import openai
import pytest


@pytest.fixture(scope="module")
def client(openai_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=openai_url, api_key="none", max_retries=0)


def chat(text: str, **options: Any) -> dict[str, Any]:
    return {"model": "lorauter", "messages": [{"role": "user", "content": text}], **options}


def test_a_chat(client: openai.OpenAI, review: str, answer: str) -> None:
    made = client.chat.completions.create(**chat(review))
    assert made.choices[0].message.content == answer
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


def test_chats_at_the_same_time(openai_url: str, review: str, answer: str) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=openai_url, api_key="none") as client:
            return await asyncio.gather(*[client.chat.completions.create(**chat(review)) for _ in range(4)])

    assert [made.choices[0].message.content for made in asyncio.run(ask())] == [answer] * 4


def test_a_stream(client: openai.OpenAI, review: str, answer: str) -> None:
    pieces = list(client.chat.completions.create(**chat(review, stream=True, stream_options={"include_usage": True})))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == answer
    assert pieces[-1].usage.completion_tokens > 0
    with client.chat.completions.stream(**chat(review)) as stream:
        assert next(event for event in stream if event.type == "content.done").content == answer
        assert stream.get_final_completion().choices[0].message.content == answer


def test_a_stream_of_the_asynchronous_client(openai_url: str, review: str, answer: str) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=openai_url, api_key="none") as client:
            stream = await client.chat.completions.create(**chat(review, stream=True))
            return "".join([piece.choices[0].delta.content or "" async for piece in stream])

    assert asyncio.run(ask()) == answer


def test_a_parsed_answer(client: openai.OpenAI, review: str, schema: Any) -> None:
    made = client.chat.completions.parse(**chat(review, response_format=schema))
    assert isinstance(made.choices[0].message.parsed, schema)
    with client.chat.completions.stream(**chat(review, response_format=schema)) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, schema)


def test_tools(client: openai.OpenAI, tool: dict[str, Any]) -> None:
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Rome for three days?"}]
    options: Any = {"model": "base", "tools": [tool], "max_tokens": 64}
    for choice in ("required", {"type": "function", "function": {"name": "forecast"}}):
        made = client.chat.completions.create(messages=messages, tool_choice=choice, **options)
        call, *_ = made.choices[0].message.tool_calls
        assert call.function.name == "forecast"
        assert json.loads(call.function.arguments).keys() == {"city", "days"}
    results = [
        {"role": "tool", "tool_call_id": one.id, "content": "Sunny."} for one in made.choices[0].message.tool_calls
    ]
    told = client.chat.completions.create(messages=[*messages, made.choices[0].message, *results], **options)
    assert told.choices[0].message.content or told.choices[0].message.tool_calls


def test_tools_in_a_stream(client: openai.OpenAI, tool: dict[str, Any]) -> None:
    asked = chat("How is the weather in Rome?", model="base", tools=[tool], tool_choice="required", max_tokens=64)
    arguments: dict[int, str] = {}
    names = []
    for piece in client.chat.completions.create(**asked, stream=True):
        for call in piece.choices[0].delta.tool_calls or []:
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
            names += [call.function.name] if call.function.name else []
    assert set(names) == {"forecast"}
    assert json.loads(arguments[0]).keys() == {"city", "days"}


def test_a_parsed_tool_call(client: openai.OpenAI, schema: Any, review: str) -> None:
    tools = [openai.pydantic_function_tool(schema)]
    made = client.chat.completions.parse(**chat(review, model="base", tools=tools, tool_choice="required"))
    assert isinstance(made.choices[0].message.tool_calls[0].function.parsed_arguments, schema)


def test_logprobs_and_several_answers(client: openai.OpenAI, review: str, answer: str) -> None:
    made = client.chat.completions.create(**chat(review, logprobs=True, top_logprobs=3, n=2))
    assert [choice.message.content for choice in made.choices] == [answer] * 2
    assert all(len(token.top_logprobs) == 3 for token in made.choices[0].logprobs.content)


def test_responses(client: openai.OpenAI, review: str, answer: str, schema: Any) -> None:
    made = client.responses.create(model="lorauter", input=review)
    assert (made.output_text, made.status) == (answer, "completed")
    with client.responses.stream(model="lorauter", input=review) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == answer
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    parsed = client.responses.parse(model="lorauter", input=review, text_format=schema)
    assert isinstance(parsed.output_parsed, schema)


def test_tools_of_responses(client: openai.OpenAI, tool: dict[str, Any]) -> None:
    tools: Any = [{"type": "function", "strict": True, **tool["function"]}]
    asked: list[Any] = [{"role": "user", "content": "How is the weather in Rome for three days?"}]
    made = client.responses.create(model="base", input=asked, tools=tools, tool_choice="required", max_output_tokens=64)
    call, *_ = [item for item in made.output if item.type == "function_call"]
    assert json.loads(call.arguments).keys() == {"city", "days"}
    calls = [item for item in made.output if item.type == "function_call"]
    asked += [*made.output]
    asked += [{"type": "function_call_output", "call_id": one.call_id, "output": "Sunny."} for one in calls]
    told = client.responses.create(model="base", input=asked, tools=tools, max_output_tokens=64)
    assert told.output


def test_completions(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="base", prompt=["The capital of France is", "One, two,"], max_tokens=4, logprobs=2, echo=True
    )
    assert [choice.text[:7] for choice in made.choices] == ["The cap", "One, tw"]
    assert made.choices[0].logprobs.token_logprobs[0] is None
    pieces = client.completions.create(model="base", prompt="One, two,", max_tokens=4, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces)


def test_embeddings(client: openai.OpenAI, review: str) -> None:
    made = client.embeddings.create(model="lorauter", input=[review, "Rain."])
    assert [len(row.embedding) for row in made.data] == [384, 384]
    short = client.embeddings.create(model="lorauter", input=review, dimensions=64, encoding_format="float")
    assert sum(x * x for x in short.data[0].embedding) == pytest.approx(1, abs=1e-4)


def test_models(client: openai.OpenAI) -> None:
    assert {"lorauter", "base", "sst2"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("sst2").id == "sst2"


def test_errors(client: openai.OpenAI, review: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**chat(review, model="nonsense"))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**chat("word " * 9000, model="base"))
    assert long.value.code == "context_length_exceeded"
