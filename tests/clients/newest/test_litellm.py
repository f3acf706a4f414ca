"""litellm, as an OpenAI-compatible provider's client."""

import asyncio
import json
import os
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm


@pytest.fixture(scope="module")
def options(openai_url: str) -> dict[str, Any]:
    return {"model": "openai/lorauter", "api_base": openai_url, "api_key": "none", "num_retries": 0}


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_chat(options: dict[str, Any], review: str, answer: str) -> None:
    assert litellm.completion(messages=messages(review), **options).choices[0].message.content == answer
    made = asyncio.run(litellm.acompletion(messages=messages(review), **options))
    assert made.choices[0].message.content == answer


def test_a_stream(options: dict[str, Any], review: str, answer: str) -> None:
    pieces = list(litellm.completion(messages=messages(review), stream=True, **options))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer


def test_a_structured_answer(options: dict[str, Any], review: str, schema: Any) -> None:
    made = litellm.completion(messages=messages(review), response_format=schema, **options)
    schema.model_validate_json(made.choices[0].message.content)


def test_tools(options: dict[str, Any], tool: dict[str, Any]) -> None:
    made = litellm.completion(
        messages=messages("How is the weather in Rome?"),
        tools=[tool],
        tool_choice="required",
        max_tokens=64,
        **{**options, "model": "openai/base"},
    )
    call, *_ = made.choices[0].message.tool_calls
    assert json.loads(call.function.arguments).keys() == {"city", "days"}


def test_responses(options: dict[str, Any], review: str, answer: str) -> None:
    made = litellm.responses(input=review, **options)
    assert made.output[0].content[0].text == answer


def test_completions_and_embeddings(options: dict[str, Any], review: str) -> None:
    made = litellm.text_completion(
        prompt=["One, two,", "A, B,"], max_tokens=4, **{**options, "model": "text-completion-openai/base"}
    )
    assert [bool(choice.text) for choice in made.choices] == [True, True]
    rows = litellm.embedding(input=[review, "Rain."], **options).data
    assert [len(row["embedding"]) for row in rows] == [384, 384]
