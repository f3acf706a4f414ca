"""Matching adapters to tasks by successive halving: which evaluations to make, and what they say.

N adapters on T tasks of n examples would cost N x T x n evaluations. Here every adapter meets a few examples of every
task, the best fraction stays, the examples double, and so on until the last few have met them all (LORAUTER,
arXiv 2601.21795; successive halving: Jamieson and Talwalkar, arXiv 1502.07943). What is to be scored next follows
from the scores alone, so a run that was killed goes on from its table. Knows nothing of models, nor of how an
evaluation is made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from lorauter.catalog.provenance import Provenance, task_digests
from lorauter.catalog.scores import Evaluation, Outcome, Scorer, ScoreTable, score_all
from lorauter.errors import ConfigError, LorauterError
from lorauter.tasks import Task

_OF_A_DESCENT = 0.25  # of those who stay: variants of one adapter would be all that a task has


@dataclass(frozen=True)
class MatchConfig:
    """How evaluations are spared.

    With 40 adapters and 20 examples a task the defaults spend 25 % of an exhaustive matrix: 40 adapters on 2 examples,
    16 on 4, 6 on 8 and 5 on all.

    Attributes:
        first_examples: of each task, that every adapter meets.
        keep: fraction of a task's adapters that stay after each round, while the examples double.
        min_candidates: adapters that meet all examples of a task, at least, and are ranked by them.
        candidates: `{task: [adapter, ...]}` that meet all of the task's examples whatever the first ones say, because
            their name, a description or a nearby task speaks for them; no other is left out for it.
        seed: of the order in which examples are taken.
    """

    first_examples: int = 2
    keep: float = 0.4
    min_candidates: int = 5
    candidates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("first_examples", "min_candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"match.{name} is {getattr(self, name)}; it must be at least 1", setting=f"match.{name}"
                )
        if not 0 < self.keep < 1:
            raise ConfigError(f"match.keep is {self.keep}; it must be between 0 and 1", setting="match.keep")


@dataclass(frozen=True)
class Match:
    """An adapter that met every example of a task, and its mean score on them."""

    name: str
    score: float


@dataclass(frozen=True)
class Round:
    """One round over all tasks.

    Attributes:
        pairs: of adapter and task that were still in it.
        examples: that each of them had met by its end; where tasks differ, the most.
        evaluations: that it added.
    """

    pairs: int
    examples: int
    evaluations: int


class Matching:
    """Finds the adapters that serve each task best, round after round.

    Everything follows from the table: the same scores give the same next round, in whatever order they came. An
    adapter that fails is left out of all rounds, past ones too, so that another takes its place.

    Args:
        examples: `{task: how many validation examples it has}`.
        adapters: names; their order does not matter.
        table: scores there are already.
        among: `{task: [adapter, ...]}` that it is tried with at all; all where it is not named.
        kin: `{adapter: the first of its descent}`, as `lorauter.catalog.alike.kin` gives it: a descent has at
            most a quarter of those that stay, while there are others.

    Raises:
        ConfigError: a task has no example, or `config.candidates` names a task or an adapter that is not there.
    """

    def __init__(
        self,
        examples: Mapping[str, int],
        adapters: Sequence[str],
        config: MatchConfig | None = None,
        table: ScoreTable | None = None,
        *,
        among: Mapping[str, Collection[str]] | None = None,
        kin: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config or MatchConfig()
        self.table = ScoreTable() if table is None else table
        self.adapters = sorted(set(adapters))
        self._among = {task: frozenset(names) for task, names in (among or {}).items()}
        self._kin = kin or {}
        self._orders: dict[str, list[int]] = {}
        for task, count in sorted(examples.items()):
            if count < 1:
                raise ConfigError(f"task {task!r} has no validation example")
            self._orders[task] = random.Random(f"{self.config.seed} {task}").sample(range(count), count)
        for task, names in self.config.candidates.items():
            for unknown in {task} - self._orders.keys() | set(names) - set(self.adapters):
                raise ConfigError(f"names {unknown!r}, which is not there", setting="match.candidates")

    def next_round(self) -> list[Evaluation]:
        """What is still to be scored before any choice can be made, adapter after adapter; empty when all is done."""
        return sorted(evaluation for task in self._orders for evaluation in self._follow(task)[1])

    def record(self, outcomes: Mapping[Evaluation, Outcome]) -> None:
        """Take outcomes in; they may be some of a round's, or more."""
        self.table.add(outcomes)

    def result(self) -> dict[str, tuple[Match, ...]]:
        """The adapters of each task that met all of its examples, the best first; equals are ordered by name.

        Raises:
            LorauterError: there are evaluations to be made yet.
        """
        ranked = {}
        for task, order in self._orders.items():
            rounds, missing = self._follow(task)
            if missing:
                raise LorauterError(f"task {task!r} waits for {len(missing)} evaluations; score next_round() first")
            finalists = self._ranked(task, rounds[-1][0], order)
            ranked[task] = tuple(Match(name, self.table.mean(name, task, order)) for name in finalists)
        return ranked

    @property
    def spent(self) -> int:
        """Evaluations that the table has of these adapters and tasks, those of adapters that failed later too."""
        return sum(len(self.table.scores.get((a, t), ())) for a in self.adapters for t in self._orders)

    @property
    def exhaustive(self) -> int:
        """Evaluations that the whole matrix of these adapters would take."""
        return len(self.adapters) * sum(map(len, self._orders.values()))

    @property
    def failures(self) -> dict[str, str]:
        """Why each adapter that was left out was."""
        return {name: self.table.failures[name] for name in self.adapters if name in self.table.failures}

    @property
    def rounds(self) -> list[Round]:
        """What the rounds so far took, the present one included, without adapters that failed."""
        followed = (self._follow(task)[0] for task in self._orders)
        return [
            Round(
                pairs=sum(len(alive) for alive, _, _ in parts),
                examples=max(end for _, _, end in parts),
                evaluations=sum(len(alive) * (end - start) for alive, start, end in parts),
            )
            for parts in zip_longest(*followed, fillvalue=([], 0, 0))
        ]

    def _follow(self, task: str) -> tuple[list[tuple[list[str], int, int]], list[Evaluation]]:
        """Go through a task's rounds as far as the scores reach.

        Returns:
            Of each round the adapters, and how many examples they had met before it and by its end; and what the last
            of them still lacks.
        """
        config, order = self.config, self._orders[task]
        rounds: list[tuple[list[str], int, int]] = []
        among = self._among.get(task)
        alive = [n for n in self.adapters if n not in self.table.failures and (among is None or n in among)]
        seen, end, places = 0, config.first_examples, len(alive)
        while True:
            # Nobody can leave any more, so there is nothing to stop for.
            end = len(order) if len(alive) <= config.min_candidates else min(end, len(order))
            rounds.append((alive, seen, end))
            evaluations = (Evaluation(name, task, example) for name in alive for example in order[:end])
            missing = [evaluation for evaluation in evaluations if not self.table.has(evaluation)]
            if missing or end == len(order):
                return rounds, missing
            ranked = self._ranked(task, alive, order[:end])
            places = max(config.min_candidates, int(config.keep * places))
            ranked = self._few_of_a_descent(ranked, max(1, int(_OF_A_DESCENT * places)))
            favoured = config.candidates.get(task, ())
            alive = ranked[:places] + [name for name in ranked[places:] if name in favoured]
            seen, end = end, 2 * end

    def _few_of_a_descent(self, ranked: Sequence[str], most: int) -> list[str]:
        """The same order, but all that a descent has over so many behind the others."""
        count: dict[str, int] = {}
        first: list[str] = []
        behind: list[str] = []
        for name in ranked:
            of = self._kin.get(name, name)
            count[of] = count.get(of, 0) + 1
            (first if count[of] <= most else behind).append(name)
        return [*first, *behind]

    def _ranked(self, task: str, adapters: Iterable[str], examples: Sequence[int]) -> list[str]:
        return sorted(adapters, key=lambda name: (-self.table.mean(name, task, examples), name))


