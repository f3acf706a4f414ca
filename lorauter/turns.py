"""A task's examples as turns of a chat before a query. Knows nothing of which are chosen, nor why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lorauter.engine.types import Prompt


class ExampleTurns(NamedTuple):
    """An example as a user's turn and its answer.

    Attributes:
        place: among its task's validation examples.
        tokens: that it takes in a prompt; 0 where that is not known.
    """

    place: int
    input: str
    target: str
    tokens: int = 0


def chat_of(examples: Iterable[ExampleTurns], text: str) -> tuple[dict[str, str], ...]:
    """A chat that asks `text` after examples.

    These are in the order of their places, whatever theirs is: queries that are given the same ones begin alike, and
    share what is computed of it.
    """
    shown = sorted(examples, key=lambda example: example.place)
    turns = [turn for e in shown for turn in (_turn("user", e.input), _turn("assistant", e.target))]
    return (*turns, _turn("user", text))


def question_of(prompt: Prompt) -> str | None:
    """The text of a prompt that is a user's one turn, and asks for an answer to it; None where it is more, or less."""
    if len(prompt.messages) != 1 or prompt.tools or prompt.continue_final_message or not prompt.add_generation_prompt:
        return None
    [turn] = prompt.messages
    return turn["content"] if turn["role"] == "user" else None


def encoded(
    encode: Callable[[Prompt], Sequence[int]],
    prompt: Prompt,
    examples: Sequence[ExampleTurns],
    *,
    context: int,
    max_tokens: int,
) -> tuple[Sequence[int], int]:
    """A prompt's tokens after as many of its examples as there is room for, the nearest, and how many these are.

    They leave the answer the tokens that it may have, or half of the context.

    Args:
        prompt: a user's one turn, where there are examples.
        examples: the nearest first.
        context: tokens that a prompt and its answer can take together.
        max_tokens: of the answer.

    Raises:
        InvalidRequest: as `encode`.
    """
    room = context - min(max_tokens, context // 2)
    for count in range(len(examples), 0, -1):
        ids = encode(replace(prompt, messages=chat_of(examples[:count], question_of(prompt) or "")))
        if len(ids) <= room:
            return ids, count
    return encode(prompt), 0


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
