"""Regular expressions out of an adapter's file, matched as PEFT matches them, and for no longer than allowed.

Python's own `re` decides, so that what PEFT would match is matched; but an expression may take `re` for ever, with the
interpreter's lock held. Expressions that cannot (names, dots, anchors, escapes), where they are not too many, are
matched here; all others in a process of their own (`lorauter.apart`). Knows nothing of what is matched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

MAX_CHARACTERS = 1 << 16
"""Of all expressions of one setting; a name for every layer of the largest models takes half of it."""
_CPU_S = 1  # sane expressions take milliseconds
_MEMORY_BYTES = 512 << 20
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
    from lorauter.apart import Unaffordable, call_apart

    limits = {"cpu_s": _CPU_S, "memory_bytes": _MEMORY_BYTES}
    asked = patterns, texts, template, whole
    try:
        answer = call_apart(__file__, "_search", *asked, **limits, undone="patterns were not matched")
    except Unaffordable as error:
        raise PatternError(
            f"{_short(patterns[0])}{' or another one' * (len(patterns) > 1)} takes more than {_CPU_S} s to match with "
            f"{len(texts)} names, or too much memory; write it without repeats inside repeats"
        ) from error
    except ValueError as error:
        raise PatternError(str(error)) from error
    return tuple(None if row is None else Found(*row) for row in answer)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 100 else pattern[:97] + "...")
