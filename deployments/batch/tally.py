"""What is counted of rows: answers, errors, tokens, tasks, adapters, confidence. Adds up; knows no files and no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BINS = 10
"""Bars of the confidence histogram, each a tenth wide."""


@dataclass
class Tally:
    """Counts over rows.

    Attributes:
        rows, errors: of all rows; an error is a row whose `error` is set.
        prompt_tokens, completion_tokens: of rows that were answered.
        tasks: rows by their first task.
        adapters: rows by adapter, each that is in their mixture.
        base: rows of the base model alone.
        confidence: rows by tenths of their confidence.
        kinds: errors by their kind.
    """

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    adapters: dict[str, int] = field(default_factory=dict)
    base: int = 0
    confidence: list[int] = field(default_factory=lambda: [0] * BINS)
    kinds: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]]) -> Tally:
        """Count rows by the columns that a job adds."""
        tally = cls()
        for row in results:
            tally.rows += 1
            tally.prompt_tokens += row.get("prompt_tokens") or 0
            tally.completion_tokens += row.get("completion_tokens") or 0
            if row["tasks"]:
                _count(tally.tasks, row["tasks"][0]["name"])
            if row["confidence"] is not None:
                tally.confidence[min(int(row["confidence"] * BINS), BINS - 1)] += 1
            for adapter in row["adapters"] or ():
                _count(tally.adapters, adapter["name"])
            tally.base += row["adapters"] is not None and not row["adapters"]
            if row["error"] is not None:
                tally.errors += 1
                _count(tally.kinds, row["error"].split(":")[0])
        return tally

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """All of them together."""
        total = cls()
        for tally in tallies:
            for name in ("rows", "errors", "prompt_tokens", "completion_tokens", "base"):
                setattr(total, name, getattr(total, name) + getattr(tally, name))
            for name in ("tasks", "adapters", "kinds"):
                for key, count in getattr(tally, name).items():
                    _count(getattr(total, name), key, count)
            total.confidence = [a + b for a, b in zip(total.confidence, tally.confidence, strict=True)]
        return total

    def to_json(self) -> dict[str, Any]:
        """The fields, as `Tally(**fields)` takes them."""
        return dict(vars(self))


def _count(counts: dict[str, int], key: str, by: int = 1) -> None:
    counts[key] = counts.get(key, 0) + by
