from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.answers import Opening, Piece
from deployments.openai_answers import CHAT, FUNCTIONS, TEXT, EventEncoder, Shape
from deployments.openai_types import ChatBody
from lorauter.tools.types import CallPiece

HEAD = {"id": "x-1", "object": "piece", "created": 1, "model": 'a "model"\n'}


@pytest.mark.parametrize("shape", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize("reason", [None, "stop"])
@pytest.mark.parametrize(
    "text", ["", "word", ' "quoted" \\ ', "a\nb\r\tc\x00\x1f\x7f", "Héllo 日本 🎉", "\u2028\u2029", "data: [DONE]\n\n"]
)
def test_a_piece_is_one_event_whatever_its_text(shape: Shape, reason: str | None, text: str) -> None:
    raw = EventEncoder(HEAD, shape).piece(text, reason).decode()
    assert raw.startswith("data: ")
    assert raw.endswith("\n\n")
    assert raw.count("\n") == 2
    choice: dict[str, Any] = {"index": 0, **shape.delta(text, ()), "finish_reason": reason, "logprobs": None}
    assert json.loads(raw.removeprefix("data: ")) == {**HEAD, "choices": [choice]}


OPENING = Opening(
    ChatBody(model="base", messages=[{"role": "user", "content": "hi"}]), [{}], "fp", prompt_tokens=3, cached_tokens=0
)
FIRST, MORE = CallPiece(0, "", "call_1", "look"), CallPiece(0, '{"a": 1}')


def deltas(shape: Shape, *pieces: Piece) -> list[Any]:
    """The deltas and reasons of pieces."""
    writer = shape.open(OPENING)
    raw = b"".join(writer.piece(0, piece, 1) for piece in pieces).decode()
    choices = [json.loads(one.removeprefix("data: "))["choices"][0] for one in raw.split("\n\n")[:-1]]
    return [choice["finish_reason"] or choice["delta"] for choice in choices]


def test_calls_are_written_as_tools_are_and_as_functions_were() -> None:
    pieces = [Piece("Wait.", calls=(FIRST,)), Piece("", "tool_calls", calls=(MORE,))]
    assert deltas(CHAT, *pieces) == [
        {"content": "Wait."},
        {
            "tool_calls": [
                {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]},
        "tool_calls",
    ]
    assert deltas(FUNCTIONS, *pieces) == [
        {"content": "Wait."},
        {"function_call": {"name": "look", "arguments": ""}},
        {"function_call": {"arguments": '{"a": 1}'}},
        "function_call",
    ]


@pytest.mark.parametrize(("said", "content"), [("", None), ("Wait.", "Wait.")])
def test_a_whole_answer_has_no_content_where_it_is_but_a_call(said: str, content: str | None) -> None:
    piece = Piece(said, "tool_calls", calls=(CallPiece(0, '{"a": 1}', "call_1", "look"),))
    function = {"name": "look", "arguments": '{"a": 1}'}
    [choice] = CHAT.open(OPENING).whole([piece], 1)["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }
    assert choice["finish_reason"] == "tool_calls"
    [choice] = FUNCTIONS.open(OPENING).whole([piece], 1)["choices"]
    assert choice["message"] == {"role": "assistant", "content": content, "function_call": function}
    assert choice["finish_reason"] == "function_call"
