"""Tools over HTTP: what may be asked, and what comes of it in OpenAI's shapes.

Free answers are scripted; those that have to be calls are made by an engine on the counting model, whose clients' types
are OpenAI's own.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

import counting
import jsonschema
import openai.types.chat as of_chat
import pytest
from engine_service import EngineService
from fake_service import CHAT, FakeService, chat, events, post, refused

from deployments.calls import Admitted, GenerateCall
from lorauter.engine import Chunk, EngineConfig, MultiLoraEngine
from lorauter.engine.text import TextCodec
from lorauter.engine.types import FinishReason
from lorauter.tools.formats import FormatName

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
}
LOOK = {"type": "function", "function": {"name": "look", "description": "The weather.", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "look"}}
ARGUMENTS = '{"city": "Rome", "days": 1}'
CALLED = f'<tool_call>\n{{"name": "look", "arguments": {ARGUMENTS}}}\n</tool_call>'


@dataclass
class Scripted(FakeService):
    """Says a text, a letter a token."""

    text: str = ""
    reason: FinishReason = "stop"
    format: FormatName = "hermes"
    size: int = 3

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Admitted | Chunk]:
        self.calls.append(call)
        yield Admitted(7, tool_format=self.format if call.prompt.tools else None)
        for choice in call.choices:
            for start in range(0, len(self.text), self.size):
                piece = self.text[start : start + self.size]
                yield Chunk(piece, tuple(map(ord, piece)), index=choice.place)
            yield Chunk("", (0,), self.reason, index=choice.place)


def asked(service: FakeService, **options: Any) -> Any:
    """The choices of a chat with tools, whole, after a look at whether they are the same streamed."""
    body = chat("base", **{"tools": [LOOK, NOW], **options})
    response = post(service, CHAT, body)
    assert response.status_code == 200, response.text
    answer = response.json()
    of_chat.ChatCompletion.model_validate(answer)
    streamed = [collected(pieces) for pieces in streamed_choices(service, body)]
    for choice, (message, reason) in zip(answer["choices"], streamed, strict=True):
        told = json.loads(json.dumps(choice["message"]))
        for call in told.get("tool_calls", ()):
            call.pop("id")
        assert (told, choice["finish_reason"]) == (message, reason)
    return answer["choices"]


def streamed_choices(service: FakeService, body: Any) -> list[list[Any]]:
    """The pieces of each choice of a stream."""
    came = events(post(service, CHAT, {**body, "stream": True}))
    assert came[-1] == "[DONE]"
    choices: dict[int, list[Any]] = {}
    for one in came[:-1]:
        of_chat.ChatCompletionChunk.model_validate(one)
        for choice in one["choices"]:
            choices.setdefault(choice["index"], []).append(choice)
    return [choices[index] for index in sorted(choices)]


def collected(pieces: list[Any]) -> tuple[Any, str]:
    """A stream's message, as a client puts it together, without ids."""
    content, calls, function = "", list[Any](), dict[str, str]()
    for piece in pieces:
        delta = piece["delta"]
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["id"]
                assert call["function"]["arguments"] == ""
                calls.append({"type": call["type"], "function": {"name": call["function"]["name"], "arguments": ""}})
            else:
                assert call.keys() == {"index", "function"}
                assert call["function"].keys() == {"arguments"}
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        for name, value in delta.get("function_call", {}).items():
            function[name] = function.get(name, "") + value
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    if function:
        message |= {"content": content or None, "function_call": function}
    [reason] = [piece["finish_reason"] for piece in pieces if piece["finish_reason"]]
    return message, reason


def of(call: Any) -> tuple[str, Any]:
    return call["function"]["name"], json.loads(call["function"]["arguments"])


LOOKED = ("look", json.loads(ARGUMENTS))


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("before", ["", "Let me see."])
def test_a_call_in_free_text(before: str, size: int) -> None:
    [choice] = asked(Scripted(text=f"{before}\n{CALLED}\n{CALLED}", size=size))
    assert choice["message"]["content"] == (before or None)
    assert list(map(of, choice["message"]["tool_calls"])) == [LOOKED, LOOKED]
    assert choice["finish_reason"] == "tool_calls"
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2


def test_formats_of_other_families() -> None:
    llama = ARGUMENTS.join(['{"name": "look", "parameters": ', "}"])
    assert of(asked(Scripted(text=llama, format="llama"))[0]["message"]["tool_calls"][0]) == LOOKED
    mistral = f'[TOOL_CALLS] [{{"name": "look", "arguments": {ARGUMENTS}}}]'
    [call] = asked(Scripted(text=mistral, format="mistral"))[0]["message"]["tool_calls"]
    assert of(call) == LOOKED
    assert len(call["id"]) == 9


