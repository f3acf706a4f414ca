"""OpenAI's Responses API and Anthropic's Messages API on the real model, by their own clients."""

from __future__ import annotations

import json
from typing import Any, Literal

import anthropic
import jsonschema
import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.integration


class Answer(BaseModel):
    word: Literal["person", "place"]
    sure: bool


def test_openais_responses(service: Any, examples: Any) -> None:
    client = service.openai
    example = examples("dbpedia")[0]
    whole = client.responses.create(model="lorauter", input=example.input)
    assert whole.lorauter["adapters"][0]["name"] == "dbpedia"
    assert whole.output_text.strip().lower().rstrip(".") == example.target.strip().lower().rstrip(".")
    chat = client.chat.completions.create(model="lorauter", messages=[{"role": "user", "content": example.input}])
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.input_tokens_details.cached_tokens <= chat.usage.prompt_tokens_details.cached_tokens
    with client.responses.stream(model="lorauter", input=example.input) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == whole.output_text
    assert events[0].response.lorauter == final.lorauter == whole.lorauter
    said = [
        {"role": "user", "content": "Count."},
        *[item.to_dict() for item in whole.output],
        {"role": "user", "content": [{"type": "input_text", "text": "Count from one to twenty in words."}]},
    ]
    cut = client.responses.create(model="base", instructions="Answer.", input=said, max_output_tokens=5)
    assert (cut.status, cut.incomplete_details.reason, cut.usage.output_tokens) == (
        "incomplete",
        "max_output_tokens",
        5,
    )
    for model in ("base", "lorauter"):
        parsed = client.responses.parse(model=model, input=example.input, text_format=Answer)
        assert isinstance(parsed.output_parsed, Answer)
    with pytest.raises(openai.BadRequestError, match="unclosed") as caught:
        client.responses.create(model="base", input="x", extra_body={"structured_outputs": {"regex": "a(b"}})
    assert caught.value.param == "structured_outputs.regex"
    schema = {"type": "object", "properties": {"a": {"type": "nothing"}}}
    form = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=r"text\.format.*cannot be compiled") as caught:
        client.responses.create(model="base", input="x", text=form)
    assert caught.value.param == "text.format"
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.responses.create(model="base", input="word " * 9_000)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")


def test_anthropics_messages(service: Any, examples: Any) -> None:
    client = service.anthropic
    example = examples("dbpedia")[0]
    asked: Any = {"model": "lorauter", "max_tokens": 16, "messages": [{"role": "user", "content": example.input}]}
    whole = client.messages.create(**asked)
    assert whole.lorauter["adapters"][0]["name"] == "dbpedia"
    assert whole.content[0].text.strip().lower().rstrip(".") == example.target.strip().lower().rstrip(".")
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)
    counted = client.messages.count_tokens(model="lorauter", messages=asked["messages"])
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    with client.messages.stream(**asked) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.lorauter == whole.lorauter
    count: Any = {"model": "base", "messages": [{"role": "user", "content": "Count from one to ten in words."}]}
    cut = client.messages.create(**count, max_tokens=24)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 24)
    word = cut.content[0].text.split()[3]
    stopped = client.messages.create(**count, max_tokens=24, stop_sequences=["zzzz", word])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)
    assert stopped.content[0].text == cut.content[0].text.partition(word)[0]
    began = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    on = client.messages.create(model="base", max_tokens=3, messages=began, system=[{"type": "text", "text": "Be."}])
    assert "three" in on.content[0].text
    parsed = client.messages.parse(**{**asked, "max_tokens": 200}, output_format=Answer)
    assert isinstance(parsed.parsed_output, Answer)
    with pytest.raises(anthropic.NotFoundError, match="nowhere"):
        client.messages.create(**{**asked, "model": "nowhere"})
    with pytest.raises(anthropic.BadRequestError, match="context") as caught:
        client.messages.create(model="base", max_tokens=3, messages=[{"role": "user", "content": "word " * 9_000}])
    assert json.loads(caught.value.response.text)["error"]["type"] == "invalid_request_error"


def test_tools_by_both(service: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    asked = "What will the weather be in Rome?"
    tool: Any = {"type": "function", "name": "look", "description": "The weather.", "parameters": schema}
    own: Any = {"name": "look", "description": "The weather.", "input_schema": schema}
    of_openai = service.openai.responses
    forced: Any = {"model": "lorauter", "input": asked, "tools": [tool], "tool_choice": "required"}
    forced |= {"parallel_tool_calls": False, "max_output_tokens": 99}
    [call] = of_openai.create(**forced).output
    jsonschema.validate(json.loads(call.arguments), schema)
    with of_openai.stream(**forced) as stream:
        parts = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(parts) == final.output[0].arguments == call.arguments
    item = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    said = [{"role": "user", "content": asked}, call.to_dict(), item]
    assert of_openai.create(model="lorauter", input=said, tools=[tool], max_output_tokens=8).usage.output_tokens > 0
    of_anthropic: Any = {
        "model": "lorauter",
        "max_tokens": 99,
        "messages": [{"role": "user", "content": asked}],
        "tools": [own],
        "tool_choice": {"type": "tool", "name": "look"},
    }
    answer = service.anthropic.messages.create(**of_anthropic)
    [use] = answer.content
    assert (use.name, answer.stop_reason) == ("look", "tool_use")
    assert use.input == json.loads(call.arguments)
    with service.anthropic.messages.stream(**of_anthropic) as blocks:
        partial = "".join(event.partial_json for event in blocks if event.type == "input_json")
        last = blocks.get_final_message()
    assert json.loads(partial) == last.content[0].input == use.input
    counted = {name: value for name, value in of_anthropic.items() if name != "max_tokens"}
    tokens = service.anthropic.messages.count_tokens(**counted).input_tokens
    assert tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Rain."}]}
    of_anthropic["messages"] += [answer.to_param(), result]
    del of_anthropic["tool_choice"]
    assert service.anthropic.messages.create(**of_anthropic).usage.output_tokens > 0
