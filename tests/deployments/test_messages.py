"""Anthropic's Messages API in process: its blocks as a chat, and answers that its own types and client take."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any, Literal

import anthropic
import pytest
from anthropic.types import ErrorResponse, MessageTokensCount, RawMessageStreamEvent
from anthropic.types import Message as Answered
from fake_service import FakeService, post, send
from in_process import with_anthropic
from pydantic import BaseModel, TypeAdapter

from deployments.answers import Opening, Piece
from deployments.anthropic_answers import MessagesShape
from deployments.anthropic_types import MessagesBody
from deployments.options import parse_body
from lorauter.engine.types import Chunk, Grammar
from lorauter.errors import (
    AdapterRejected,
    AdapterUnavailable,
    ContextLengthExceeded,
    InvalidRequest,
    LorauterError,
    Overloaded,
    RateLimited,
)
from lorauter.tools.types import CallPiece

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a"}
HI = [{"role": "user", "content": "hi"}]
MARK = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def asked(**options: Any) -> dict[str, Any]:
    return {"model": "lorauter", "max_tokens": 9, "messages": HI, **options}


def read(raw: str) -> list[dict[str, Any]]:
    """A stream's events but for pings, each checked against Anthropic's own type."""
    told = []
    for text in raw.removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            assert EVENT.validate_json(data.removeprefix("data: "), strict=True).type == event["type"]
            told.append(event)
    return told


def joined(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events make; one block after the other."""
    first, *rest, delta, last = events
    assert (first["type"], delta["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    message: dict[str, Any] = first["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    is_open, arguments = False, ""
    for event in rest:
        assert event["index"] == len(message["content"]) - (event["type"] != "content_block_start")
        if event["type"] == "content_block_start":
            assert not is_open
            is_open, arguments = True, ""
            message["content"].append(event["content_block"])
            continue
        assert is_open
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use":
                block["input"] = json.loads(arguments)
        elif event["delta"]["type"] == "text_delta":
            block["text"] += event["delta"]["text"]
        else:
            arguments += event["delta"]["partial_json"]
    assert not is_open
    return {**message, **delta["delta"], "usage": delta["usage"]}


def without_id(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "id"}


def opened() -> Any:
    body = parse_body(MessagesBody, json.dumps(asked()))
    return MessagesShape().open(Opening(body.chat(), [{"tasks": []}], "fp", prompt_tokens=7, cached_tokens=2))


# --- answers


def test_an_answer_is_a_message() -> None:
    service = FakeService()
    response = post(service, MESSAGES, asked(temperature=1, top_k=5, top_p=0.5, stop_sequences=["x"]))
    assert response.status_code == 200
    answer = Answered.model_validate_json(response.text, strict=True)
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "Héllo"}]
    assert (answer.role, answer.model, answer.stop_reason, answer.stop_sequence) == (
        "assistant",
        "lorauter",
        "end_turn",
        None,
    )
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, 3)
    assert response.json()["lorauter"]["adapters"][0]["name"] == "adder"
    assert response.headers["x-lorauter-adapters"] == "adder=0.7500,poet=0.2500"
    sampling = service.calls[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (9, 1, 5, 0.5)
    assert sampling.stop == ("x",)


def test_a_stream_is_the_same_answer() -> None:
    raw = post(FakeService(), MESSAGES, asked(stream=True)).text
    assert 'event: ping\ndata: {"type": "ping"}\n\n' in raw
    whole = post(FakeService(), MESSAGES, asked()).json()
    assert without_id(joined(read(raw))) == without_id(whole)


@pytest.mark.parametrize(
    ("last", "reason", "string"),
    [
        (Chunk("l", (2,), "length"), "max_tokens", None),
        (Chunk("l", (2,), "stop"), "end_turn", None),
        (Chunk("l", (2,), "stop", stop_string="lo"), "stop_sequence", "lo"),
        (Chunk("", (2,), "stop", stop_string="lo"), "stop_sequence", "lo"),
    ],
)
def test_why_an_answer_ended(last: Chunk, reason: str, string: str | None) -> None:
    service = FakeService(answer=[Chunk("Hé", (1,)), last])
    for told in (
        post(service, MESSAGES, asked()).json(),
        joined(read(post(service, MESSAGES, asked(stream=True)).text)),
    ):
        assert (told["stop_reason"], told["stop_sequence"]) == (reason, string)
        Answered.model_validate(told, strict=True)


def test_an_answer_of_nothing_is_an_empty_text() -> None:
    service = FakeService(answer=[Chunk("", (1,), "stop")])
    assert joined(read(post(service, MESSAGES, asked(stream=True)).text))["content"] == [{"type": "text", "text": ""}]
    assert post(service, MESSAGES, asked()).json()["content"] == [{"type": "text", "text": ""}]


@pytest.mark.parametrize("seed", range(30))
def test_the_pieces_of_any_answer_make_the_whole(seed: int) -> None:
    draw = random.Random(seed)
    word = lambda: draw.choice(["", "Hé", " 日本", '"quoted" \\', "\n\n", "data: x", "\u2028"])  # noqa: E731
    texts = [word() for _ in range(draw.randrange(4))]
    calls = [json.dumps({word(): [word(), draw.random()]}) for _ in range(draw.randrange(3))]
    reason: Literal["stop", "tool_calls"] = "tool_calls" if calls else "stop"
    pieces = [Piece(text) for text in texts]
    places = []
    for index, arguments in enumerate(calls):
        cut = draw.randrange(len(arguments))
        places.append(len("".join(texts)))
        pieces.append(Piece("", calls=(CallPiece(index, "", f"call_{index}", f"f{index}", places[-1]),)))
        pieces += [Piece("", calls=(CallPiece(index, part),)) for part in (arguments[:cut], arguments[cut:])]
        texts.append(word())  # an answer may go on after a call
        pieces.append(Piece(texts[-1]))
    pieces.append(Piece("", reason))
    writer = opened()
    raw = writer.first() + b"".join(writer.piece(0, piece, 1) for piece in pieces) + writer.end(9)
    whole_calls = tuple(CallPiece(i, arguments, f"call_{i}", f"f{i}", places[i]) for i, arguments in enumerate(calls))
    whole = opened().whole([Piece("".join(texts), reason, calls=whole_calls)], 9)
    answer = Answered.model_validate(whole, strict=True)
    assert without_id(joined(read(raw.decode()))) == without_id(whole)
    assert [block.input for block in answer.content if block.type == "tool_use"] == [json.loads(each) for each in calls]
    assert answer.stop_reason == ("tool_use" if calls else "end_turn")
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens, answer.usage.output_tokens) == (5, 2, 9)


