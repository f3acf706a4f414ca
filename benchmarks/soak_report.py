"""What a soak's answers are worth, and its report. Knows nothing of how requests are sent or faults are made."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import theilslopes

_CLEAR = 0.3  # how much more the heaviest adapter of a routed mixture must weigh for its word to be sure
_WINDOWS = 10
_LEAK = 60.0  # MiB an hour, above which the report names a process
KINDS = ("right", "told", "lost", "duplicated", "wrong", "unjudged")


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Times in seconds; `at` from the soak's start."""

    at: float
    seconds: float
    kind: str
    detail: str


@dataclass(frozen=True)
class MemorySample:
    """Resident bytes by role and process id."""

    at: float
    resident: Mapping[tuple[str, int], int]


class Judge:
    """Which words each adapter may answer with, and when; judges answers by that.

    Args:
        tokens: words in every answer.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._words: dict[str, dict[str, tuple[float, float]]] = {}  # since and until, by adapter and word
        self._ids: set[str] = set()

    def says(self, name: str, word: str, since: float) -> None:
        """From now on `word` is a right answer of the adapter `name`, beside those it had."""
        self._words.setdefault(name, {})[word] = (since, math.inf)

    def replaced(self, name: str, word: str, at: float) -> None:
        """Requests that begin after `at` must be answered with `word` alone."""
        words = self._words[name]
        for old, (since, until) in words.items():
            if old != word:
                words[old] = since, min(until, at)

    def judge(
        self, body: Mapping[str, Any], heaviest: str | None, status: int, raw: str, begun: float, ended: float
    ) -> tuple[str, str]:
        """The kind of an answer (one of KINDS) and what there is to say about it."""
        if status != 200:
            return "told", f"{status} {_code(raw)}"
        if not body.get("stream"):
            answer = json.loads(raw)
            text, decision = answer["choices"][0]["message"]["content"], answer["lorauter"]
        else:
            lines = [line.removeprefix("data: ") for line in raw.split("\n\n") if line]
            events = [json.loads(line) for line in lines if line != "[DONE]"]
            if error := next((event["error"] for event in events if "error" in event), None):
                return "told", f"in the stream: {error['code']}"
            if "[DONE]" not in lines:
                return "lost", "the stream broke off"
            choices = [choice for event in events for choice in event["choices"]]
            if lines.count("[DONE]") > 1 or sum(choice["finish_reason"] is not None for choice in choices) != 1:
                return "duplicated", "the stream ended twice"
            answer, decision = events[0], events[0]["lorauter"]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
        if answer["id"] in self._ids:
            return "duplicated", f"two answers are called {answer['id']}"
        self._ids.add(answer["id"])
        if heaviest is None:
            heaviest = _clear_winner(decision["adapters"])
            if heaviest is None:
                return "unjudged", "routed to a mixture without a clear winner"
        return self._compare(heaviest, text.split(), begun, ended)

    def _compare(self, name: str, got: list[str], begun: float, ended: float) -> tuple[str, str]:
        known = self._words[name]
        if len(got) > self._tokens:
            return "duplicated", f"{len(got)} words where {self._tokens} were asked for: {' '.join(got)}"
        if len(got) == self._tokens and len(set(got)) == 1 and got[0] in known:
            since, until = known[got[0]]
            if begun > until:
                return "wrong", f"{name}'s earlier version {begun - until:.1f} s after its time"
            return ("right", "") if ended >= since else ("wrong", f"{name}'s next version")
        whose = sorted({other for other, words in self._words.items() if set(got) & set(words)} - {name})
        return "wrong", f"got {' '.join(got)!r} of {name}; adapters that say so: {', '.join(whose) or 'none'}"


def _clear_winner(adapters: Sequence[Mapping[str, Any]]) -> str | None:
    ranked = sorted(adapters, key=lambda adapter: -adapter["weight"])
    if not ranked or (len(ranked) > 1 and ranked[0]["weight"] - ranked[1]["weight"] < _CLEAR):
        return None
    return str(ranked[0]["name"])


def _code(raw: str) -> str:
    try:
        return str(json.loads(raw)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "without an error object"


def summary(
    outcomes: Sequence[Outcome],
    faults: Sequence[tuple[float, str]],
    memory: Sequence[MemorySample],
    *,
    seconds: float,
    not_sent: int,
) -> dict[str, Any]:
    """Everything that the report says, fit for JSON. Times in seconds, memory in MiB."""
    width = seconds / _WINDOWS
    windows = []
    for i in range(_WINDOWS):
        inside = [outcome for outcome in outcomes if i * width <= outcome.at < (i + 1) * width]
        windows.append(
            {
                "from": round(i * width),
                **_counts(inside),
                **_quantiles([outcome.seconds for outcome in inside if outcome.kind in ("right", "unjudged")]),
                "faults": dict(Counter(kind for at, kind in faults if i * width <= at < (i + 1) * width)),
            }
        )
    return {
        "seconds": seconds,
        "requests": len(outcomes),
        "not_sent": not_sent,
        "outcomes": _counts(outcomes),
        "told": dict(Counter(outcome.detail for outcome in outcomes if outcome.kind == "told").most_common()),
        "failures": [vars(outcome) for outcome in outcomes if outcome.kind in ("lost", "duplicated", "wrong")],
        **_quantiles([outcome.seconds for outcome in outcomes if outcome.kind in ("right", "unjudged")]),
        "faults": dict(Counter(kind for _, kind in faults)),
        "windows": windows,
        "memory": _memory(memory),
    }


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    found = Counter(outcome.kind for outcome in outcomes)
    return {kind: found[kind] for kind in KINDS}


def _quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    if len(seconds) < 2:
        return {"p50": None, "p99": None}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def _memory(samples: Sequence[MemorySample]) -> list[dict[str, Any]]:
    """Of every process that was there from a third of the time to the end: what it held, and how fast that grew.

    The growth is Theil and Sen's slope, the median of all pairs', over the second half of the time: the tiers of
    adapters are full by then.
    """
    if len(samples) < 6:
        return []
    third, half = samples[len(samples) // 3], samples[len(samples) // 2 :]
    rows = []
    for (role, process), resident in sorted(samples[-1].resident.items()):
        series = [(sample.at, sample.resident.get((role, process))) for sample in half]
        if (role, process) not in third.resident or any(value is None for _, value in series):
            continue
        slope = theilslopes([value for _, value in series], [at for at, _ in series])[0]
        rows.append(
            {
                "role": role,
                "at_third": round(third.resident[role, process] / 2**20, 1),
                "at_end": round(resident / 2**20, 1),
                "growth_per_hour": round(slope * 3600 / 2**20, 1),
            }
        )
    return rows


def markdown(result: Mapping[str, Any], command: str, machine: str) -> str:
    """The report."""
    outcomes = result["outcomes"]
    bad = sum(outcomes[kind] for kind in ("lost", "duplicated", "wrong"))
    faults = ", ".join(f"{count} x {kind.replace('_', ' ')}" for kind, count in result["faults"].items())
    lines = [
        "# Soak",
        "",
        f"`{command}` on {machine}; `benchmarks/soak.py` says what it does and how each answer is judged.",
        "",
        f"{result['requests']:,} requests in {result['seconds'] / 60:g} minutes, {sum(result['faults'].values())} "
        f"faults ({faults}). Lost, duplicated or wrong: **{bad}**. Answered right: {outcomes['right']:,}; told of an "
        f"error: {outcomes['told']:,}; routed to a mixture without a clear winner, so answered but not judged: "
        f"{outcomes['unjudged']:,}; not sent, since too many were under way: {result['not_sent']:,}. Latency of "
        f"answers: median {_seconds(result['p50'])}, p99 {_seconds(result['p99'])}.",
        "",
        "| from | right | told | lost | duplicated | wrong | unjudged | p50 | p99 | faults |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["windows"]:
        happened = ", ".join(f"{count} {kind}" for kind, count in row["faults"].items())
        cells = [f"{row['from']} s", *(str(row[kind]) for kind in KINDS), _seconds(row["p50"]), _seconds(row["p99"])]
        lines.append(f"| {' | '.join(cells)} | {happened} |")
    lines += ["", "What clients were told:", "", "| status and code | answers |", "| --- | --- |"]
    lines += [f"| {detail} | {count} |" for detail, count in result["told"].items()]
    if result["failures"]:
        lines += ["", "What went wrong:", ""]
        lines += [f"- at {row['at']:.0f} s, {row['kind']}: {row['detail']}" for row in result["failures"][:50]]
    lines += [
        "",
        "Resident memory of the processes that lived throughout, in MiB; the growth is the median slope over the "
        "second half:",
        "",
        "| process | after a third | at the end | growth an hour |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["memory"]:
        lines.append(f"| {row['role']} | {row['at_third']:,} | {row['at_end']:,} | {row['growth_per_hour']:+,} |")
    growing = [f"{row['role']} ({row['growth_per_hour']:+,})" for row in result["memory"] if _leaks(row)]
    lines += ["", f"Growing by more than {_LEAK:g} MiB an hour: {', '.join(growing) or 'none'}."]
    return "\n".join(lines) + "\n"


def _leaks(row: Mapping[str, Any]) -> bool:
    return float(row["growth_per_hour"]) > _LEAK


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
