"""Narrowing a large pool before adapters are tried in earnest: what is cheap comes first.

Weights are looked at: adapters that cannot be used are out, and of those that compute the same one is tried. Then
every task is tried with all that are left by likelihood, which takes no decoding, on one example; a quarter goes on to
two examples, and so on, until a few of different descent have met all. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lorauter.catalog.alike import Sketch, kin, twins
from lorauter.catalog.match import MatchConfig, Matching, match_adapters
from lorauter.catalog.provenance import Provenance, task_digests
from lorauter.catalog.scores import Evaluation, Failed, Scorer, ScoreTable
from lorauter.tasks import Task

LARGE = 64
"""Adapters of a pool that is not screened, at most."""

SCREEN = MatchConfig(first_examples=1, keep=0.25, min_candidates=12)
"""How likelihoods are spared: about 7 % of those of every adapter on every example, however many adapters there are."""


class LookingScorer(Scorer, Protocol):
    """Makes evaluations by likelihood, and sees weights."""

    def look(self, names: Iterable[str]) -> Mapping[str, Sketch | Failed]:
        """The sketch of each adapter, or why it cannot be used."""


@dataclass(frozen=True)
class Screening:
    """What is left of a pool.

    Attributes:
        shortlists: by task, the adapters that met all of its examples, the likeliest first, and those that were
            favoured.
        matching: the matching by likelihood, with what was spent and who has failed.
        twins: `{adapter: the one that computes the same, and was tried in its place}`.
        kin: of those that were tried, as `lorauter.catalog.alike.kin` gives it.
    """

    shortlists: Mapping[str, Sequence[str]]
    matching: Matching
    twins: Mapping[str, str]
    kin: Mapping[str, str]


def screen(
    tasks: Sequence[Task],
    adapters: Mapping[str, str],
    scorer: LookingScorer,
    table: ScoreTable | None = None,
    *,
    favoured: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[int, int], None] = lambda done, left: None,
    chunk_size: int = 256,
) -> Screening:
    """Find the few adapters of each task that are worth trying in earnest.

    Args:
        adapters: `{name: version}`.
        table: scores by likelihood; see `match_adapters`.
        favoured: `{task: [adapter, ...]}` that are on its shortlist whatever they score, and in nobody's place.
        progress, chunk_size: as `match_adapters`.

    Raises:
        CatalogError, LorauterError: as `match_adapters`.
    """
    table = ScoreTable() if table is None else table
    favoured = favoured or {}
    known = {name for names in favoured.values() for name in names}
    table.bind(Provenance(tasks=task_digests(tasks), adapters=adapters))
    sound = (name for name in adapters if name not in table.failures)
    seen = scorer.look(sorted(sound, key=lambda name: (name not in known, name)))
    sketches = {name: of for name, of in seen.items() if not isinstance(of, Failed)}
    table.add({Evaluation(n, tasks[0].name, 0): of for n, of in seen.items() if isinstance(of, Failed)})
    same = {name: other for name, other in twins(sketches).items() if name != other and name not in known}
    tried = {name: version for name, version in adapters.items() if name not in same}
    descent = kin({name: of for name, of in sketches.items() if name in tried})
    matching = match_adapters(
        tasks,
        tried,
        scorer,
        replace(SCREEN, candidates=favoured),
        table,
        progress,
        kin=descent,
        chunk_size=chunk_size,
    )
    shortlists = {task: [match.name for match in matches] for task, matches in matching.result().items()}
    return Screening(shortlists, matching, same, descent)
