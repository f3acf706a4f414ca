"""A task's examples as the base model reads them: prompt and target as token ids. Knows nothing of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorauter.errors import TaskError
from lorauter.tasks import Example, Task

if TYPE_CHECKING:
    from lorauter.engine.text import TextCodec


@dataclass(frozen=True)
class Dialogue:
    """A prompt and its target as one sequence of token ids."""

    tokens: tuple[int, ...]
    prompt: int

    @property
    def outputs(self) -> int:
        """Tokens to be predicted: the target's, and the end."""
        return len(self.tokens) - self.prompt + 1


def dialogue_of(codec: TextCodec, example: Example) -> Dialogue:
    """One user turn and the answer. Raises InvalidRequest: the model has no chat template."""
    prompt = prompt_of(codec, example.input)
    return Dialogue((*prompt, *target_ids(codec, example.target)), len(prompt))


def prompt_of(codec: TextCodec, text: str) -> tuple[int, ...]:
    """One user turn. Raises InvalidRequest: the model has no chat template."""
    return codec.chat([{"role": "user", "content": text}])


def target_ids(codec: TextCodec, text: str) -> list[int]:
    """An answer, without its end."""
    ids: list[int] = codec.backend.encode(text, add_special_tokens=False).ids
    return ids


def check_length(tokens: int, room: int, task: Task, example: int) -> None:
    """Raise TaskError unless the context holds so many tokens."""
    if tokens > room:
        raise TaskError(
            f"validation[{example}] takes {tokens} tokens with its answer, but the context holds {room}; take it out",
            source=task.name,
        )