@pytest.mark.parametrize("said", ["Sunny.", CALLED.replace("look", "walk"), CALLED.replace("{", ""), "<tool_call>"])
def test_what_is_no_call_stays_text(said: str) -> None:
    [choice] = asked(Scripted(text=said))
    assert choice["message"] == {"role": "assistant", "content": said}
    assert choice["finish_reason"] == "stop"


def test_a_call_that_is_cut() -> None:
    [choice] = asked(Scripted(text=CALLED[: CALLED.index("Rome")], reason="length"))
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "'
    assert choice["finish_reason"] == "length"


def test_one_call_where_several_are_not_wanted() -> None:
    [choice] = asked(Scripted(text=f"{CALLED}\n{CALLED}"), parallel_tool_calls=False)
    assert len(choice["message"]["tool_calls"]) == 1


def test_several_answers_with_probabilities_and_usage() -> None:
    service = Scripted(text=CALLED)
    choices = asked(service, n=2, return_token_ids=True)
    assert [of(choice["message"]["tool_calls"][0]) for choice in choices] == [LOOKED, LOOKED]
    assert all(len(choice["token_ids"]) == len(CALLED) + 1 for choice in choices)
    told = post(service, CHAT, chat("base", tools=[LOOK])).json()["usage"]
    assert told["completion_tokens"] == len(CALLED) + 1


def test_functions_are_tools_by_an_older_name() -> None:
    functions = [LOOK["function"]]
    [choice] = asked(Scripted(text=f"{CALLED}\n{CALLED}"), tools=None, functions=functions)
    assert choice["message"]["function_call"] == {"name": "look", "arguments": ARGUMENTS}
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "function_call"


def test_what_the_template_and_the_engine_are_told() -> None:
    service = Scripted()
    for options in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": "required"}):
        post(service, CHAT, chat(tools=[LOOK, NOW], **options))
    free, auto, none, required = service.calls
    nothing = {"type": "object", "properties": {}}
    shown = (LOOK, {"type": "function", "function": {"name": "now", "description": "", "parameters": nothing}})
    assert free.prompt.tools == auto.prompt.tools == required.prompt.tools == shown
    assert (none.prompt.tools, none.sampling.calls) == ((), None)
    assert free.sampling.calls is not None
    assert not free.sampling.is_held
    assert required.sampling.calls is not None
    assert required.sampling.is_held
    assert service.routed[0][0] == ["hi"]  # tools decide nothing of the routing
    post(service, CHAT, chat(tools=[{**LOOK, "function": {**LOOK["function"], "strict": True}}]))
    assert service.calls[-1].sampling.is_held


def with_schema(schema: Any) -> Any:
    return [{"type": "function", "function": {"name": "f", "parameters": schema}}]


