"""Regular expressions out of an adapter's file, matched as PEFT matches them, and for no longer than allowed.

Python's own `re` decides, so that what PEFT would match is matched; but an expression may take `re` for ever, with the
interpreter's lock held. Expressions that cannot (names, dots, anchors, escapes), where they are not too many, are
matched here; all others in a process of their own, whose CPU seconds and memory the kernel limits. That process runs
this file as a script: it imports nothing but the standard library. Knows nothing of what is matched.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

MAX_CHARACTERS = 1 << 16
"""Of all expressions of one setting; a name for every layer of the largest models takes half of it."""
_CPU_S = 1  # sane expressions take milliseconds
_MEMORY_BYTES = 512 << 20
_WALL_S = 60.0  # where the machine is busy
_MAX_WORK = 1 << 28  # characters of patterns times places in texts where they are tried: a second or two
_PLAIN = re.compile(r"[\w.^$|\\]*")  # nothing that repeats, and no choice within a choice


class PatternError(ValueError):
    """An expression is none, or takes too long to match."""


class Found(NamedTuple):
    """The first of several expressions that matches: its place among them, and its named groups."""

    pattern: int
    groups: dict[str, str | None]


def first_matches(
    patterns: Sequence[str], texts: Sequence[str], *, template: str = "{}", whole: bool = False
) -> list[Found | None]:
    """For each text the first pattern that matches it, or None.

    Args:
        patterns: regular expressions, from anybody.
        texts: short ones.
        template: what is matched in a pattern's place, which stands for `{}` in it.
        whole: the expression has to match the whole text, as `re.fullmatch`; else its beginning, as `re.match`.

    Raises:
        PatternError: a pattern is no regular expression, or they are too long or take too long.
        OSError: this machine cannot match them now, which is no fault of the patterns.
    """
    if not patterns:
        return [None] * len(texts)
    if (size := sum(map(len, patterns)) + len(patterns)) > MAX_CHARACTERS:
        raise PatternError(f"the patterns have {size} characters; at most {MAX_CHARACTERS} are taken")
    work = size * sum(text.count(".") + 1 for text in texts)
    plain = work <= _MAX_WORK and all(_PLAIN.fullmatch(pattern) for pattern in patterns)
    return list((_search if plain else _search_apart)(tuple(patterns), tuple(texts), template, whole))


def _search(patterns: Sequence[str], texts: Sequence[str], template: str, whole: bool) -> list[Found | None]:
    matchers = []
    for pattern in patterns:
        try:
            expression = re.compile(template.replace("{}", pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"{_short(pattern)} is no regular expression: {error}") from error
        matchers.append(expression.fullmatch if whole else expression.match)
    found: list[Found | None] = []
    for text in texts:
        matches = ((i, match) for i, matcher in enumerate(matchers) if (match := matcher(text)))
        first = next(matches, None)
        found.append(None if first is None else Found(first[0], first[1].groupdict()))
    return found


@lru_cache(maxsize=64)  # the adapters of a pool mostly have the same ones
def _search_apart(
    patterns: tuple[str, ...], texts: tuple[str, ...], template: str, whole: bool
) -> tuple[Found | None, ...]:
    try:
        done = subprocess.run(  # noqa: S603 (this interpreter and this file)
            [sys.executable, "-I", "-S", __file__],
            input=json.dumps([patterns, texts, template, whole]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:  # the machine is busy: the CPU's seconds are bounded apart from these
        raise TimeoutError(f"patterns were not matched within {_WALL_S:g} s") from error
    if done.returncode not in (0, -signal.SIGXCPU):
        raise OSError(f"the process that matches patterns has ended with {done.returncode}")
    answer = json.loads(done.stdout) if done.returncode == 0 else None
    if answer is None:
        raise PatternError(
            f"{_short(patterns[0])}{' or another one' * (len(patterns) > 1)} takes more than {_CPU_S} s to match with "
            f"{len(texts)} names, or too much memory; write it without repeats inside repeats"
        )
    if isinstance(answer, str):
        raise PatternError(answer)
    return tuple(None if row is None else Found(*row) for row in answer)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 100 else pattern[:97] + "...")


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S + 1))  # SIGXCPU at the first, which nobody else sends
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    warnings.simplefilter("ignore")  # `re` on what a later version of it may read otherwise
    try:
        answer: object = _search(*json.load(sys.stdin))
    except PatternError as error:
        answer = str(error)
    except MemoryError:
        answer = None
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