def match_adapters(
    tasks: Sequence[Task],
    adapters: Collection[str],
    scorer: Scorer,
    config: MatchConfig | None = None,
    table: ScoreTable | None = None,
    progress: Callable[[int, int], None] = lambda done, left: None,
    *,
    among: Mapping[str, Collection[str]] | None = None,
    kin: Mapping[str, str] | None = None,
    chunk_size: int = 256,
) -> Matching:
    """Score round after round until every task has its adapters.

    Args:
        adapters: names, or `{name: version}`.
        among, kin: as `Matching`.
        chunk_size: evaluations made between two writes of the table.
        table: where outcomes go, chunk by chunk, and what need not be scored again. It is bound to these
            tasks, and to the adapters' versions if they are given; `ScoreTable.bind` says more of what it is of.
        progress: called with the evaluations made so far and those left in this round.

    Returns:
        The finished matching.

    Raises:
        ConfigError: as `Matching`.
        CatalogError: the table's scores are of something else.
        LorauterError: the scorer gives no outcome for an evaluation, or fails as a whole.
    """
    examples = {task.name: len(task.validation) for task in tasks}
    matching = Matching(examples, list(adapters), config, table, among=among, kin=kin)
    versions = adapters if isinstance(adapters, Mapping) else {}
    matching.table.bind(Provenance(tasks=task_digests(tasks), adapters=versions))
    while evaluations := matching.next_round():
        score_all(
            evaluations,
            scorer,
            matching.table,
            lambda left: progress(matching.spent, left),
            chunk_size=chunk_size,
        )
    return matching
