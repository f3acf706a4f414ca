"""What routing options come to on a catalog, found out once for all queries that ask for the same. Knows no queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorauter.catalog.catalog import Catalog
from lorauter.catalog.index import TaskSubset
from lorauter.routing.options import RoutingConfig, RoutingOptions


@dataclass(eq=False)
class Asked:
    """Options on a catalog.

    Attributes:
        config: the settings, under the preset that is asked for.
        top_k: adapters, or tasks that lend one.
        wanted: tasks that are judged.
        subset: of the tasks that are searched; None are all.
        excluded: of the tasks that are searched, those that are as if they were not there. That others are named, which
            a caller may not see, changes nothing: it would tell that they are there.
        whole: whether all tasks are judged that there are, but for these.
        among: then, (tasks,) which; None are all.
        usable: of tasks, as they are looked up, the adapters that may be used.
        allowed: of the adapters of all tasks, where all are judged.
    """

    options: RoutingOptions
    config: RoutingConfig
    top_k: int
    wanted: int
    subset: TaskSubset | None
    excluded: frozenset[int]
    whole: bool
    among: NDArray[np.bool_] | None
    usable: dict[int, tuple[str, ...]] = field(default_factory=dict)
    allowed: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, options: RoutingOptions, catalog: Catalog, config: RoutingConfig) -> Asked:
        """What they come to, where a router has these settings."""
        config = config.asked(options)
        top_k = options.top_k or config.top_k
        wanted = max(config.num_tasks, config.candidates * config.rerank, top_k)
        subset = options.among(catalog)
        named = (place for name in options.exclude_tasks if (place := catalog.place(name)) is not None)
        excluded = frozenset(named if subset is None else filter(subset.mask.__getitem__, named))
        whole, among = wanted >= len(catalog), None
        if whole and (subset is not None or excluded):
            among = np.ones(len(catalog), np.bool_) if subset is None else subset.mask.copy()
            among[list(excluded)] = False
        return cls(options, config, top_k, wanted, subset, excluded, whole, among)

    @property
    def any(self) -> bool:
        """Whether there is a task to judge, where all are."""
        return self.among is None or bool(self.among.any())

    def allows(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Which of some adapters may be used."""
        return np.fromiter(map(self.options.allows, names), np.bool_, len(names))