@pytest.mark.parametrize(
    ("options", "param", "needle"),
    [
        ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "walk"}}}, "tool_choice", "walk"),
        ({"tools": [LOOK], "tool_choice": "sometimes"}, "tool_choice", "required"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tool_choice": NAMED}, "tool_choice", "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "tools"),
        ({"tools": [LOOK, NOW, LOOK]}, "tools.2.function.name", "look"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "function"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [LOOK] * 129}, "tools", "128"),
        ({"tools": with_schema({"type": "string"})}, "tools.0.function.parameters.type", "object"),
        ({"tools": with_schema({"type": "object", "properties": {"a": {"type": "strnig"}}})},
         "tools.0.function.parameters.properties.a.type", "strnig"),
        ({"tools": with_schema({"properties": {"a": 5}})}, "tools.0.function.parameters.properties.a", "a number"),
        ({"tools": with_schema({"properties": []})}, "tools.0.function.parameters.properties", "a list"),
        ({"tools": with_schema({"required": "a"})}, "tools.0.function.parameters.required", "names"),
        ({"tools": [LOOK], "functions": [LOOK["function"]]}, "functions", "tools"),
        ({"tools": [LOOK], "function_call": {"name": "look"}}, "function_call", "functions"),
        ({"functions": [LOOK["function"]], "tool_choice": "required"}, "tool_choice", "tools"),
        ({"functions": [LOOK["function"]], "function_call": {"name": "walk"}}, "function_call", "walk"),
        ({"function_call": {"name": "look"}}, "function_call", "functions"),
        ({"tools": [LOOK], "parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_by_name(options: Any, param: str, needle: str) -> None:
    service = FakeService()
    error = refused(post(service, CHAT, chat(**options)), 400)
    assert error["param"] == param
    assert needle in error["message"]
    assert not service.calls


def test_long_names_in_a_schema_take_no_room() -> None:
    tools = with_schema({"properties": {f"-{'a' * 60_000}-": {"anyOf": [{}] * 5_000 + [3]}}})
    tracemalloc.start()
    try:
        error = refused(post(FakeService(), CHAT, chat(tools=tools)), 400)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    assert error["param"].startswith("tools.0.function.parameters.properties.-aaa")
    assert len(error["param"]) <= 300
    assert "got a number, needed a JSON schema" in error["message"]


@pytest.fixture(scope="module")
def service() -> Iterator[EngineService]:
    codec = TextCodec(counting.byte_tokenizer(), tool_format="hermes")
    config = EngineConfig(max_batch=8, max_model_len=2048, adapter_bytes=1 << 16)
    engine = MultiLoraEngine(counting.CountingDecoder(), codec, config)
    yield EngineService(engine)
    engine.close()


@pytest.mark.parametrize("choice", ["required", NAMED, "allowed"])
def test_a_forced_call_is_one_of_its_schema(service: EngineService, choice: Any) -> None:
    if choice == "allowed":
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    [told] = asked(service, tool_choice=choice, parallel_tool_calls=False)
    [call] = told["message"]["tool_calls"]
    assert told["message"]["content"] is None
    if choice != "required":
        assert call["function"]["name"] == "look"
    if call["function"]["name"] == "look":
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    assert told["finish_reason"] == ("stop" if choice == NAMED else "tool_calls")


def test_forced_calls_with_everything_beside(service: EngineService) -> None:
    choices = asked(service, tool_choice=NAMED, n=2, temperature=1, seed=3, logprobs=True, max_tokens=300)
    for choice in choices:
        [call] = choice["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
        assert choice["logprobs"]["content"]


def test_a_forced_call_may_be_cut_anywhere(service: EngineService) -> None:
    whole = '<tool_call>\n{"name": "look", "arguments": '
    for most in (1, len(whole), len(whole) + 1, len(whole) + 5):
        [choice] = asked(service, tool_choice=NAMED, max_tokens=most)
        assert choice["finish_reason"] == "length"
        assert not choice["message"]["content"]
        assert bool(choice["message"].get("tool_calls")) == (most > len(whole))
    [choice] = asked(service, tool_choice=NAMED, stop='"city"')
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].strip() == "{"


def test_a_forced_function(service: EngineService) -> None:
    functions = [LOOK["function"]]
    [choice] = asked(service, tools=None, functions=functions, function_call={"name": "look"})
    jsonschema.validate(json.loads(choice["message"]["function_call"]["arguments"]), SCHEMA)


def test_a_form_of_answers_goes_with_tools(service: EngineService) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["sunny"]}}}
    [choice] = asked(service, response_format=form)
    assert choice["message"].get("tool_calls") or json.loads(choice["message"]["content"]) == "sunny"
    [choice] = asked(service, response_format=form, tool_choice="required")
    assert choice["message"]["tool_calls"]


def test_a_schema_that_no_answer_can_be_held_to_is_told_with_its_place(service: EngineService) -> None:
    tools = with_schema({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}})
    error = refused(post(service, CHAT, chat(tools=tools, tool_choice="required")), 400)
    assert error["param"] == "tools.0.function.parameters"
    assert "properties.a" in error["message"]


def test_the_history_has_calls_and_results_of_both_names(service: EngineService) -> None:
    user = {"role": "user", "content": "Weather?"}
    function = {"name": "look", "arguments": ARGUMENTS}
    calls = [{"id": "c1", "type": "function", "function": function}]
    talks = [
        [user, {"role": "assistant", "content": None, "tool_calls": calls},
         {"role": "tool", "tool_call_id": "c1", "content": "Sunny"}],
        [user, {"role": "assistant", "content": None, "function_call": function},
         {"role": "function", "name": "look", "content": "Sunny"}],
    ]  # fmt: skip
    texts = []
    for messages in talks:
        body = {"model": "base", "messages": messages, "tools": [LOOK], "max_tokens": 3}
        assert post(service, CHAT, body).status_code == 200
        texts.append(service.engine.codec.decode(service.engine.codec.encode(service.calls[-1].prompt)))
    assert texts[0] == texts[1]
    assert f'{{"name": "look", "arguments": {ARGUMENTS}}}' in texts[0]
    assert "<tool_response>\nSunny\n</tool_response>" in texts[0]
