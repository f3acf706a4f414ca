"""Builds a catalog from tasks, an encoder and, if there is one, an adapter repository.

A task is represented by the normalised mean of its validation inputs' embeddings (LORAUTER, arXiv 2601.21795,
section 3). An adapter serves the task of its own name unless a mapping says otherwise. Knows nothing of how
catalogs are stored or queried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np

from lorauter.adapters.repository import AdapterManifest, AdapterRepository
from lorauter.catalog.catalog import PROBE_TEXT, Catalog, CatalogTask, RankedAdapter
from lorauter.encoder import Encoder, normalised
from lorauter.errors import AdapterNotFound, ConfigError
from lorauter.tasks import Task


def build_catalog(
    tasks: Sequence[Task],
    encoder: Encoder,
    *,
    repository: AdapterRepository | None = None,
    mapping: Mapping[str, Sequence[str]] | None = None,
) -> Catalog:
    """Represent the tasks and assign the adapters.

    Args:
        tasks: at least one; their order does not matter.
        encoder: embeds the validation inputs.
        repository: adapters to assign; without one the catalog routes to tasks alone.
        mapping: `{task: [adapter, ...]}`, the best first, for tasks that do not take the adapter of their name.

    Raises:
        ConfigError: no tasks, two of one name, or the mapping names a task or an adapter that is not there.
        AdapterError, StoreError: the repository cannot be read.
    """
    if not tasks:
        raise ConfigError("a catalog needs at least one task")
    tasks = sorted(tasks, key=lambda task: task.name)
    twice = {task.name for task, following in pairwise(tasks) if task.name == following.name}
    if twice:
        raise ConfigError(f"more than one task is called {', '.join(sorted(twice))}")
    manifests = _manifests(repository) if repository else {}
    assigned = _assign(tasks, manifests, mapping or {})
    embeddings = encoder.encode([example.input for task in tasks for example in task.validation] + [PROBE_TEXT])
    examples, probe = embeddings[:-1], embeddings[-1]
    ends = np.cumsum([len(task.validation) for task in tasks])
    means = np.stack([rows.mean(axis=0) for rows in np.split(examples, ends[:-1])])
    base_models = sorted({m.base_model for m in manifests.values() if m.base_model})
    return Catalog(
        tasks=tuple(CatalogTask(task, assigned[task.name]) for task in tasks),
        centroids=normalised(means),
        examples=examples,
        probe=probe,
        adapters={name: manifest.version for name, manifest in sorted(manifests.items())},
        encoder=encoder.name,
        base_model=", ".join(base_models),
    )


def _manifests(repository: AdapterRepository) -> dict[str, AdapterManifest]:
    found = {}
    for name in repository.names():
        with suppress(AdapterNotFound):  # some other folder in the store
            found[name] = repository.manifest(name)
    return found


def _assign(
    tasks: Sequence[Task], manifests: Mapping[str, AdapterManifest], mapping: Mapping[str, Sequence[str]]
) -> dict[str, tuple[RankedAdapter, ...]]:
    names = {task.name for task in tasks}
    for task, adapters in mapping.items():
        if task not in names:
            raise ConfigError(f"the mapping names task {task!r}, which is not among the tasks", setting="mapping")
        for adapter in adapters:
            if adapter not in manifests:
                raise ConfigError(
                    f"the mapping gives task {task!r} the adapter {adapter!r}, which is not in the store",
                    setting="mapping",
                )
    own = {name: [name] if name in manifests else [] for name in names}
    return {name: tuple(RankedAdapter(a) for a in mapping.get(name, own[name])) for name in names}
