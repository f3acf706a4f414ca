"""Examples as turns of a chat."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorauter.engine.types import Prompt
from lorauter.turns import ExampleTurns, chat_of, encoded, question_of

FAR, NEAR = ExampleTurns(2, "q2", "a2"), ExampleTurns(7, "q7", "a7")
LONE = Prompt(messages=({"role": "user", "content": "hi"},))


def encode(prompt: Prompt) -> tuple[int, ...]:
    return tuple(">".join(turn["content"] for turn in prompt.messages).encode())


def test_a_chat_is_the_same_whichever_example_is_the_nearest() -> None:
    chat = chat_of([NEAR, FAR], "hi")
    assert chat == chat_of([FAR, NEAR], "hi")
    assert [(turn["role"], turn["content"]) for turn in chat] == [
        ("user", "q2"), ("assistant", "a2"), ("user", "q7"), ("assistant", "a7"), ("user", "hi")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(text="hi"),
        Prompt(token_ids=(1, 2)),
        replace(LONE, messages=({"role": "system", "content": "be brief"}, *LONE.messages)),
        replace(LONE, messages=(*LONE.messages, {"role": "assistant", "content": "h"}, *LONE.messages)),
        replace(LONE, messages=({"role": "system", "content": "hi"},)),
        replace(LONE, tools=({"type": "function", "function": {"name": "f"}},)),
        replace(LONE, add_generation_prompt=False),
        replace(LONE, continue_final_message=True),
    ],
)
def test_only_a_users_one_turn_is_a_question(prompt: Prompt) -> None:
    assert question_of(LONE) == "hi"
    assert question_of(prompt) is None


@pytest.mark.parametrize(
    ("context", "max_tokens", "said", "shown"),
    [
        (100, 10, "q2>a2>q7>a7>hi", 2),
        (24, 10, "q2>a2>q7>a7>hi", 2),  # 14 tokens, and 10 for the answer
        (23, 10, "q7>a7>hi", 1),
        (14, 10, "hi", 0),
        (28, 1000, "q2>a2>q7>a7>hi", 2),  # who asks for all that there is keeps half of it
        (26, 1000, "q7>a7>hi", 1),
    ],
)
def test_examples_leave_room_for_the_answer(context: int, max_tokens: int, said: str, shown: int) -> None:
    ids = encoded(encode, LONE, [NEAR, FAR], context=context, max_tokens=max_tokens)
    assert ids == (tuple(said.encode()), shown)
    assert encoded(encode, LONE, [], context=1, max_tokens=1) == (tuple(b"hi"), 0)
