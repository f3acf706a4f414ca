"""Scores of adapters on tasks' validation examples: a table of them, and the loop that fills it.

A table is a JSON lines file that is only ever appended to, so a killed run goes on where it was, and the scoring may
be done on another machine. Knows nothing of models, nor of which evaluations are worth making.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from lorauter.catalog.provenance import Provenance
from lorauter.errors import CatalogError, LorauterError

_HEADER = "made_of"


@dataclass(frozen=True, order=True)
class Evaluation:
    """One adapter on one validation example, by its index, of one task."""

    adapter: str
    task: str
    example: int


@dataclass(frozen=True)
class Failed:
    """What an evaluation comes to where the adapter cannot be used, instead of a score."""

    reason: str


Outcome = float | Failed


class Scorer(Protocol):
    """Makes evaluations."""

    def score(self, evaluations: Sequence[Evaluation]) -> Mapping[Evaluation, Outcome]:
        """An outcome for each, the higher the better. One adapter's failure is no other's."""


class ScoreTable:
    """The scores so far.

    Kept in a JSON lines file that is only ever appended to: `{"adapter", "task", "example", "score"}`, or with
    `failed`, the reason, in place of `score`. A header, `{"made_of": ...}`, says what they are scores of; tasks and
    adapters that come later have theirs further down. A last line that was cut off is dropped. A failed adapter is not
    tried again until its lines are taken out of the file.

    Args:
        path: the file, made on the first `add`; None keeps the scores in memory alone.

    Raises:
        CatalogError: the file cannot be read, or a line of it is no evaluation.

    Attributes:
        made_of: what the scores are of, as far as it was said.
        scores: `{(adapter, task): {example: score}}`, finite numbers.
        failures: `{adapter: why it cannot be used}`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.scores: dict[tuple[str, str], dict[int, float]] = {}
        self.failures: dict[str, str] = {}
        self.made_of = Provenance()
        self._path = path
        self._header_due = False
        self._torn_at: int | None = None  # left in the file until the next `add`: it may be another run's, still going
        if path is not None and path.exists():
            self.made_of, rows, self._torn_at = _read_rows(path)
            for evaluation, row in rows:
                score, reason = row.get("score"), row.get("failed")
                if isinstance(reason, str):
                    self._take(evaluation, Failed(reason))
                elif isinstance(score, int | float) and math.isfinite(score):
                    self._take(evaluation, float(score))
                else:
                    raise CatalogError(f"{evaluation} has neither a score nor a failure", uri=str(path))

    @property
    def kept(self) -> bool:
        """Whether there is a file."""
        return self._path is not None

    def bind(self, made_of: Provenance) -> None:
        """Say what the scores are of, those that are there and those to come; the file is told by the next `add`.

        Raises:
            CatalogError: those that are there are of something else, or nobody knows of what.
        """
        pairs = list(self.scores)
        tasks, adapters = {task for _, task in pairs}, {adapter for adapter, _ in pairs} | self.failures.keys()
        if (tasks or adapters) and (differing := self.made_of.differing(made_of, tasks, adapters)):
            more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
            raise CatalogError(
                f"its scores are of something else: {differing[0]}{more}; name another file, or take the lines of what "
                "has changed out of this one",
                uri=str(self._path),
            )
        joined = self.made_of.joined(made_of)
        self._header_due |= joined != self.made_of
        self.made_of = joined

    def add(self, outcomes: Mapping[Evaluation, Outcome]) -> None:
        """Take outcomes in, and append them to the file. A score that is not finite is a failure."""
        checked = {evaluation: _checked(evaluation, outcome) for evaluation, outcome in outcomes.items()}
        if self._path is not None:
            if self._torn_at is not None:
                with self._path.open("r+b") as file:
                    file.truncate(self._torn_at)
                self._torn_at = None
            with self._path.open("a", encoding="utf-8") as file:
                if self._header_due:
                    file.write(_line({_HEADER: self.made_of.to_json()}))
                    self._header_due = False
                file.writelines(
                    _line(asdict(e) | ({"failed": o.reason} if isinstance(o, Failed) else {"score": o}))
                    for e, o in checked.items()
                )
        for evaluation, outcome in checked.items():
            self._take(evaluation, outcome)

    def has(self, evaluation: Evaluation) -> bool:
        """Whether there is nothing to be learnt from an evaluation: it has its score, or its adapter has failed."""
        scores = self.scores.get((evaluation.adapter, evaluation.task), {})
        return evaluation.example in scores or evaluation.adapter in self.failures

    def mean(self, adapter: str, task: str, examples: Iterable[int] | None = None) -> float:
        """The mean score, of some examples or of all that there are. Raises KeyError where there is none."""
        scores = self.scores[adapter, task]
        return fmean(scores[example] for example in (scores if examples is None else examples))

    def by_task(self, worth: Callable[[float], float] = float) -> dict[str, dict[str, dict[int, float]]]:
        """`{task: {adapter: {example: score}}}` of adapters that have not failed, as `build_catalog` takes them.

        Args:
            worth: makes of each score what it is worth; the catalog takes 0 for worthless, and more for better.
        """
        found: dict[str, dict[str, dict[int, float]]] = {}
        for (adapter, task), scores in self.scores.items():
            if adapter not in self.failures:
                found.setdefault(task, {})[adapter] = {example: worth(score) for example, score in scores.items()}
        return found

    def _take(self, evaluation: Evaluation, outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            self.failures.setdefault(evaluation.adapter, outcome.reason)
        else:
            self.scores.setdefault((evaluation.adapter, evaluation.task), {})[evaluation.example] = outcome


def score_all(
    evaluations: Sequence[Evaluation],
    scorer: Scorer,
    table: ScoreTable,
    progress: Callable[[int], None] = lambda left: None,
    *,
    chunk_size: int = 256,
) -> None:
    """Make the evaluations that the table lacks, and append their outcomes chunk by chunk.

    Args:
        progress: called after each chunk with the evaluations that are left.
        chunk_size: evaluations made between two writes.

    Raises:
        LorauterError: the scorer gives no outcome for an evaluation.
    """
    left = [evaluation for evaluation in evaluations if not table.has(evaluation)]
    while left:
        chunk = left[:chunk_size]
        outcomes = scorer.score(chunk)
        for evaluation in chunk:
            if evaluation not in outcomes:  # it would be asked for again for ever
                raise LorauterError(f"the scorer gave no outcome for {evaluation}")
        table.add(outcomes)
        left = [evaluation for evaluation in left[chunk_size:] if not table.has(evaluation)]
        progress(len(left))


def write_evaluations(path: Path, evaluations: Iterable[Evaluation], made_of: Provenance | None = None) -> None:
    """Write evaluations to be made elsewhere, one a line, and before them what they are to be made of."""
    header = [] if made_of is None else [_line({_HEADER: made_of.to_json()})]
    path.write_text("".join([*header, *(_line(asdict(evaluation)) for evaluation in evaluations)]), encoding="utf-8")


def score_file(
    evaluations: Path, scores: Path, scorer: Scorer, progress: Callable[[int], None] = lambda left: None
) -> ScoreTable:
    """Make the evaluations of a file that `write_evaluations` wrote, but for those with outcomes in `scores`.

    Returns:
        The table that lies in the file `scores`.

    Raises:
        CatalogError: a file cannot be read, or `scores` are of something else than the evaluations.
        LorauterError: as `score_all`.
    """
    made_of, rows, torn_at = _read_rows(evaluations)
    if torn_at is not None:
        raise CatalogError("ends in the middle of a line; copy it again", uri=str(evaluations))
    table = ScoreTable(scores)
    table.bind(made_of)
    score_all([evaluation for evaluation, _ in rows], scorer, table, progress)
    return table


def _line(row: Mapping[str, object]) -> str:
    return json.dumps(row) + "\n"


_Rows = list[tuple[Evaluation, dict[str, Any]]]


def _read_rows(path: Path) -> tuple[Provenance, _Rows, int | None]:
    """What a JSON lines file says of all its rows, these with their evaluations, and where a torn last line begins."""
    made_of, rows = Provenance(), []
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for row in map(json.loads, content[:whole].splitlines()):
            if _HEADER in row:
                made_of = made_of.joined(Provenance.from_json(row[_HEADER]))
            else:
                rows.append((Evaluation(str(row["adapter"]), str(row["task"]), int(row["example"])), row))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CatalogError(f"is no file of evaluations: {error!r}", uri=str(path)) from error
    return made_of, rows, whole if whole < len(content) else None


def _checked(evaluation: Evaluation, outcome: Outcome) -> Outcome:
    if isinstance(outcome, Failed) or math.isfinite(outcome):
        return outcome
    return Failed(f"its score on example {evaluation.example} of {evaluation.task!r} is {outcome}")
