"""Changes to a catalog, each of which gives a new one.

A change embeds no more than the examples that are new, and makes no more segments than those whose tasks or adapters
change. What comes out is, byte for byte, the catalog that would be built anew from the same tasks, adapters, mapping
and scores. Knows nothing of how scores are made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from lorauter.adapters.provenance import Composition
from lorauter.adapters.repository import AdapterManifest, AdapterRepository, Report
from lorauter.catalog.build import Draft, composed_for, embed, logger, make_segment, of_own_name, probed, sorted_tasks
from lorauter.catalog.catalog import Catalog
from lorauter.catalog.pool import Pool, read_pool
from lorauter.catalog.segments import Examples, runs
from lorauter.catalog.shown import ShownExamples
from lorauter.catalog.utility import Scores
from lorauter.encoder import Encoder
from lorauter.errors import CatalogError, ConfigError
from lorauter.states import StateModel
from lorauter.tasks import Task


def with_tasks(
    catalog: Catalog,
    tasks: Sequence[Task],
    encoder: Encoder,
    *,
    states: StateModel | None = None,
    repository: AdapterRepository | None = None,
    scores: Mapping[str, Scores] | None = None,
    report: Report = logger.warning,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Catalog:
    """Add tasks, or replace those of the same names.

    A task that is replaced keeps its scores if its validation examples and its metric are the same.

    Args:
        encoder: the one that the catalog was built with.
        states: likewise, if the catalog has states; else it is not asked.
        repository: adapters are taken from it, as by `with_adapters`; else they are the catalog's.
        scores: `{task: {adapter: {validation example: score}}}` to add.
        report: as for `with_adapters`.
        progress: called with how many tasks were embedded, then adapters read, and how many there are.

    Raises:
        CatalogError: another encoder, or other states, or none where the catalog has some.
        ConfigError: no tasks, two of one name, or a score is of no validation example or not finite.
        TaskError: an example is a text that the model of states cannot be asked.
        AdapterUnavailable, StoreError: the repository cannot be read.
    """
    catalog.check_encoder(encoder)
    reader = _reader(catalog, states)
    put = {}
    for done, task in enumerate(sorted_tasks(tasks), start=1):
        place = catalog.place(task.name)
        before = None if place is None else catalog.row(place)
        same = before is not None and before.entry.task.validation == task.validation
        put[task.name] = _Put(
            task,
            before.examples if before is not None and same else embed(task, encoder, reader),
            before is not None and same and before.entry.task.metric == task.metric,
        )
        progress(done, len(tasks))
    pool = read_pool(repository, report, known=_pool(catalog), progress=progress) if repository else None
    return _changed(catalog, put=put, pool=pool, added=scores)


def without_tasks(catalog: Catalog, names: Iterable[str]) -> Catalog:
    """Take tasks out. Raises ConfigError: one is not there, or none would be left."""
    names = set(names)
    _check_there(names, catalog.names, "task")
    if len(names) == len(catalog):
        raise ConfigError("a catalog needs at least one task; the last one cannot be taken out", setting="tasks")
    return _changed(catalog, gone=names)


def with_adapters(
    catalog: Catalog,
    repository: AdapterRepository,
    *,
    scores: Mapping[str, Scores] | None = None,
    report: Report = logger.warning,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Catalog:
    """Take the adapters and their versions anew from a repository: new ones come, and those that are gone go.

    An adapter of another version keeps its scores, until there are new ones for the task.

    Args:
        scores: `{task: {adapter: {validation example: score}}}` to add.
        report: is told of adapters that cannot be served, which are left out, and of what is odd about others.
        progress: called with how many adapters were read, and how many there are.

    Raises:
        ConfigError: a score is of no validation example or not finite.
        AdapterUnavailable, StoreError: the repository cannot be read.
    """
    pool = read_pool(repository, report, known=_pool(catalog), progress=progress)
    return _changed(catalog, pool=pool, added=scores)


def with_adapter(catalog: Catalog, *adapters: AdapterManifest) -> Catalog:
    """Add an adapter or some, or another version of them, which keeps the scores of the one before."""
    bases = {*catalog.base_model.split(", "), *(adapter.base_model for adapter in adapters)} - {""}
    versions = {adapter.name: adapter.version for adapter in adapters}
    composed = {name: of for name, of in catalog.composed.items() if name not in versions}
    composed |= {a.name: of for a in adapters if (of := Composition.of_adapter(a.name, a.provenance)) is not None}
    pool = Pool({**catalog.adapters, **versions}, ", ".join(sorted(bases)), composed=composed)
    return _changed(catalog, pool=pool)


def without_adapters(catalog: Catalog, names: Iterable[str]) -> Catalog:
    """Take adapters out, until the next `with_adapters`. Raises ConfigError: one is not there."""
    names = set(names)
    _check_there(names, catalog.adapters, "adapter")
    left = {name: version for name, version in catalog.adapters.items() if name not in names}
    composed = {name: of for name, of in catalog.composed.items() if name in left}
    return _changed(catalog, pool=Pool(left, catalog.base_model if left else "", composed=composed))


def with_scores(catalog: Catalog, scores: Mapping[str, Scores]) -> Catalog:
    """Add scores, `{task: {adapter: {validation example: score}}}`, in place of those of the same examples.

    Raises:
        ConfigError: a score is of no validation example or not finite.
    """
    return _changed(catalog, added=scores)


def with_copies(catalog: Catalog, copies: Mapping[str, str], scores: Mapping[str, Scores]) -> Catalog:
    """Add scores as `with_scores` does, and say which adapters compute the same as one that was tried: they rank as it
    does, where it may not be used.

    Args:
        copies: `{adapter: the one that was tried}`.

    Raises:
        ConfigError: an adapter is not there, or as `with_scores`.
    """
    _check_there([*copies, *copies.values()], catalog.adapters, "adapter")
    tried = set(copies.values())
    added = {
        task: {**of, **{copy: of[name] for copy, name in copies.items() if name in of}} for task, of in scores.items()
    }
    same = {**copies, **{name: name for name in tried}}
    return replace(with_scores(catalog, added), copies={name: same[name] for name in sorted(same)})


def with_shown(catalog: Catalog, shown: Mapping[str, ShownExamples]) -> Catalog:
    """Say of tasks what their examples do before a query; of others stays what was said.

    Raises:
        ConfigError: a task is not there, or it is said of another number of examples than it has.
    """
    _check_there(shown, catalog.names, "task")
    for name, of in shown.items():
        place = catalog.place(name)
        assert place is not None
        if len(of.tokens) != (has := catalog.entries[place].examples):
            raise ConfigError(f"task {name!r} has {has} examples, and {len(of.tokens)} were shown", setting="shown")
    return _changed(catalog, shown=shown)


def _reader(catalog: Catalog, states: StateModel | None) -> StateModel | None:
    """What reads examples that come. Raises CatalogError: not what has read those that are there."""
    if catalog.states is None:
        return None
    if states is None:
        raise CatalogError(
            f"its examples have states of {catalog.states.model!r}, and tasks that come need theirs: name that model, "
            "or build the catalog anew without states",
            uri=catalog.version,
        )
    catalog.check_states(probed(states))
    return states


class _Put(NamedTuple):
    """A task that comes, with its examples' embeddings, and whether the scores of the one before are of it too."""

    task: Task
    examples: Examples
    scored: bool


