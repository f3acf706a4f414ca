"""langchain-openai."""

import asyncio
from typing import Any

import pytest
from langchain_core.tools import tool as as_tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings


@pytest.fixture(scope="module")
def options(openai_url: str) -> dict[str, Any]:
    return {"model": "lorauter", "base_url": openai_url, "api_key": "none", "max_retries": 0}


@as_tool
def forecast(city: str, days: int) -> str:
    """The weather of a city for some days."""
    return f"{days} sunny days in {city}"


def test_a_chat(options: dict[str, Any], review: str, answer: str) -> None:
    chat = ChatOpenAI(**options)
    assert chat.invoke(review).content == answer
    assert "".join(piece.content for piece in chat.stream(review)) == answer
    assert [made.content for made in chat.batch([review] * 3)] == [answer] * 3
    assert asyncio.run(chat.ainvoke(review)).content == answer


def test_a_chat_by_responses(options: dict[str, Any], review: str, answer: str) -> None:
    assert ChatOpenAI(**options, use_responses_api=True).invoke(review).text == answer


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_answers(options: dict[str, Any], review: str, schema: Any, method: str) -> None:
    assert isinstance(ChatOpenAI(**options).with_structured_output(schema, method=method).invoke(review), schema)


def test_json_of_no_schema(options: dict[str, Any], review: str) -> None:
    chat = ChatOpenAI(**options).with_structured_output({"title": "any", "type": "object"}, method="json_mode")
    assert isinstance(chat.invoke(f"{review} Answer in JSON."), dict)


def test_tools(options: dict[str, Any]) -> None:
    chat = ChatOpenAI(**{**options, "model": "base"}, max_tokens=64)
    asked = "How is the weather in Rome for three days?"
    for choice in ("required", "forecast"):
        made = chat.bind_tools([forecast], tool_choice=choice).invoke(asked)
        call, *_ = made.tool_calls
        assert (call["name"], call["args"].keys()) == ("forecast", {"city", "days"})
    told = chat.bind_tools([forecast]).invoke([("user", asked), made, forecast.invoke(call)])
    assert told.content or told.tool_calls


def test_completions(options: dict[str, Any]) -> None:
    completions = OpenAI(**{**options, "model": "base"}, max_tokens=4)
    assert all(completions.batch(["One, two,", "A, B,"]))
    assert [len(made) for made in completions.generate(["One, two,", "A, B,"]).generations] == [1, 1]


def test_embeddings(options: dict[str, Any], review: str) -> None:
    # By default it sends the tokens of OpenAI's own models, which mean nothing to others.
    embeddings = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    assert [len(row) for row in embeddings.embed_documents([review, "Rain."])] == [384, 384]
    assert len(embeddings.embed_query(review)) == 384
