"""Whether texts are JSON of the schema of a task's answers, as jsonschema has it, and for no longer than allowed.

Schemas come from anybody who may add a task, and may take a validator for ever, with the interpreter's lock held: by
their patterns, or by references each of which leads to two. One that may is tried in a process of its own, whose CPU
seconds and memory the kernel limits. That process runs this file as a script.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_CPU_S = 3  # sane schemas take milliseconds, after a second of imports
_MEMORY_BYTES = 1 << 30
_WALL_S = 60.0  # where the machine is busy
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
    try:
        done = subprocess.run(  # noqa: S603 (this interpreter and this file)
            [sys.executable, "-I", __file__],
            input=json.dumps([sys.path, schema, texts]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:  # the machine is busy: the CPU's seconds are bounded apart from these
        raise TimeoutError(f"the schema was not tried within {_WALL_S:g} s") from error
    if done.returncode not in (0, -signal.SIGXCPU):
        raise OSError(f"the process that tries schemas has ended with {done.returncode}")
    answer = json.loads(done.stdout) if done.returncode == 0 else None
    if answer is None:
        raise ValueError(
            f"answers takes more than {_CPU_S} s, or too much memory, to hold {len(texts)} targets against; write its "
            "patterns without repeats inside repeats, and fewer references"
        )
    if isinstance(answer, str):
        raise ValueError(answer)
    return (answer[0], answer[1]) if answer else None


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S + 1))  # SIGXCPU at the first, which nobody else sends
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    sys.path[:], schema, texts = json.load(sys.stdin)
    answer: object
    try:
        answer = _first_misfit(json.loads(schema), texts) or ()
    except MemoryError:
        answer = None
    except Exception as error:  # noqa: BLE001 (what the library makes of it: Python's patterns are not the engine's)
        answer = f"answers cannot be tried: {error}" if not isinstance(error, ValueError) else str(error)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