def _changed(
    catalog: Catalog,
    *,
    put: Mapping[str, _Put] | None = None,
    gone: Collection[str] = (),
    pool: Pool | None = None,
    added: Mapping[str, Scores] | None = None,
    shown: Mapping[str, ShownExamples] | None = None,
) -> Catalog:
    """The catalog with some of it replaced: tasks, adapters with their base model; and with scores added."""
    put, added, shown = put or {}, added or {}, shown or {}
    pool = pool or _pool(catalog)
    adapters = pool.versions
    renewed = {name for name, version in adapters.items() if catalog.adapters.get(name) != version}
    left = catalog.adapters.keys() - adapters.keys()
    touched = {*put, *added, *shown, *left, *(renewed - catalog.adapters.keys())}  # adapters, as tasks of their names
    # And tasks for which something was composed, or is no more.
    touched |= {of.task for name, of in pool.composed.items() if catalog.composed.get(name) != of}
    touched |= {of.task for name, of in catalog.composed.items() if pool.composed.get(name) != of}
    names = sorted((set(catalog.names) - set(gone)) | put.keys())
    there = {segment.names: segment for segment in catalog.segments if left.isdisjoint(segment.adapters)}

    def draft(name: str) -> Draft:
        place = catalog.place(name)
        before = None if place is None else catalog.row(place)
        new = put.get(name)
        scores = before.entry.scores if before is not None and (new is None or new.scored) else {}
        assigned = of_own_name(name, adapters)
        if before is not None:
            declared = [adapter for adapter in before.entry.declared if not _is_for(name, adapter, catalog)]
            if declared != of_own_name(name, catalog.adapters):
                assigned = [adapter for adapter in declared if adapter in adapters]  # by a mapping
        merged = _merged(scores, added.get(name, {}), renewed)
        composed = composed_for(name, assigned, pool.composed)
        known = before.entry.shown if before is not None and (new is None or new.scored) else None
        of = shown.get(name, known)
        if new is not None:
            return Draft(new.task, tuple(assigned), merged, new.examples, *composed, of)
        assert before is not None
        return Draft(before.entry.task, tuple(assigned), merged, before.examples, *composed, of)

    segments = []
    for start, end in runs(names):
        within = tuple(names[start:end])
        segment = there.get(within)
        if segment is None or not touched.isdisjoint(within):
            segment = make_segment([draft(name) for name in within], adapters)
        segments.append(segment)
    composed = {name: pool.composed[name] for name in sorted(pool.composed)}
    return catalog.successor(segments, {name: adapters[name] for name in sorted(adapters)}, pool.base_model, composed)


def _pool(catalog: Catalog) -> Pool:
    return Pool(catalog.adapters, catalog.base_model, composed=catalog.composed)


def _is_for(task: str, adapter: str, catalog: Catalog) -> bool:
    """Whether an adapter was composed for a task."""
    composition = catalog.composed.get(adapter)
    return composition is not None and composition.task == task


def _merged(known: Scores, added: Scores, renewed: Container[str]) -> dict[str, dict[int, float]]:
    merged = {name: dict(of) for name, of in known.items()}
    for name, of in added.items():
        merged[name] = dict(of) if name in renewed else merged.get(name, {}) | dict(of)
    return merged


def _check_there(names: Iterable[str], there: Container[str], what: str) -> None:
    unknown = sorted(name for name in names if name not in there)
    if unknown:
        raise ConfigError(f"the catalog has no {what} called {', '.join(unknown)}", setting=f"{what}s")
