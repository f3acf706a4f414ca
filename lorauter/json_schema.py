"""Whether texts are JSON of the schema of a task's answers, as jsonschema has it, and for no longer than allowed.

Schemas come from anybody who may add a task, and may take a validator for ever, with the interpreter's lock held: by
their patterns, or by references each of which leads to two. One that may is tried in a process of its own
(`lorauter.apart`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_CPU_S = 3  # sane schemas take milliseconds, after a second of imports
_MEMORY_BYTES = 1 << 30
_MAX_WORK = 1 << 24  # characters of a schema times those of the texts: a second or so
_WILD = ('"$ref"', '"$dynamicRef"', '"pattern', '"uniqueItems"', '"unevaluated')  # whose work is not bounded by that

Misfit = tuple[int, str]
"""The place of a text among others, and what is wrong with it."""


def first_misfit(schema: Mapping[str, Any], texts: Sequence[str]) -> Misfit | None:
    """The first of some texts that is no JSON of a schema; None where all are.

    Raises:
        ValueError: it is no schema, or takes too long.
        RecursionError: it is nested too deeply.
        OSError: this machine cannot try it now, which is no fault of the schema.
    """
    written = json.dumps(schema)
    tame = len(written) * sum(map(len, texts)) <= _MAX_WORK and not any(word in written for word in _WILD)
    return _first_misfit(schema, texts) if tame else _apart(written, texts)


def _first_misfit(schema: Mapping[str, Any], texts: Sequence[str]) -> Misfit | None:
    # Few tasks have a schema, and what reads tasks starts often.
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"answers is no JSON schema: {error.message[:200]}") from error
    validator = Draft202012Validator(schema, registry=Registry())  # which fetches nothing
    for i, text in enumerate(texts):
        try:
            wrong = next(validator.iter_errors(json.loads(text)), None)
        except (ValueError, RecursionError) as error:
            return i, f"is no JSON, and answers is a schema: {error}"
        if wrong is not None:
            return i, f"is not of the schema in answers: {wrong.message[:200]}"
    return None


def _apart(schema: str, texts: Sequence[str]) -> Misfit | None:
    from lorauter.apart import Unaffordable, call_apart

    limits = {"cpu_s": _CPU_S, "memory_bytes": _MEMORY_BYTES}
    try:
        answer = call_apart(__file__, "_tried", schema, texts, **limits, undone="the schema was not tried")
    except Unaffordable as error:
        raise ValueError(
            f"answers takes more than {_CPU_S} s, or too much memory, to hold {len(texts)} targets against; write its "
            "patterns without repeats inside repeats, and fewer references"
        ) from error
    return (answer[0], answer[1]) if answer else None


def _tried(schema: str, texts: Sequence[str]) -> Misfit | None:
    try:
        return _first_misfit(json.loads(schema), texts)
    except (MemoryError, ValueError):
        raise
    except Exception as error:  # what the library makes of it: Python's patterns are not the engine's
        raise ValueError(f"answers cannot be tried: {error}") from error
