"""OpenAI's Responses API in process: its items as a chat, and answers that its own types and client take."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any, Literal

import openai
import pytest
from fake_service import FakeService, post, refused
from in_process import with_openai
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from deployments.answers import Opening, Piece
from deployments.options import parse_body
from deployments.responses_answers import ResponsesShape
from deployments.responses_types import ResponsesBody
from lorauter.engine.types import Chunk, Logprob, TokenLogprobs
from lorauter.errors import AdapterUnavailable, Overloaded
from lorauter.tools.types import CallPiece

RESPONSES = "/v1/responses"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
ENDS = ("response.completed", "response.incomplete", "response.failed")


def asked(**options: Any) -> dict[str, Any]:
    return {"model": "lorauter", "input": "hi", **options}


def read(raw: str) -> list[dict[str, Any]]:
    """A stream's events, each checked against OpenAI's own type, all in the right order."""
    told = []
    for number, text in enumerate(raw.removesuffix("\n\n").split("\n\n")):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        checked = EVENT.validate_json(data.removeprefix("data: "), strict=True)
        assert name == f"event: {event['type']}"
        assert checked.type == event["type"]
        assert checked.sequence_number == number
        told.append(event)
    assert [event["type"] for event in told[:2]] == ["response.created", "response.in_progress"]
    assert [event["type"] in ENDS for event in told] == [False] * (len(told) - 1) + [True]
    return told


def joined(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that the pieces of a stream make; one item after the other, each done before the next."""
    output: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert not is_open
            is_open = True
            output.append(event["item"])
        elif kind == "content_part.added":
            output[-1]["content"].append(event["part"])
        elif kind == "output_text.delta":
            output[-1]["content"][0]["text"] += event["delta"]
            output[-1]["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "function_call_arguments.delta":
            output[-1]["arguments"] += event["delta"]
        elif kind == "output_text.done":
            assert event["text"] == output[-1]["content"][0]["text"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == output[-1]["arguments"]
        elif kind == "output_item.done":
            output[-1]["status"] = event["item"]["status"]
            assert event["item"] == output[-1]
            is_open = False
        if "output_index" in event:
            assert event["output_index"] == len(output) - 1
            assert event.get("item_id", output[-1]["id"]) == output[-1]["id"]
    assert not is_open
    return output


def without_ids(output: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name != "id"} for item in output]


def opened(**options: Any) -> Any:
    body = parse_body(ResponsesBody, json.dumps(asked(**options)))
    return ResponsesShape(body).open(Opening(body.chat(), [{"tasks": []}], "fp", prompt_tokens=7, cached_tokens=2))


# --- answers


def test_an_answer_is_a_response() -> None:
    service = FakeService()
    asking = asked(instructions="Be brief.", max_output_tokens=9, metadata={"a": "b"}, temperature=0.5, user="me")
    response = post(service, RESPONSES, asking)
    assert response.status_code == 200
    answer = Response.model_validate_json(response.text, strict=True)
    assert answer.output_text == "Héllo"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (7, 3, 10)
    told = response.json()
    assert {name: told[name] for name in asking if name != "input"} == {k: v for k, v in asking.items() if k != "input"}
    assert told["lorauter"]["adapters"][0]["name"] == "adder"
    assert told["store"] is False
    assert response.headers["x-lorauter-adapters"] == "adder=0.7500,poet=0.2500"
    call = service.calls[0]
    assert call.prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    )
    assert (call.sampling.max_tokens, call.sampling.temperature) == (9, 0.5)


def test_a_stream_is_the_same_answer() -> None:
    events = read(post(FakeService(), RESPONSES, asked(stream=True)).text)
    assert [event["delta"] for event in events if "delta" in event] == ["Hé", "llo"]
    whole = post(FakeService(), RESPONSES, asked()).json()
    last = events[-1]["response"]
    assert without_ids(joined(events)) == without_ids(last["output"]) == without_ids(whole["output"])
    assert last["usage"] == whole["usage"]
    assert events[0]["response"]["lorauter"] == last["lorauter"] == whole["lorauter"]
    assert last.keys() == whole.keys()


def test_an_answer_that_is_cut_is_incomplete() -> None:
    service = FakeService(answer=[Chunk("Hé", (1,)), Chunk("l", (2,), "length")])
    events = read(post(service, RESPONSES, asked(stream=True)).text)
    assert events[-1]["type"] == "response.incomplete"
    for told in (events[-1]["response"], post(service, RESPONSES, asked()).json()):
        assert Response.model_validate(told, strict=True).incomplete_details.reason == "max_output_tokens"  # type: ignore[union-attr]
        assert (told["status"], told["output"][0]["status"]) == ("incomplete", "incomplete")


def test_an_answer_of_nothing_is_an_empty_message() -> None:
    service = FakeService(answer=[Chunk("", (1,), "stop")])
    assert joined(read(post(service, RESPONSES, asked(stream=True)).text))[0]["content"][0]["text"] == ""
    assert Response.model_validate(post(service, RESPONSES, asked()).json(), strict=True).output_text == ""


