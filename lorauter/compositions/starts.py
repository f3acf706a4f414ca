"""What the router says of a task's own examples: where fits begin, and which adapters are likely to be of use.

Knows no models. Composed adapters are never part of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from lorauter.catalog.catalog import Catalog
from lorauter.routing import Retrieved, Retriever, RoutingConfig, RoutingOptions, compose

# Of a weight: further ones change with the encoder's threads, and a composition is known by what it is made of.
_DIGITS = 4

Barred = Mapping[str, Collection[str]]
"""Of each task that is asked about, which the catalog has, the adapters that it may not use."""


def example_mixtures(
    catalog: Catalog, config: RoutingConfig, barred: Barred, *, unknown: bool = False
) -> dict[str, list[dict[str, float]]]:
    """What the validation examples of each task are answered with.

    Args:
        unknown: as if the task were not in the catalog: what tasks that are worded alike lend it.
    """
    versions, found = catalog.adapters, {}
    for name, options, retrieved in _retrieved(catalog, config, barred, unknown=unknown):
        decisions = [compose(one, options, config, catalog_version="", versions=versions) for one in retrieved]
        found[name] = [{a.name: round(a.weight, _DIGITS) for a in decision.adapters} for decision in decisions]
    return found


def starts_of(
    catalog: Catalog,
    config: RoutingConfig,
    barred: Barred,
    mixtures: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, list[dict[str, float]]]:
    """Where the fit of each task may begin: with the mean of what its examples are answered with, with that of what
    tasks that are worded alike would lend it, or with an adapter that was made for it alone; where there is none of
    these, with the base model.

    Args:
        mixtures: as `example_mixtures` gives them.
    """
    unknown = example_mixtures(catalog, config, barred, unknown=True)
    found = {}
    for name in barred:
        own = [{adapter: 1.0} for adapter in made_for(catalog, name, barred[name])]
        means = [mean_mixture(of) for of in (mixtures[name], unknown[name])]
        starts = [start for i, start in enumerate([*means, *own]) if start and start not in [*means, *own][:i]]
        found[name] = starts or [{}]
    return found


def made_for(catalog: Catalog, task: str, barred: Collection[str]) -> list[str]:
    """The adapters that were made for a task and may be used, compositions left out."""
    place = catalog.place(task)
    assert place is not None
    declared = catalog.entries[place].declared
    return [adapter for adapter in declared if adapter not in barred and adapter not in catalog.composed]


def mean_mixture(mixtures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean weight of every adapter, by name."""
    names = sorted({name for mixture in mixtures for name in mixture})
    return {name: sum(mixture.get(name, 0.0) for mixture in mixtures) / len(mixtures) for name in names}


def likeliest_sources(catalog: Catalog, config: RoutingConfig, barred: Barred, count: int) -> dict[str, list[str]]:
    """The adapters that are expected to be worth most for each task, so many of them at most, by name.

    Where the router knows of fewer, others follow in the order of their names.
    """
    found = {}
    for name, options, retrieved in _retrieved(catalog, config, barred):
        totals = dict.fromkeys((adapter for adapter in catalog.adapters if options.allows(adapter)), 0.0)
        for one in retrieved:
            for adapter in one.adapters:
                totals[adapter.name] += adapter.utility
        found[name] = sorted(sorted(totals, key=lambda adapter: (-totals[adapter], adapter))[:count])
    return found


def _retrieved(
    catalog: Catalog, config: RoutingConfig, barred: Barred, *, unknown: bool = False
) -> Iterator[tuple[str, RoutingOptions, Sequence[Retrieved]]]:
    retriever = Retriever(catalog, config)
    for name in sorted(barred):
        place = catalog.place(name)
        assert place is not None
        texts = [example.input for example in catalog.tasks[place].task.validation]
        options = RoutingOptions(
            exclude_tasks=frozenset({name} if unknown else ()),
            exclude_adapters=frozenset({*barred[name], *catalog.composed}),
            examples=0,
        )
        embeddings = catalog.examples(place).embeddings
        yield name, options, retriever.retrieve(embeddings, texts, [options] * len(texts))
