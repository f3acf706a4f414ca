"""Tools by OpenAI's Responses API and Anthropic's Messages API: what is asked, and what comes of it for clients."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import openai
import pytest
from anthropic.types import Message
from fake_service import CHAT, FakeService, chat, post, refused
from in_process import with_anthropic, with_openai
from openai.types.responses import Response

from lorauter.engine.types import Chunk, FinishReason

RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NOTHING = {"type": "object", "properties": {}}
LOOK = {"type": "function", "name": "look", "description": "The weather.", "parameters": SCHEMA, "strict": False}
NOW = {"type": "function", "name": "now"}
LOOK_ANTHROPIC = {"name": "look", "description": "The weather.", "input_schema": SCHEMA}
NOW_ANTHROPIC = {"type": None, "name": "now", "input_schema": NOTHING, "cache_control": {"type": "ephemeral"}}
ARGUMENTS = '{"city": "Rome"}'
SAID = f'Let me see.\n<tool_call>\n{{"name": "look", "arguments": {ARGUMENTS}}}\n</tool_call>'
CALLED = ("look", ARGUMENTS, "completed")
TWICE = f'{SAID}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'


def says(text: str, size: int = 5, reason: FinishReason = "stop") -> FakeService:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    return FakeService(answer=[*[Chunk(piece, (1,)) for piece in pieces], Chunk("", (2,), reason)])


def responses(**options: Any) -> dict[str, Any]:
    return {"model": "base", "input": "Weather?", "tools": [LOOK, NOW], **options}


def messages(**options: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": "Weather?"}]
    return {"model": "base", "max_tokens": 99, "messages": said, "tools": [LOOK_ANTHROPIC, NOW_ANTHROPIC], **options}


# --- what is asked


def test_tools_are_a_chats_tools() -> None:
    service = FakeService()
    look = {"name": "look", "description": "The weather.", "parameters": SCHEMA}
    shown = (
        {"type": "function", "function": look},
        {"type": "function", "function": {"name": "now", "description": "", "parameters": NOTHING}},
    )
    for path, body in ((RESPONSES, responses()), (MESSAGES, messages())):
        assert post(service, path, body).status_code == 200
        call = service.calls[-1]
        assert call.prompt.tools == shown
        assert call.sampling.calls is not None
        assert [tool.name for tool in call.sampling.calls.tools] == ["look", "now"]
        assert not call.sampling.is_held
    strict = {**LOOK, "strict": True}
    post(service, RESPONSES, responses(tools=[strict]))
    assert service.calls[-1].sampling.is_held


@pytest.mark.parametrize(
    ("choice", "of_anthropic", "asked"),
    [
        ("auto", {"type": "auto"}, (["look", "now"], False, True)),
        ("required", {"type": "any"}, (["look", "now"], True, True)),
        ({"type": "function", "name": "now"}, {"type": "tool", "name": "now"}, (["now"], True, False)),
        ("none", {"type": "none"}, None),
        ({"type": "allowed_tools", "mode": "auto", "tools": [NOW]}, None, (["now"], False, True)),
        ({"type": "allowed_tools", "mode": "required", "tools": [NOW]}, None, (["now"], True, True)),
    ],
)
def test_which_tools_may_be_called(choice: Any, of_anthropic: Any, asked: Any) -> None:
    service = FakeService()
    assert post(service, RESPONSES, responses(tool_choice=choice)).status_code == 200
    if of_anthropic is not None:
        assert post(service, MESSAGES, messages(tool_choice=of_anthropic)).status_code == 200
    for call in service.calls:
        use = call.sampling.calls
        assert (use and ([tool.name for tool in use.tools], use.forced, use.several)) == asked


def test_at_most_one_call() -> None:
    one = says(TWICE)
    for path, body in (
        (RESPONSES, responses(parallel_tool_calls=False)),
        (MESSAGES, messages(tool_choice={"type": "auto", "disable_parallel_tool_use": True})),
    ):
        told = post(one, path, body).json()
        items = told.get("output") or told["content"]
        assert [item["name"] for item in items if "name" in item] == ["look"]


@pytest.mark.parametrize(
    ("options", "param", "needle"),
    [
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name", "pattern"),
        ({"tools": [LOOK, LOOK]}, "tools.1.name", "two tools"),
        ({"tools": [NOW, {**LOOK, "parameters": {"type": "array"}}]}, "tools.1.parameters.type", "needed object"),
        ({"tools": [{**LOOK, "parameters": {"properties": []}}]}, "tools.0.parameters.properties", "schemas"),
        ({"tool_choice": {"type": "function", "name": "walk"}}, "tool_choice", "walk"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "walk"}]}},
         "tool_choice", "walk"),
        ({"tool_choice": "required", "tools": None}, "tool_choice", "no tools"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0.type", "mcp"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type", "custom"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_told_by_its_name(options: Any, param: str, needle: str) -> None:
    error = refused(post(FakeService(), RESPONSES, responses(**options)), 400)
    assert error["param"] == param
    assert needle in error["message"]
    assert ".function" not in error["message"]


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"tools": [{**LOOK_ANTHROPIC, "input_schema": {"type": "array"}}]}, "tools.0.input_schema.type: "),
        ({"tools": [{**LOOK_ANTHROPIC, "name": "a b"}]}, "tools.0.name: "),
        ({"tools": [LOOK_ANTHROPIC, LOOK_ANTHROPIC]}, "tools.1.name: there are two tools"),
        ({"tool_choice": {"type": "tool", "name": "walk"}}, "walk"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "tool_choice"),
    ],
)
def test_what_is_wrong_with_anthropics_tools_is_told_by_its_name(options: Any, needle: str) -> None:
    response = post(FakeService(), MESSAGES, messages(**options))
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert needle in message
    assert ".function" not in message
    counted = {name: value for name, value in messages(**options).items() if name != "max_tokens"}
    assert post(FakeService(), COUNT, counted).json()["error"]["message"] == message


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_has_not_are_refused(number: str) -> None:
    schema = {"type": "object", "properties": {"a": {"default": ["THE NUMBER"]}}}
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {"a": "THE NUMBER"}}
    form = {"type": "json_schema", "schema": schema}
    for path, body, param in [
        (RESPONSES, responses(tools=[{**LOOK, "parameters": schema}]), "tools.0.parameters"),
        (RESPONSES, responses(text={"format": {"name": "x", **form}}), "text.format.schema"),
        (MESSAGES, messages(tools=[{"name": "f", "input_schema": schema}]), "tools.0.input_schema"),
        (MESSAGES, messages(output_config={"format": form}), "output_config.format.schema"),
        (MESSAGES, messages(messages=[{"role": "assistant", "content": [use]}]), "messages.0.content.0.input"),
        (CHAT, chat(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}]), "parameters"),
        (CHAT, chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}}), "schema"),
    ]:
        response = post(FakeService(), path, json.dumps(body).replace('"THE NUMBER"', number).encode())
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert f"{param}: " in message
        assert "finite" in message


# --- what comes of it


def streamed(raw: str) -> list[Any]:
    told = [json.loads(text.split("data: ", 1)[1]) for text in raw.removesuffix("\n\n").split("\n\n")]
    return [event for event in told if event["type"] != "ping"]


def of_items(items: Sequence[Any]) -> list[Any]:
    """What is said and called, without ids."""
    return [
        item["content"][0]["text"] if item["type"] == "message" else (item["name"], item["arguments"], item["status"])
        for item in items
    ]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "reason", "items"),
    [
        (SAID, "stop", ["Let me see.", CALLED]),
        (TWICE, "stop", ["Let me see.", CALLED, ("now", "{}", "completed")]),
        (f"{SAID} Now:{SAID}", "stop", ["Let me see.", CALLED, " Now:Let me see.", CALLED]),
        (SAID.partition("\n")[2], "stop", [CALLED]),
        (SAID.partition("Rome")[0], "length", ["Let me see.", ("look", '{"city": "', "incomplete")]),
        ("<tool_call>no", "stop", ["<tool_call>no"]),
    ],
)
def test_calls_are_items_and_blocks(size: int, text: str, reason: FinishReason, items: list[Any]) -> None:
    service = says(text, size, reason)
    whole = post(service, RESPONSES, responses()).json()
    Response.model_validate(whole, strict=True)
    assert of_items(whole["output"]) == items
    assert whole["status"] == ("completed" if reason == "stop" else "incomplete")
    last = streamed(post(service, RESPONSES, responses(stream=True)).text)[-1]
    assert of_items(last["response"]["output"]) == items
    message = post(service, MESSAGES, messages()).json()
    Message.model_validate(message, strict=True)
    calls = [item for item in items if isinstance(item, tuple)]
    assert [(block["name"]) for block in message["content"] if block["type"] == "tool_use"] == [
        call[0] for call in calls
    ]
    expected = "max_tokens" if reason == "length" else "tool_use" if calls else "end_turn"
    assert message["stop_reason"] == expected
    told = streamed(post(service, MESSAGES, messages(stream=True)).text)
    assert told[-2]["delta"]["stop_reason"] == expected
    deltas = [event["delta"] for event in told if event["type"] == "content_block_delta"]
    assert "".join(delta.get("partial_json", "") for delta in deltas) == "".join(call[1] for call in calls)
    assert [event["content_block"]["type"] for event in told if event["type"] == "content_block_start"] == [
        block["type"] for block in message["content"]
    ]


def test_openais_client_calls_a_tool_and_tells_its_answer() -> None:
    service = says(SAID)

    async def use(client: openai.AsyncOpenAI) -> None:
        tools: Any = [LOOK, NOW]
        answer = await client.responses.create(model="base", input="Weather?", tools=tools)
        said, call = answer.output
        assert call.type == "function_call"
        assert (answer.output_text, call.name, json.loads(call.arguments)) == ("Let me see.", "look", {"city": "Rome"})
        async with client.responses.stream(model="base", input="Weather?", tools=tools) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(parts) == ARGUMENTS
        assert [item.type for item in final.output] == ["message", "function_call"]
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
        before: Any = [{"role": "user", "content": "Weather?"}, said.to_dict(), call.to_dict(), output]
        await client.responses.create(model="base", input=before, tools=tools)
        turns = service.calls[-1].prompt.messages
        assert [turn["role"] for turn in turns] == ["user", "assistant", "tool"]
        assert turns[1]["content"] == "Let me see."
        assert turns[1]["tool_calls"][0]["id"] == turns[2]["tool_call_id"] == call.call_id

    with_openai(service, use)


def test_anthropics_client_calls_a_tool_and_tells_its_answer() -> None:
    service = says(SAID)

    async def use(client: Any) -> None:
        asked = messages()
        answer = await client.messages.create(**asked)
        said, call = answer.content
        assert (said.text, call.name, call.input, answer.stop_reason) == (
            "Let me see.",
            "look",
            {"city": "Rome"},
            "tool_use",
        )
        async with client.messages.stream(**asked) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_message()
        assert "".join(event.partial_json for event in events if event.type == "input_json") == ARGUMENTS
        assert (final.content[1].input, final.stop_reason) == ({"city": "Rome"}, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
        more = [answer.to_param(), {"role": "user", "content": [result]}]
        await client.messages.create(**{**asked, "messages": [*asked["messages"], *more]})
        turns = service.calls[-1].prompt.messages
        assert [turn["role"] for turn in turns] == ["user", "assistant", "tool"]
        assert turns[1]["tool_calls"][0]["id"] == turns[2]["tool_call_id"] == call.id

    with_anthropic(service, use)
