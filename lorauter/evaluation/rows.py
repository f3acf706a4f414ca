"""The rows of the evaluation's JSON lines files: decisions, what they are scored by, and answers.

Knows the formats and what makes a row valid; knows nothing of engines, metrics or reports. One file of decisions may
carry all keys: each reader takes its own and leaves the others alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorauter.errors import InvalidRequest
from lorauter.evaluation.regimes import REGIMES
from lorauter.tasks import METRICS, is_encodable
from lorauter.turns import ExampleTurns

MIXINGS = ("outputs", "matrices", "arrow", "spectr")
"""Of adapters: their outputs by the weights; their matrices, averaged by the weights; or by every token's own choice
among them in every layer, whatever the weights, as Arrow or SpectR choose."""


@dataclass(frozen=True)
class Question:
    """What an answer depends on.

    Attributes:
        input: the user's message.
        adapters: names and weights, the heaviest first, none of weight 0; empty means the base model.
        max_tokens: tokens to generate at most.
        mixing: one of MIXINGS.
        examples: what is shown before the message, the nearest first.
    """

    input: str
    adapters: tuple[tuple[str, float], ...]
    max_tokens: int
    mixing: str = "outputs"
    examples: tuple[ExampleTurns, ...] = ()


@dataclass(frozen=True)
class DecisionRow:
    """A question with its id: `{"id", "input", "adapters": {name: weight}, "max_tokens", "mixing"?, "examples"?}`.

    `examples` are `{"place", "input", "target"}`.
    """

    id: str
    question: Question

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: str) -> DecisionRow:
        """Read a decoded row. Raises InvalidRequest, which names `source`, if it is malformed."""
        text, adapters, max_tokens = (data.get(key) for key in ("input", "adapters", "max_tokens"))
        mixing = data.get("mixing", "outputs")
        row_id = _string(data, "id", source=source)
        _string(data, "input", source=source)
        if not isinstance(adapters, Mapping) or not all(is_weight(weight) for weight in adapters.values()):
            raise InvalidRequest(f"{source}: adapters must map names to finite weights", param="adapters")
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise InvalidRequest(
                f"{source}: max_tokens is {max_tokens!r}; it must be a whole number of at least 1", param="max_tokens"
            )
        if mixing not in MIXINGS:
            raise InvalidRequest(f"{source}: mixing is {mixing!r}, not one of {', '.join(MIXINGS)}", param="mixing")
        mixture = sorted(((n, float(w)) for n, w in adapters.items() if w), key=lambda item: (-item[1], item[0]))
        examples = _examples(data.get("examples", []), source=source)
        if examples and mixing != "outputs":
            raise InvalidRequest(f"{source}: mixing {mixing!r} knows no examples; leave them out", param="examples")
        return cls(row_id, Question(str(text), tuple(mixture), max_tokens, mixing if mixture else "outputs", examples))


@dataclass(frozen=True)
class ScoredRow:
    """What an answer is scored by: `{"id", "method", "regime", "task", "domain", "metric", "target"}`."""

    id: str
    method: str
    regime: str
    task: str
    domain: str
    metric: str
    target: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: str) -> ScoredRow:
        """Read a decoded row. Raises InvalidRequest, which names `source`, if it is malformed."""
        row = cls(**{key: _string(data, key, source=source) for key in cls.__dataclass_fields__})
        for key, allowed in (("regime", REGIMES), ("metric", METRICS)):
            if getattr(row, key) not in allowed:
                raise InvalidRequest(
                    f"{source}: {key} {getattr(row, key)!r} is not one of {', '.join(allowed)}", param=key
                )
        return row


@dataclass(frozen=True)
class AnswerRow:
    """An answer, or why there is none: `{"id", "answer", "finish_reason", "completion_tokens", "error"?}`."""

    id: str
    answer: str
    finish_reason: str | None
    completion_tokens: int
    error: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, source: str) -> AnswerRow:
        """Read a decoded row. Raises InvalidRequest, which names `source`, if it is malformed."""
        return cls(
            _string(data, "id", source=source),
            _string(data, "answer", source=source),
            data.get("finish_reason"),
            data.get("completion_tokens", 0),
            data.get("error"),
        )

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads."""
        return {key: value for key, value in vars(self).items() if key != "error" or value is not None}


def read_decisions(path: Path) -> list[DecisionRow]:
    """Read a file of decision rows. Raises InvalidRequest, naming the line."""
    return [DecisionRow.from_json(data, source=source) for source, data in read_json_lines(path)]


def read_scored(path: Path) -> list[ScoredRow]:
    """Read what the rows of a file are scored by. Raises InvalidRequest, naming the line."""
    return [ScoredRow.from_json(data, source=source) for source, data in read_json_lines(path)]


def read_answers(path: Path) -> dict[str, AnswerRow]:
    """Read a file of answer rows, by id, but for a torn last line. Raises InvalidRequest, naming the line."""
    rows = (AnswerRow.from_json(data, source=source) for source, data in read_json_lines(path, torn=True))
    return {row.id: row for row in rows}


def read_json_lines(path: Path, *, torn: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, each with where it stands, for messages.

    Args:
        torn: the last line may have no end, as a writer leaves it that was killed, and is then left out.

    Raises:
        InvalidRequest: the file cannot be read, or a line is no JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip() or (torn and not line.endswith(b"\n")):
                    continue
                source = f"{path}, line {number}"
                try:
                    data = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InvalidRequest(f"{source}: {error}") from error
                if not isinstance(data, dict):
                    raise InvalidRequest(f"{source}: a row is a JSON object, got {type(data).__name__}")
                yield source, data
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error


def drop_torn_line(path: Path) -> None:
    """Take the last line out of a file if it has no end, as a writer leaves it that was killed."""
    with path.open("rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def check_unique(ids: Iterable[str]) -> None:
    """Raise InvalidRequest if two rows have the same id."""
    seen: set[str] = set()
    for row_id in ids:
        if row_id in seen:
            raise InvalidRequest(f"two rows have the id {row_id!r}; give each its own", param="id")
        seen.add(row_id)


def example_row(example: ExampleTurns) -> dict[str, Any]:
    """An example as a decision row has it."""
    return {"place": example.place, "input": example.input, "target": example.target}


def _examples(given: object, *, source: str) -> tuple[ExampleTurns, ...]:
    if not isinstance(given, list):
        raise InvalidRequest(f"{source}: examples must be a list, got {type(given).__name__}", param="examples")
    examples = []
    for one in given:
        place = one.get("place") if isinstance(one, Mapping) else None
        if not isinstance(place, int) or isinstance(place, bool):
            needed = 'examples are {"place": number, "input", "target"}'
            raise InvalidRequest(f"{source}: {needed}, got {one!r}", param="examples")
        asked, answered = (_string(one, key, source=f"{source}, examples") for key in ("input", "target"))
        examples.append(ExampleTurns(place, asked, answered))
    return tuple(examples)


def _string(data: Mapping[str, Any], key: str, *, source: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{source}: {key} must be a string, got {value!r}", param=key)
    if not is_encodable(value):
        raise InvalidRequest(f"{source}: {key} holds half a character (a lone surrogate); mend the text", param=key)
    return value


def is_weight(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