@pytest.mark.parametrize(
    ("arguments", "input"),
    [
        ('{"a": [1, {"b": "c', {"a": [1, {}]}),  # as Anthropic's own client has it
        ("", {}),
        ("[1", {}),
        ("nonsense", {}),
        ('{"a": NaN}', {}),
        ('{"a":' * 100_000, {}),
    ],
)
def test_a_call_that_is_cut_is_told_as_far_as_it_goes(arguments: str, input: dict[str, Any]) -> None:
    partial: Any = CallPiece(0, arguments, "call_0", "f")
    told = opened().whole([Piece("", "length", calls=(partial,))], 9)
    json.dumps(told, allow_nan=False)
    [block] = Answered.model_validate(told, strict=True).content
    assert block.type == "tool_use"
    assert block.input == input


# --- errors


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("no", param="stop"), 400, "invalid_request_error"),
        (ContextLengthExceeded(5000, 2048), 400, "invalid_request_error"),
        (AdapterRejected("has NaNs", adapter="poet"), 422, "invalid_request_error"),
        (RateLimited("slowly", retry_after_s=1), 429, "rate_limit_error"),
        (Overloaded("full", retry_after_s=1), 429, "overloaded_error"),
        (AdapterUnavailable("store down", adapter="poet"), 503, "api_error"),
        (RuntimeError("?"), 500, "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_anthropics_shape(error: Exception, status: int, kind: str, stream: bool) -> None:
    response = post(FakeService(first_error=error), MESSAGES, asked(stream=stream))
    assert response.status_code == status
    told = ErrorResponse.model_validate_json(response.text, strict=True)
    assert told.error.type == kind
    assert ("retry-after" in response.headers) == (status == 429)
    if isinstance(error, LorauterError):
        assert told.error.message == str(error).replace("stop", "stop_sequences")
        begun = post(FakeService(late_error=error), MESSAGES, asked(stream=True)).text
        name, data = begun.removesuffix("\n\n").rpartition("\n\n")[2].split("\n")
        assert name == "event: error"
        assert ErrorResponse.model_validate_json(data.removeprefix("data: "), strict=True).error.type == kind


def test_what_never_reaches_the_endpoint_is_told_in_its_words_too() -> None:
    service = FakeService()
    assert send(service, "GET", MESSAGES).json()["error"]["type"] == "invalid_request_error"
    assert send(service, "POST", MESSAGES, content=b"{}").json()["type"] == "error"  # no content type
    assert post(service, MESSAGES, b"{", max_body_bytes=1).json()["type"] == "error"
    large = post(service, COUNT, asked(system="x" * 1000), max_body_bytes=100)
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    nowhere = post(service, MESSAGES, asked(model="nowhere"))
    assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "not_found_error")
    assert "error" in send(service, "GET", "/v1/chat/completions").json()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a text, or a list"),
        ({"messages": [*HI, {"role": "tool", "content": "a"}]}, "messages.1.role"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages say nothing"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "role"),
        ({"messages": [*HI, {"role": "assistant", "content": [RESULT]}]}, "role"),
        (
            {"messages": [{"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
            "messages.0.content.0.content.0.type",
        ),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.1}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop": ["x"]}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences holds an empty string"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "tool"}}, "needs name"),
        ({"tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
        ({"n": 2}, "unknown option n"),
        ({"stream": 1}, "stream"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_its_name(options: dict[str, Any], says: str) -> None:
    response = post(FakeService(), MESSAGES, asked(**options))
    assert response.status_code == 400
    told = ErrorResponse.model_validate_json(response.text, strict=True)
    assert told.error.type == "invalid_request_error"
    assert says in told.error.message
    assert len(told.error.message) < 500


# --- what is asked


def test_blocks_are_the_turns_of_a_chat() -> None:
    service = FakeService()
    use = {"type": "tool_use", "id": "a", "name": "look", "input": {"in": "Rome"}, **MARK}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hello.", **MARK}, {"type": "text", "text": "Weather?"}]},
        {"role": "user", "content": "In Rome."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look.", "citations": None},
                use,
                {**use, "id": "b"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "sun"}], **MARK},
                {"type": "tool_result", "tool_use_id": "b", "content": "no net", "is_error": True},
                {"type": "text", "text": "And?"},
            ],
        },
        {"role": "system", "content": "Hurry."},
    ]
    system = [{"type": "text", "text": "Be.", **MARK}, {"type": "text", "text": "Brief."}]
    assert post(service, MESSAGES, asked(messages=messages, system=system, **MARK)).status_code == 200
    calls = [
        {"id": id, "type": "function", "function": {"name": "look", "arguments": {"in": "Rome"}}} for id in ("a", "b")
    ]
    assert service.calls[0].prompt.messages == (
        {"role": "system", "content": "Be.\n\nBrief.\n\nHurry."},
        {"role": "user", "content": "Hello.\n\nWeather?\n\nIn Rome."},
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "sun", "tool_call_id": "a", "name": "look"},
        {"role": "tool", "content": "Error: no net", "tool_call_id": "b", "name": "look"},
        {"role": "user", "content": "And?"},
    )
    assert service.calls[0].prompt.add_generation_prompt
    assert service.routed[0][0] == ["And?"]


