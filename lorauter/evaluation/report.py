"""Reports: what each method scores in each regime, as results, JSON and Markdown.

Knows answers and what they are scored by; knows nothing of how they came to be.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lorauter.errors import ConfigError
from lorauter.evaluation.metrics import bootstrap_interval, metric_of, score
from lorauter.evaluation.regimes import REGIMES
from lorauter.evaluation.rows import AnswerRow, ScoredRow, check_unique

ORACLE = "oracle"
"""The method, of regime in-domain, whose score is 100 %."""

_Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Result:
    """What a method scores in a regime. All scores are in [0, 1].

    Attributes:
        score: the mean of the tasks' scores, each the mean of its queries'.
        interval: the 95 % interval of `score`, queries resampled within tasks.
        of_oracle: `score` as a share of the oracle's on the same tasks; None if the oracle did not answer them, or
            scores 0.
        queries: how many there were.
        errors: how many of them got no answer, and score as an empty one.
        tasks: each task's score.
        domains: the mean of the tasks' scores in each domain.
    """

    method: str
    regime: str
    score: float
    interval: tuple[float, float]
    of_oracle: float | None
    queries: int
    errors: int
    tasks: Mapping[str, float]
    domains: Mapping[str, float]


def evaluate(
    rows: Iterable[ScoredRow], answers: Mapping[str, AnswerRow], *, rouge_for_bleu: bool = False
) -> list[Result]:
    """Score the answers, for each method and regime in the order of their first rows.

    Args:
        answers: by the rows' ids; may hold more.
        rouge_for_bleu: score BLEU tasks by ROUGE-L.

    Raises:
        ConfigError: rows have no answer, or a metric's package is not installed.
        InvalidRequest: two rows have the same id.
    """
    rows = list(rows)
    check_unique(row.id for row in rows)
    missing = [row.id for row in rows if row.id not in answers]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(rows)} rows have no answer, the first of them {missing[0]!r}; run the answering "
            "step again with the same decisions and the same output file: it goes on where it stopped"
        )
    groups: dict[tuple[str, str], list[ScoredRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.regime), []).append(row)
    scores = {key: _scores(group, answers, rouge_for_bleu=rouge_for_bleu) for key, group in groups.items()}
    oracle = {task: fmean(values) for task, values in scores.get((ORACLE, "in-domain"), {}).items()}
    return [
        _result(*key, scores[key], oracle, {row.task: row.domain for row in group}, _errors(group, answers))
        for key, group in groups.items()
    ]


def _scores(rows: Sequence[ScoredRow], answers: Mapping[str, AnswerRow], *, rouge_for_bleu: bool) -> _Scores:
    """The scores of each task's queries."""
    scores: _Scores = {}
    for row in rows:
        metric = metric_of(row.metric, rouge_for_bleu=rouge_for_bleu)
        scores.setdefault(row.task, []).append(score(metric, answers[row.id].answer, row.target))
    return scores


def _errors(rows: Sequence[ScoredRow], answers: Mapping[str, AnswerRow]) -> int:
    return sum(answers[row.id].error is not None for row in rows)


def _result(
    method: str, regime: str, scores: _Scores, oracle: Mapping[str, float], domain_of: Mapping[str, str], errors: int
) -> Result:
    tasks = {task: fmean(values) for task, values in sorted(scores.items())}
    domains: _Scores = {}
    for task, value in tasks.items():
        domains.setdefault(domain_of[task], []).append(value)
    mean = fmean(tasks.values())
    best = fmean(oracle[task] for task in tasks) if tasks.keys() <= oracle.keys() else 0.0
    return Result(
        method=method,
        regime=regime,
        score=mean,
        interval=bootstrap_interval([scores[task] for task in tasks]),
        of_oracle=mean / best if best else None,
        queries=sum(map(len, scores.values())),
        errors=errors,
        tasks=tasks,
        domains={domain: fmean(values) for domain, values in sorted(domains.items())},
    )


def write_report(results: Sequence[Result], directory: Path) -> None:
    """Write `report.json`, with all there is, and `report.md`, with tables of methods, into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"results": [vars(result) for result in results]}, ensure_ascii=False, indent=1)
    (directory / "report.json").write_text(content + "\n", encoding="utf-8")
    (directory / "report.md").write_text(to_markdown(results), encoding="utf-8")


def to_markdown(results: Sequence[Result]) -> str:
    """A table of methods and regimes, with intervals and shares of the oracle, and one of domains for each regime."""
    of = {(result.method, result.regime): result for result in results}
    methods = list(dict.fromkeys(result.method for result in results))
    regimes = [regime for regime in REGIMES if any(result.regime == regime for result in results)]
    cells = [[m, *(_cell(of.get((m, regime))) for regime in regimes)] for m in methods]
    parts = [
        "Means of per-task scores, in brackets their 95 % intervals, then the share of the oracle's score.",
        _table(["method", *regimes], cells),
    ]
    failed = sum(result.errors for result in results)
    if failed:
        parts.append(f"{failed} of {sum(result.queries for result in results)} queries got no answer and score as ''.")
    for regime in regimes:
        shown = [of[m, regime] for m in methods if (m, regime) in of]
        domains = sorted({domain for result in shown for domain in result.domains})
        rows = [[r.method, *(f"{r.domains[d]:.3f}" if d in r.domains else "–" for d in domains)] for r in shown]
        parts += [f"By domain, {regime}:", _table(["method", *domains], rows)]
    return "\n\n".join(parts) + "\n"


def _cell(result: Result | None) -> str:
    if result is None:
        return "–"
    low, high = result.interval
    share = "" if result.of_oracle is None else f", {100 * result.of_oracle:.1f} %"
    return f"{result.score:.3f} [{low:.3f}, {high:.3f}]{share}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
