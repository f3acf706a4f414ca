"""Tasks: a name, a metric and a few validation examples, read from JSON files.

Knows the file format and what makes a task valid. Knows nothing of embeddings, adapters or catalogs.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorauter.errors import InvalidRequest, TaskError
from lorauter.json_schema import first_misfit
from lorauter.names import RULE, is_valid_name

METRICS = ("em", "rouge", "bleu")
"""Exact match, ROUGE-L and BLEU."""

Answers = tuple[str, ...] | Mapping[str, Any]
"""The answers that a task knows: some texts, or a JSON schema."""


@dataclass(frozen=True)
class Example:
    """One input and the answer that is wanted for it. The input carries its own instruction."""

    input: str
    target: str


@dataclass(frozen=True)
class Task:
    """A task as a catalog needs it: its validation examples stand for it.

    `test` is carried for evaluation only; nothing that builds or routes reads it. `answers` is what every answer is one
    of, if that is known: a request may ask to be held to it.
    """

    name: str
    domain: str
    metric: str
    validation: tuple[Example, ...]
    test: tuple[Example, ...] = ()
    description: str = ""
    answers: Answers | None = field(default=None, hash=False)

    @classmethod
    def from_json(cls, data: object, *, source: str) -> Task:
        """Make a task of a decoded JSON object.

        Required keys: `name`, `domain`, `metric` (one of METRICS) and `validation` (a list of at least one
        `{"input", "target"}`). `description`, `test` and `answers` (a list of texts, or a JSON schema, that fits every
        validation target) are optional; other keys are left alone.

        Raises:
            TaskError: the object does not have that shape. `source` is named in the message.
        """
        if not isinstance(data, Mapping):
            raise TaskError(f"a task is a JSON object, got {type(data).__name__}", source=source)
        missing = [key for key in ("name", "domain", "metric", "validation") if key not in data]
        if missing:
            raise TaskError(f"missing {', '.join(missing)}", source=source)
        if not is_valid_name(data["name"]):
            raise TaskError(f"name {data['name']!r} is not allowed; use {RULE}", source=source)
        for key in ("domain", "description"):
            if not isinstance(data.get(key, ""), str):
                raise TaskError(f"{key} must be a string, got {data[key]!r}", source=source)
            if not is_encodable(data.get(key, "")):
                raise TaskError(f"{key} holds half a character (a lone surrogate); mend the text", source=source)
        if data["metric"] not in METRICS:
            raise TaskError(f"metric {data['metric']!r} is not one of {', '.join(METRICS)}", source=source)
        validation = _examples(data["validation"], key="validation", source=source)
        if not validation:
            raise TaskError("validation is empty; give at least one example", source=source)
        return cls(
            name=data["name"],
            domain=data["domain"],
            metric=data["metric"],
            validation=validation,
            test=_examples(data.get("test", []), key="test", source=source),
            description=data.get("description", ""),
            answers=_answers(data.get("answers"), validation, source=source),
        )

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads."""
        answers = list(self.answers) if isinstance(self.answers, tuple) else self.answers
        return {
            "name": self.name,
            "domain": self.domain,
            "metric": self.metric,
            "description": self.description,
            "validation": [vars(example) for example in self.validation],
            "test": [vars(example) for example in self.test],
            **({} if answers is None else {"answers": answers}),
        }


def _examples(rows: object, *, key: str, source: str) -> tuple[Example, ...]:
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise TaskError(f"{key} must be a list of examples, got {type(rows).__name__}", source=source)
    examples = []
    for i, row in enumerate(rows):
        text = row.get("input") if isinstance(row, Mapping) else None
        target = row.get("target") if isinstance(row, Mapping) else None
        if not isinstance(text, str) or not isinstance(target, str):
            raise TaskError(f"{key}[{i}] must be an object with strings input and target", source=source)
        if not text.strip():
            raise TaskError(f"{key}[{i}].input is empty", source=source)
        if not is_encodable(text + target):
            raise TaskError(f"{key}[{i}] holds half a character (a lone surrogate); mend the text", source=source)
        examples.append(Example(text, target))
    return tuple(examples)


def _answers(given: object, validation: Sequence[Example], *, source: str) -> Answers | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        return _schema(given, validation, source=source)
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        needed = "answers must be a list of texts, or a JSON schema"
        raise TaskError(f"{needed}, got {type(given).__name__}", source=source)
    if not given:
        raise TaskError("answers is empty; give the texts that are answers, or leave it out", source=source)
    for i, text in enumerate(given):
        if not isinstance(text, str) or not text.strip() or not is_encodable(text):
            raise TaskError(f"answers[{i}] must be a text that is not empty, got {text!r}", source=source)
    known = Counter(given)
    if twice := next((text for text, count in known.items() if count > 1), None):
        raise TaskError(f"answers has {twice!r} twice", source=source)
    for i, example in enumerate(validation):
        if example.target not in known:
            raise TaskError(
                f"validation[{i}].target is {example.target[:80]!r}, which is none of the answers; add it to them, "
                "mend the target, or leave answers out",
                source=source,
            )
    return tuple(given)


def _schema(schema: Mapping[str, Any], validation: Sequence[Example], *, source: str) -> Mapping[str, Any]:
    """A schema that answers can be held to, and that the targets fit. Raises TaskError."""
    # Few tasks have one, and what reads tasks starts often.
    from lorauter.engine.grammar_sources import check_grammar
    from lorauter.engine.types import Grammar

    try:
        check_grammar(Grammar.of_answers(schema, param="answers"))
        misfit = first_misfit(schema, [example.target for example in validation])
    except (InvalidRequest, ValueError, RecursionError, OSError) as error:
        raise TaskError(str(error), source=source) from error
    if misfit is not None:
        raise TaskError(f"validation[{misfit[0]}].target {misfit[1]}", source=source)
    return schema


def is_encodable(text: str) -> bool:
    """Whether `text` can be written as UTF-8; JSON may smuggle in lone surrogates, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_task(path: Path) -> Task:
    """Read one `.json` or `.json.gz` task file.

    Raises:
        TaskError: the file cannot be read, is no JSON, or is no task.
    """
    try:
        raw = path.read_bytes()
        data = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise TaskError(f"cannot be read as JSON: {error}", source=str(path)) from error
    return Task.from_json(data, source=str(path))


def task_files(directory: Path) -> list[Path]:
    """The task files of a directory, by name.

    Raises:
        TaskError: it is no directory, or holds no task file.
    """
    if not directory.is_dir():
        raise TaskError("is not a directory", source=str(directory))
    paths = sorted(p for p in directory.iterdir() if p.name.endswith((".json", ".json.gz")) and p.is_file())
    if not paths:
        raise TaskError("holds no .json or .json.gz file", source=str(directory))
    return paths


def read_tasks(directory: Path) -> list[Task]:
    """Read every task file of a directory, in the order of the tasks' names.

    Raises:
        TaskError: as `task_files` and `read_task`, or two files define the same task.
    """
    tasks: dict[str, Task] = {}
    for path in task_files(directory):
        task = read_task(path)
        if task.name in tasks:
            raise TaskError(f"task {task.name!r} is already defined by another file", source=str(path))
        tasks[task.name] = task
    return [tasks[name] for name in sorted(tasks)]