def test_an_answer_goes_on_with_what_the_assistant_began() -> None:
    service = FakeService()
    post(service, MESSAGES, asked(messages=[*HI, {"role": "assistant", "content": "Well,"}]))
    prompt = service.calls[0].prompt
    assert prompt.continue_final_message
    assert not prompt.add_generation_prompt
    assert prompt.messages[-1] == {"role": "assistant", "content": "Well,"}
    for nothing in ("", [{"type": "text", "text": ""}], [{"type": "thinking", "thinking": "hm", "signature": "s"}]):
        post(service, MESSAGES, asked(messages=[*HI, {"role": "assistant", "content": nothing}]))
        assert service.calls[-1].prompt.messages == tuple(HI)
        assert service.calls[-1].prompt.add_generation_prompt


def test_tokens_are_counted_as_they_would_be_asked() -> None:
    counted = post(FakeService(), COUNT, {"model": "lorauter", "messages": HI, "system": "Be.", "tools": []})
    assert MessageTokensCount.model_validate_json(counted.text, strict=True).input_tokens == 5
    assert post(FakeService(), COUNT, asked()).json()["error"]["message"] == "unknown option max_tokens"
    assert "characters" in post(FakeService(), COUNT, {"model": "m", "messages": HI}, max_prompt_chars=1).text


# --- Anthropic's client


class Word(BaseModel):
    word: Literal["yes", "no"]


def test_anthropics_client_creates_streams_parses_and_counts() -> None:
    async def use(client: anthropic.AsyncAnthropic) -> None:
        hi: Any = HI
        whole = await client.messages.create(
            model="lorauter", max_tokens=9, messages=hi, extra_body={"lorauter": {"top_k": 1}}
        )
        async with client.messages.stream(model="poet", max_tokens=9, messages=hi) as stream:
            texts = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
        assert "".join(texts) == "Héllo"
        assert final.content[0].to_dict()["text"] == whole.content[0].to_dict()["text"] == "Héllo"
        assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 3)
        assert (await client.messages.count_tokens(model="poet", messages=hi)).input_tokens == 2
        service.answer = [Chunk('{"word": ', (1,)), Chunk('"yes"}', (2,), "stop")]
        parsed = await client.messages.parse(model="poet", max_tokens=9, messages=hi, output_format=Word)
        assert parsed.parsed_output == Word(word="yes")
        grammar = service.calls[-1].sampling.grammar
        assert isinstance(grammar, Grammar)
        assert json.loads(grammar.text)["required"] == ["word"]
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="nowhere", max_tokens=9, messages=hi)
        service.late_error = AdapterUnavailable("store down", adapter="poet")
        with pytest.raises(anthropic.APIStatusError, match="store down"):
            async with client.messages.stream(model="poet", max_tokens=9, messages=hi) as stream:
                await stream.get_final_message()

    service = FakeService(pause=lambda: asyncio.sleep(0.1))  # pings come
    with_anthropic(service, use)
    assert service.routed[0][1].top_k == 1