def merged(pieces: Sequence[Piece]) -> Piece:
    """What came at the same time."""
    calls = tuple(call for piece in pieces for call in piece.calls)
    return Piece("".join(piece.text for piece in pieces), pieces[-1].finish_reason, calls=calls)


@pytest.mark.parametrize("seed", range(30))
def test_the_pieces_of_any_answer_make_the_whole(seed: int) -> None:
    draw = random.Random(seed)
    word = lambda: draw.choice(["", "Hé", " 日本", '"quoted" \\', "\n\n", "data: x", "\u2028"])  # noqa: E731
    texts = [word() for _ in range(draw.randrange(4))]
    calls = [[word() for _ in range(draw.randrange(1, 4))] for _ in range(draw.randrange(3))]
    reason: Literal["stop", "length"] = draw.choice(["stop", "length"])
    pieces = [Piece(text) for text in texts]
    places = []
    for index, arguments in enumerate(calls):
        places.append(len("".join(texts)))
        pieces.append(Piece("", calls=(CallPiece(index, "", f"call_{index}", f"f{index}", places[-1]),)))
        pieces += [Piece("", calls=(CallPiece(index, part),)) for part in arguments]
        texts.append(word())  # an answer may go on after a call
        pieces.append(Piece(texts[-1]))
    pieces.append(Piece("", reason))
    if draw.random() < 0.5:
        pieces = [merged(pieces[:3]), *pieces[3:]]
    writer = opened()
    raw = writer.first() + b"".join(writer.piece(0, piece, 1) for piece in pieces) + writer.end(9)
    events = read(raw.decode())
    whole_calls = tuple(CallPiece(i, "".join(parts), f"call_{i}", f"f{i}", places[i]) for i, parts in enumerate(calls))
    whole = opened().whole([Piece("".join(texts), reason, calls=whole_calls)], 9)
    Response.model_validate(whole, strict=True)
    assert without_ids(joined(events)) == without_ids(events[-1]["response"]["output"]) == without_ids(whole["output"])
    assert [item["call_id"] for item in whole["output"] if item["type"] == "function_call"] == [
        f"call_{i}" for i in range(len(calls))
    ]


@pytest.mark.parametrize("options", [{"top_logprobs": 1}, {"include": ["message.output_text.logprobs"]}])
def test_logprobs(options: dict[str, Any]) -> None:
    one = TokenLogprobs(Logprob(1, -0.5, 1, b"H\xc3"), (Logprob(2, -0.25, 1, b"x"),))
    service = FakeService(answer=[Chunk("Hé", (1,), "stop", logprobs=(one,))])
    answer = Response.model_validate_json(post(service, RESPONSES, asked(**options)).text, strict=True)
    told = answer.output[0].content[0].logprobs  # type: ignore[union-attr]
    assert [(each.logprob, each.bytes) for each in told] == [(-0.5, [72, 195])]  # type: ignore[union-attr]
    assert service.calls[0].sampling.logprobs == options.get("top_logprobs", 0)
    events = read(post(service, RESPONSES, asked(stream=True, **options)).text)
    assert without_ids(joined(events)) == without_ids(json.loads(answer.to_json())["output"])


def test_logprobs_are_told_with_their_text_and_are_of_text_alone() -> None:
    def told(token: str) -> dict[str, Any]:
        return {"logprobs": {"content": [{"token": token, "logprob": -1.0, "bytes": [], "top_logprobs": []}]}}

    pieces = [
        Piece("", within=told("a")),
        Piece("ab", within=told("b")),
        Piece("", within=told("<call>")),
        Piece("", within=told("f"), calls=(CallPiece(0, "", "call_0", "f", 2),)),
        Piece("", within=told("{}"), calls=(CallPiece(0, "{}"),)),
        Piece("", "stop", within=told("<end>")),
    ]
    writer = opened()
    raw = writer.first() + b"".join(writer.piece(0, piece, 1) for piece in pieces) + writer.end(9)
    message, call = joined(read(raw.decode()))
    assert [one["token"] for one in message["content"][0]["logprobs"]] == ["a", "b"]
    assert (message["content"][0]["text"], call["arguments"]) == ("ab", "{}")
    writer = opened()
    raw = writer.first() + b"".join(writer.piece(0, one, 1) for one in [*pieces[:2], pieces[-1]]) + writer.end(9)
    [message] = joined(read(raw.decode()))
    assert [one["token"] for one in message["content"][0]["logprobs"]] == ["a", "b", "<end>"]


