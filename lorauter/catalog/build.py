"""Builds a catalog from tasks, an encoder and, if there is one, an adapter repository.

A task is represented by the normalised mean of its validation inputs' embeddings (LORAUTER, arXiv 2601.21795,
section 3). An adapter serves the task of its own name unless a mapping says otherwise. Knows nothing of how
catalogs are stored or queried.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lorauter.adapters.provenance import Composition
from lorauter.adapters.repository import AdapterRepository, Report
from lorauter.catalog.catalog import PROBE_TEXT, Catalog
from lorauter.catalog.pool import Pool, read_pool
from lorauter.catalog.segments import CatalogTask, Examples, RankedAdapter, Segment, TaskRow, runs
from lorauter.catalog.shown import ShownExamples
from lorauter.catalog.utility import Scores, shrunken_scores, worths
from lorauter.catalog.whitening import StatesOf
from lorauter.encoder import Encoder, normalised
from lorauter.errors import ConfigError, TaskError
from lorauter.states import StateModel
from lorauter.tasks import Task

logger = logging.getLogger("lorauter.catalog")

MAX_RANKED = 64
"""Adapters that a task keeps at most, of those that were tried on it."""


def build_catalog(
    tasks: Sequence[Task],
    encoder: Encoder,
    *,
    states: StateModel | None = None,
    repository: AdapterRepository | None = None,
    mapping: Mapping[str, Sequence[str]] | None = None,
    scores: Mapping[str, Scores] | None = None,
    report: Report = logger.warning,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Catalog:
    """Represent the tasks and assign the adapters.

    Args:
        tasks: at least one; their order does not matter.
        encoder: embeds the validation inputs.
        states: reads them; without it the catalog has no states.
        repository: adapters to assign; without one the catalog routes to tasks alone.
        mapping: `{task: [adapter, ...]}`, the best first, for tasks that do not take the adapter of their name.
        scores: `{task: {adapter: {validation example: score}}}`, as matching makes them; tasks that have any rank
            their adapters by `lorauter.catalog.utility.worths`.
        report: is told of adapters that cannot be served, which are left out, and of what is odd about others.
        progress: called with how many adapters were read, then tasks embedded, and how many there are.

    Raises:
        ConfigError: no tasks, two of one name, the mapping names a task or an adapter that is not there, or a score
            is of no validation example or not finite.
        TaskError: an example is a text that the model of states cannot be asked.
        AdapterUnavailable, StoreError: the repository cannot be read.
    """
    tasks = sorted_tasks(tasks)
    pool = read_pool(repository, report, progress=progress) if repository else Pool({})
    assigned = _assign(tasks, pool, mapping or {})
    drafts = []
    for task in tasks:
        composed = composed_for(task.name, assigned[task.name], pool.composed)
        own = tuple(assigned[task.name]), (scores or {}).get(task.name, {})
        drafts.append(Draft(task, *own, embed(task, encoder, states), *composed))
        progress(len(drafts), len(tasks))
    spans = runs([task.name for task in tasks])
    return Catalog(
        tuple(make_segment(drafts[start:end], pool.versions) for start, end in spans),
        encoder.encode([PROBE_TEXT])[0],
        {name: pool.versions[name] for name in sorted(pool.versions)},
        encoder.name,
        pool.base_model,
        {name: pool.composed[name] for name in sorted(pool.composed)},
        states=probed(states) if states is not None else None,
    )


def probed(states: StateModel) -> StatesOf:
    """Whose states they are."""
    return StatesOf(states.name, states.states([PROBE_TEXT])[0])


class Draft(NamedTuple):
    """A task that is to be in a catalog.

    Attributes:
        assigned: the adapters that were made for it, the best first.
        scores: as `build_catalog` takes them.
        examples: as `embed` gives them.
        ahead, behind: what was composed for it, as `composed_for` gives it.
        shown: what its examples do before a query, if that was found out.
    """

    task: Task
    assigned: tuple[str, ...]
    scores: Scores
    examples: Examples
    ahead: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    shown: ShownExamples | None = None


def make_segment(drafts: Sequence[Draft], adapters: Container[str]) -> Segment:
    """Rank the adapters of some tasks, whose scores speak for each other; the same drafts make the same bytes.

    Args:
        adapters: those that there are.

    Raises:
        ConfigError: a score is of no validation example, or is not finite.
    """
    known = [_known(draft, adapters) for draft in drafts]
    names = sorted({name for scores in known for name in scores})
    centroids = normalised(np.stack([draft.examples.embeddings.mean(axis=0) for draft in drafts]))
    shrunken = shrunken_scores(known, names, centroids)
    return Segment.of(
        [
            TaskRow(_entry(draft, own, dict(zip(names, row.tolist(), strict=True))), draft.examples)
            for draft, own, row in zip(drafts, known, shrunken, strict=True)
        ]
    )


def composed_for(
    task: str, assigned: Sequence[str], composed: Mapping[str, Composition]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What was composed for a task: what ranks before its other adapters, and what ranks behind them.

    What was composed has beaten the mixture with the adapters that it is made of; one that was made for the task and
    came later, it has not.
    """
    mine = [name for name in sorted(composed) if composed[name].task == task and name not in assigned]
    ahead = tuple(name for name in mine if set(assigned) <= composed[name].sources.keys())
    return ahead, tuple(name for name in mine if name not in ahead)


