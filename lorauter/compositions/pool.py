"""Compositions for a catalog's tasks from its adapters: which sources each may have, and where its fit begins.

Stands above catalogs and routing on the one side, and the fits on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from lorauter.adapters.provenance import composed_name
from lorauter.adapters.weights import LoadAdapter, LoraWeights
from lorauter.catalog.catalog import Catalog
from lorauter.catalog.provenance import model_digest
from lorauter.compositions.config import ComposeConfig
from lorauter.compositions.make import Composer, Made, Progress, Wanted
from lorauter.compositions.starts import example_mixtures, likeliest_sources, made_for, starts_of
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine.load import load_decoder
from lorauter.errors import AdapterRejected, ConfigError
from lorauter.routing import RoutingConfig

MAX_SOURCES = 64
"""Adapters that a composition is made of at most: those that the router finds most useful for the task."""

POOR = 0.5
"""The score of a task's best adapter under which a composition is tried."""

_MAX_RANK = 256  # of a source


def wanting(catalog: Catalog) -> list[str]:
    """The tasks that a composition may help: without an adapter of their own, or whose best one is poor, or whose
    composition is stale. A task has two examples at least.
    """
    stale = {catalog.composed[name].task for name in catalog.stale}
    current = {of.task for name, of in catalog.composed.items() if name not in catalog.stale}
    found = []
    for entry in catalog.entries:
        best = max((adapter.score for adapter in entry.adapters if adapter.score is not None), default=None)
        poor = not entry.declared or (best is not None and best < POOR)
        if entry.examples > 1 and (entry.name in stale or (poor and entry.name not in current)):
            found.append(entry.name)
    return found


def compose_for(
    catalog: Catalog,
    tasks: Collection[str],
    load: LoadAdapter,
    work: Path,
    *,
    model: str,
    aliases: Sequence[str] = (),
    device: str = "auto",
    config: ComposeConfig | None = None,
    barred: Mapping[str, Collection[str]] | None = None,
    name_of: Callable[[str], str] = composed_name,
    progress: Progress = lambda done, total, what: None,
    report: Callable[[str], None] = lambda what: None,
) -> list[Made]:
    """Make the compositions of some of a catalog's tasks, in the order of their names.

    Args:
        load: reads the catalog's adapters.
        work: where compositions are kept; what is there is not made again.
        model: the base model: a folder, an id, or "default"; aliases: further names that adapters may give it.
        barred: of each task the adapters that it may not use.
        report: is told of adapters that do not fit the model, which are left out.

    Raises:
        ConfigError: a task or the model is not there, no adapter fits, or a task has but one example.
        AdapterError: an adapter cannot be read.
        TaskError: an example does not fit the model's context.
    """
    places = {name: catalog.place(name) for name in tasks}
    if unknown := sorted(name for name, place in places.items() if place is None):
        raise ConfigError(f"there is no task called {', '.join(unknown)}", setting="task")
    known = {name: catalog.tasks[place].task for name, place in places.items() if place is not None}
    away = {name: frozenset((barred or {}).get(name, ())) for name in sorted(tasks)}
    mixtures = example_mixtures(catalog, RoutingConfig(), away)
    starts = starts_of(catalog, RoutingConfig(), away, mixtures)
    own = {name: bool(made_for(catalog, name, away[name])) for name in away}
    wanted = [Wanted(name_of(name), known[name], mixtures[name], starts[name], away[name], own[name]) for name in away]
    names = (*aliases, *base_model_aliases(model))
    decoder, codec = load_decoder(resolve_model(model), device=device, aliases=names, plain=True)
    base = model_digest(model)
    loaded: dict[str, LoraWeights | None] = {}

    def fitting(names: Sequence[str]) -> list[LoraWeights]:
        for name in names:
            if name not in loaded:
                weights = load(name)
                try:
                    weights.check_fits(decoder.shape, max_rank=_MAX_RANK)
                    loaded[name] = weights
                except AdapterRejected as error:
                    report(f"left out: {error}")
                    loaded[name] = None
        return [found for name in names if (found := loaded[name]) is not None]

    made: list[Made] = []
    for sources, some in _shared(catalog, wanted):
        composer = Composer(decoder, codec, fitting(sources), work, base_model=base, config=config)

        def told(done: int, total: int, what: str, before: int = len(made), some: int = len(some)) -> None:
            steps = total // some
            progress(before * steps + done, len(wanted) * steps, what)

        made += composer.make(some, told)
        if len(sources) == MAX_SOURCES:
            loaded.clear()  # the next task has others
    return made


def _shared(catalog: Catalog, wanted: Sequence[Wanted]) -> Iterator[tuple[list[str], list[Wanted]]]:
    """Sources, and what is to be composed of them: all of a small pool; of a large one each task's own."""
    pool = [name for name in catalog.adapters if name not in catalog.composed]
    if len(pool) <= MAX_SOURCES:
        yield pool, list(wanted)
        return
    useful = likeliest_sources(catalog, RoutingConfig(), {one.task.name: one.barred for one in wanted}, MAX_SOURCES)
    for one in wanted:
        yield useful[one.task.name], [one]
