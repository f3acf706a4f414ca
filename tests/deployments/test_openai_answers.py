from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.openai_answers import CHAT, TEXT, EventEncoder, Shape

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
    choice: dict[str, Any] = {"index": 0, **shape.delta(text), "finish_reason": reason, "logprobs": None}
    assert json.loads(raw.removeprefix("data: ")) == {**HEAD, "choices": [choice]}