def sorted_tasks(tasks: Sequence[Task]) -> list[Task]:
    """The tasks by name. Raises ConfigError where there are none, or two of one name."""
    if not tasks:
        raise ConfigError("a catalog needs at least one task")
    tasks = sorted(tasks, key=lambda task: task.name)
    twice = {task.name for task, following in pairwise(tasks) if task.name == following.name}
    if twice:
        raise ConfigError(f"more than one task is called {', '.join(sorted(twice))}")
    return tasks


def embed(task: Task, encoder: Encoder, states: StateModel | None) -> Examples:
    """Embed a task's validation inputs, and read them; by themselves, as what shares a batch may change an embedding's
    last bits. Raises TaskError: the model of states cannot be asked one of them."""
    texts = [example.input for example in task.validation]
    found = states.states(texts) if states is not None else None
    if states is not None and found is not None:
        for i, of in enumerate(found):
            if not np.isfinite(of).all():
                raise TaskError(
                    f"validation[{i}]: {states.name!r} has no state of this input; its chat template may refuse it. "
                    "Change the input, or build the catalog without states",
                    source=task.name,
                )
    return Examples.of(task, encoder.encode(texts), found)


def of_own_name(task: str, adapters: Container[str]) -> list[str]:
    """The adapters that serve a task of which nothing else is known."""
    return [task] if task in adapters else []


def _known(draft: Draft, adapters: Container[str]) -> dict[str, dict[int, float]]:
    """A task's scores of adapters that are there, checked, and in an order that does not depend on theirs.

    What was composed of the task's examples is told nothing by its scores on them.
    """
    task, known = draft.task, {}
    for name in sorted(draft.scores):
        scores = draft.scores[name]
        if name not in adapters or not scores or name in (*draft.ahead, *draft.behind):
            continue
        for example, score in scores.items():
            where = f"the score of adapter {name!r} on task {task.name!r}, example {example}"
            if not 0 <= example < len(task.validation):
                raise ConfigError(f"{where}: the task has {len(task.validation)} validation examples", setting="scores")
            if not math.isfinite(score):
                raise ConfigError(f"{where}, is {score}; it must be finite", setting="scores")
        known[name] = {example: float(score) for example, score in sorted(scores.items())}
    return known


def _entry(draft: Draft, scores: dict[str, dict[int, float]], values: Mapping[str, float]) -> CatalogTask:
    """A task with its adapters by their worth: `values` has what each score comes to."""
    declared = draft.assigned
    ranked = tuple(map(RankedAdapter, declared))
    if scores:
        found = [RankedAdapter(name, values[name] if name in scores else None) for name in {*scores, *declared}]
        worth = worths([adapter.score for adapter in found], [adapter.name in declared for adapter in found])
        order = sorted(range(len(found)), key=lambda i: (-worth[i], found[i].name))[:MAX_RANKED]
        ranked = tuple(found[i] for i in order)
    ahead, behind = (tuple(map(RankedAdapter, names)) for names in (draft.ahead, draft.behind))
    of = (*draft.ahead, *declared, *draft.behind)
    return CatalogTask(draft.task, (*ahead, *ranked, *behind), scores, of, draft.shown)


def _assign(tasks: Sequence[Task], pool: Pool, mapping: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    names = {task.name for task in tasks}
    for task, wanted in mapping.items():
        if task not in names:
            raise ConfigError(f"the mapping names task {task!r}, which is not among the tasks", setting="mapping")
        for adapter in wanted:
            if adapter not in pool.versions and adapter not in pool.left_out:
                raise ConfigError(
                    f"the mapping gives task {task!r} the adapter {adapter!r}, which is not in the store",
                    setting="mapping",
                )
    given = {
        task: [name for name in dict.fromkeys(wanted) if name in pool.versions]  # twice is no more
        for task, wanted in mapping.items()
    }
    return {name: given.get(name, of_own_name(name, pool.versions)) for name in names}
