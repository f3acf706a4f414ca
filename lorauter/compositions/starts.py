"""Where fits begin: the mixtures that the router answers a task's own examples with. Knows no models."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lorauter.catalog.catalog import Catalog
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions, compose


def example_mixtures(
    catalog: Catalog, config: RoutingConfig, barred: Mapping[str, Collection[str]]
) -> dict[str, list[dict[str, float]]]:
    """What the validation examples of tasks are answered with, without the adapters that are barred for each.

    Composed adapters are never among them.
    """
    retriever = Retriever(catalog, config)
    found = {}
    for place, entry in enumerate(catalog.tasks):
        if entry.name in barred:
            texts = [example.input for example in entry.task.validation]
            options = RoutingOptions(exclude_adapters=frozenset({*barred[entry.name], *catalog.composed}))
            embeddings = catalog.examples(place).embeddings
            retrieved = retriever.retrieve(embeddings, texts, [options] * len(texts))
            decisions = [
                compose(one, options, config, catalog_version="", versions=catalog.adapters) for one in retrieved
            ]
            found[entry.name] = [{a.name: a.weight for a in decision.adapters} for decision in decisions]
    return found
