"""A task's examples as turns of a chat before a query. Knows nothing of which are chosen, nor why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


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


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