def test_an_error_ends_a_stream() -> None:
    service = FakeService(late_error=AdapterUnavailable("store down", adapter="poet"))
    raw = post(service, RESPONSES, asked(stream=True)).text
    told = read(raw)
    assert [event["type"] for event in told[-2:]] == ["error", "response.failed"]
    assert told[-2]["code"] == "adapter_unavailable"
    failed = told[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["output"][0]["content"][0]["text"] == "Hé"


# --- what is asked


def test_items_are_the_turns_of_a_chat() -> None:
    service = FakeService()
    dumped = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "phase": None}
    said = [{"type": "output_text", "text": "I look", "annotations": [], "logprobs": []}]
    items = [
        {"role": "developer", "content": "Brief.", "type": None},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {**dumped, "content": said},
        {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "look", "arguments": '{"in": "Rome"}'},
        {"role": "assistant", "content": "twice"},
        {"type": "function_call", "call_id": "b", "name": "look", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "a", "output": "sun"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    assert post(service, RESPONSES, asked(instructions="Be.", input=items)).status_code == 200
    calls = [
        {"id": id, "type": "function", "function": {"name": "look", "arguments": arguments}}
        for id, arguments in (("a", {"in": "Rome"}), ("b", {}))
    ]
    assert service.calls[0].prompt.messages == (
        {"role": "system", "content": "Be.\n\nBrief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look\n\ntwice", "tool_calls": calls},
        {"role": "tool", "content": "sun", "tool_call_id": "a", "name": "look"},
        {"role": "tool", "content": "rain", "tool_call_id": "b", "name": "look"},
    )
    assert service.routed[0][0] == ["Weather?"]


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content", "a text, or a list of parts"),
        ({"input": [{"role": "user"}]}, "input.0.content", "required"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "pope", "content": "b"}]}, "input.1.role", "pope"),
        ({"input": [{"type": "computer_call"}]}, "input.0.type", "computer_call"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "item_reference"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input.0.call_id", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
            "input_image",
        ),
        ({"input": []}, "input", "empty"),
        ({"input": ["a"]}, "input.0", "object"),
        ({"input": 5}, "input", "a text, or a list of items"),
        ({"input": " "}, "input", "empty"),
        ({"input": [{"role": "assistant", "content": "a"}]}, "input", "no user message"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", "at most max_output_tokens, 2"),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
            "got text.format, structured_outputs.regex",
        ),
        ({"input": [{"type": "reasoning"}]}, "input", "option input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": "conv_1"}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "never cut"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "high"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "low"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "function"),
        ({"messages": []}, "messages", "unknown"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ],
)
def test_what_is_wrong_is_told_by_its_name(options: dict[str, Any], param: str, says: str) -> None:
    error = refused(post(FakeService(), RESPONSES, asked(**options)), 400)
    assert error["param"] == param
    assert says in error["message"]


def test_a_prompt_that_is_too_long_is_the_inputs_fault() -> None:
    error = refused(post(FakeService(), RESPONSES, asked(input="x" * 100), max_prompt_chars=50), 400)
    assert error["param"] == "input"
    busy = post(FakeService(load_error=Overloaded("full", retry_after_s=3)), RESPONSES, asked())
    refused(busy, 429, "overloaded")
    assert busy.headers["retry-after"] == "3"


def test_options_that_ask_for_nothing_here_are_taken() -> None:
    service = FakeService()
    neutral = {
        "store": True,
        "include": ["reasoning.encrypted_content", "file_search_call.results"],
        "reasoning": {"effort": None, "summary": "auto"},
        "truncation": "disabled",
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "stream_options": {"include_obfuscation": False},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tools": [],
        "tool_choice": "auto",
        "previous_response_id": None,
        "background": False,
    }
    assert post(service, RESPONSES, asked(**neutral)).status_code == 200
    assert post(service, RESPONSES, asked()).status_code == 200
    assert service.calls[0].sampling == service.calls[1].sampling
    assert service.calls[0].prompt == service.calls[1].prompt


# --- OpenAI's client


class Answer(BaseModel):
    word: Literal["yes", "no"]


def test_openais_client_creates_streams_and_parses() -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        whole = await client.responses.create(model="lorauter", input="hi", extra_body={"lorauter": {"top_k": 1}})
        assert whole.output_text == "Héllo"
        async with client.responses.stream(model="poet", input="hi") as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert "".join(deltas) == final.output_text == "Héllo"
        service.answer = [Chunk('{"word": ', (1,)), Chunk('"yes"}', (2,), "stop")]
        parsed = await client.responses.parse(model="poet", input="hi", text_format=Answer)
        assert parsed.output_parsed == Answer(word="yes")
        grammar = service.calls[-1].sampling.grammar
        assert grammar is not None
        assert (grammar.kind, json.loads(grammar.text)["required"]) == ("json", ["word"])
        await client.responses.create(model="poet", input="hi", text={"format": {"type": "json_object"}})
        assert service.calls[-1].sampling.grammar == grammar.__class__("json", '{"type": "object"}')
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            await client.responses.create(model="poet", input="hi", previous_response_id="resp_1")
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="nowhere", input="hi")

    service = FakeService(pause=lambda: asyncio.sleep(0.1))  # pings come
    with_openai(service, use)
    assert service.routed[0][1].top_k == 1
