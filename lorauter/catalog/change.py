"""Changes to a catalog, each of which gives a new one.

A change embeds no more than the examples that are new. What comes out is, byte for byte, the catalog that would be
built anew from the same tasks, adapters, mapping and scores. Knows nothing of how scores are made.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from lorauter.adapters.repository import AdapterManifest, AdapterRepository, Report
from lorauter.catalog.build import assemble, embed, logger, of_own_name, sorted_tasks
from lorauter.catalog.catalog import Catalog
from lorauter.catalog.pool import Pool, read_pool
from lorauter.catalog.utility import Scores
from lorauter.encoder import Embeddings, Encoder
from lorauter.errors import ConfigError
from lorauter.tasks import Task


def with_tasks(
    catalog: Catalog,
    tasks: Sequence[Task],
    encoder: Encoder,
    *,
    repository: AdapterRepository | None = None,
    scores: Mapping[str, Scores] | None = None,
    report: Report = logger.warning,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Catalog:
    """Add tasks, or replace those of the same names.

    A task that is replaced keeps its scores if its validation examples and its metric are the same.

    Args:
        encoder: the one that the catalog was built with.
        repository: adapters are taken from it, as by `with_adapters`; else they are the catalog's.
        scores: `{task: {adapter: {validation example: score}}}` to add.
        report: as for `with_adapters`.
        progress: called with how many tasks were embedded, then adapters read, and how many there are.

    Raises:
        CatalogError: another encoder.
        ConfigError: no tasks, two of one name, or a score is of no validation example or not finite.
        AdapterUnavailable, StoreError: the repository cannot be read.
    """
    catalog.check_encoder(encoder)
    known, parts = _scores(catalog), _parts(catalog)
    for done, task in enumerate(sorted_tasks(tasks), start=1):
        before = parts.get(task.name)
        same = before is not None and before[0].validation == task.validation
        parts[task.name] = task, before[1] if before is not None and same else embed(task, encoder)
        if before is not None and not (same and before[0].metric == task.metric):
            known.pop(task.name)
        progress(done, len(tasks))
    pool = read_pool(repository, report, known=catalog.adapters, progress=progress) if repository else None
    return _changed(catalog, parts=parts, pool=pool, known=known, added=scores)


def without_tasks(catalog: Catalog, names: Iterable[str]) -> Catalog:
    """Take tasks out. Raises ConfigError: one is not there, or none would be left."""
    names, parts = set(names), _parts(catalog)
    _check_there(names, parts, "task")
    if names == parts.keys():
        raise ConfigError("a catalog needs at least one task; the last one cannot be taken out", setting="tasks")
    return _changed(catalog, parts={name: part for name, part in parts.items() if name not in names})


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
    pool = read_pool(repository, report, known=catalog.adapters, progress=progress)
    return _changed(catalog, pool=pool, added=scores)


def with_adapter(catalog: Catalog, *adapters: AdapterManifest) -> Catalog:
    """Add an adapter or some, or another version of them, which keeps the scores of the one before."""
    bases = {*catalog.base_model.split(", "), *(adapter.base_model for adapter in adapters)} - {""}
    versions = {adapter.name: adapter.version for adapter in adapters}
    return _changed(catalog, pool=Pool({**catalog.adapters, **versions}, ", ".join(sorted(bases))))


def without_adapters(catalog: Catalog, names: Iterable[str]) -> Catalog:
    """Take adapters out, until the next `with_adapters`. Raises ConfigError: one is not there."""
    names = set(names)
    _check_there(names, catalog.adapters, "adapter")
    left = {name: version for name, version in catalog.adapters.items() if name not in names}
    return _changed(catalog, pool=Pool(left, catalog.base_model if left else ""))


def with_scores(catalog: Catalog, scores: Mapping[str, Scores]) -> Catalog:
    """Add scores, `{task: {adapter: {validation example: score}}}`, in place of those of the same examples.

    Raises:
        ConfigError: a score is of no validation example or not finite.
    """
    return _changed(catalog, added=scores)


_Parts = dict[str, tuple[Task, Embeddings]]


def _changed(
    catalog: Catalog,
    *,
    parts: _Parts | None = None,
    pool: Pool | None = None,
    known: Mapping[str, Scores] | None = None,
    added: Mapping[str, Scores] | None = None,
) -> Catalog:
    """The catalog with some of it replaced: tasks, adapters with their base model, scores; and with scores added."""
    parts = dict(sorted((_parts(catalog) if parts is None else parts).items()))
    pool = pool or Pool(catalog.adapters, catalog.base_model)
    adapters = pool.versions
    renewed = {name for name, version in adapters.items() if catalog.adapters.get(name) != version}
    return assemble(
        [task for task, _ in parts.values()],
        [examples for _, examples in parts.values()],
        assigned=_assigned(catalog, parts, adapters),
        scores=_merged(_scores(catalog) if known is None else known, added or {}, renewed),
        adapters=adapters,
        probe=catalog.probe,
        encoder=catalog.encoder,
        base_model=pool.base_model,
    )


def _parts(catalog: Catalog) -> _Parts:
    pairs = zip(catalog.tasks, catalog.task_examples, strict=True)
    return {entry.name: (entry.task, examples) for entry, examples in pairs}


def _scores(catalog: Catalog) -> dict[str, Scores]:
    return {entry.name: entry.scores for entry in catalog.tasks}


def _merged(
    known: Mapping[str, Scores], added: Mapping[str, Scores], renewed: Container[str]
) -> dict[str, dict[str, dict[int, float]]]:
    merged = {task: {name: dict(of) for name, of in scores.items()} for task, scores in known.items()}
    for task, scores in added.items():
        own = merged.setdefault(task, {})
        for name, of in scores.items():
            own[name] = dict(of) if name in renewed else own.get(name, {}) | dict(of)
    return merged


def _assigned(catalog: Catalog, tasks: Iterable[str], adapters: Container[str]) -> dict[str, list[str]]:
    """Adapters that were made for each task: a mapping's stay as far as they are there, else it goes by the names."""
    mapped = {}
    for entry in catalog.tasks:
        if list(entry.declared) != of_own_name(entry.name, catalog.adapters):
            mapped[entry.name] = [name for name in entry.declared if name in adapters]
    return {task: mapped.get(task, of_own_name(task, adapters)) for task in tasks}


def _check_there(names: Iterable[str], there: Container[str], what: str) -> None:
    unknown = sorted(name for name in names if name not in there)
    if unknown:
        raise ConfigError(f"the catalog has no {what} called {', '.join(unknown)}", setting=f"{what}s")
