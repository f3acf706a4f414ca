"""Tasks in two dimensions: the plane in which a catalog's tasks differ most.

The two principal components of the task representations, by numpy's singular value decomposition. Knows nothing of how
a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorauter.catalog.catalog import Catalog
from lorauter.encoder import Embeddings

MOST = 1000  # tasks that are placed, and that the plane is fitted to


@dataclass(frozen=True)
class Layout:
    """A plane, and which of a catalog's tasks are shown in it.

    Attributes:
        visible: places in `Catalog.tasks` of those that count; all else is as if it were not there.
        chosen: of those the ones that the plane is fitted to: all, or as many evenly chosen by name.
        mean: (d,), components: (2, d); anything that is embedded is at `components @ (embedding - mean)`.
    """

    visible: NDArray[np.intp]
    chosen: NDArray[np.intp]
    mean: Embeddings
    components: Embeddings

    @classmethod
    def of(cls, catalog: Catalog, visible: Iterable[int], *, most: int = MOST) -> Layout:
        """Fit the plane.

        Args:
            catalog: the tasks.
            visible: places in `catalog.tasks` of those that count.
            most: tasks that are chosen at most.
        """
        there = np.fromiter(visible, np.intp)
        chosen = there[np.linspace(0, len(there) - 1, min(len(there), most)).round().astype(np.intp)]
        components = np.zeros((2, catalog.dimension), np.float32)
        if not len(chosen):
            return cls(there, chosen, components[0], components)
        centroids = catalog.centroids_at(chosen.tolist())
        mean = centroids.mean(axis=0)
        found = np.linalg.svd(centroids - mean, full_matrices=False)[2][: min(2, len(chosen) - 1)]
        for place, row in enumerate(found):
            components[place] = row * np.sign(row[np.abs(row).argmax()])  # else either direction would do
        return cls(there, chosen, mean, components)

    def to_json(self, catalog: Catalog, named: Iterable[str] = ()) -> dict[str, Any]:
        """As the HTTP API shows it: the chosen tasks, and those that are named, as far as they count."""
        also = {place for name in named if (place := catalog.place(name)) is not None}.intersection(
            self.visible.tolist()
        )
        shown = sorted({*self.chosen.tolist(), *also})
        points = (catalog.centroids_at(shown) - self.mean) @ self.components.T
        rows = [
            {"id": entry.name, "object": "task", "domain": entry.domain, "x": x, "y": y}
            for entry, (x, y) in zip([catalog.entries[i] for i in shown], _short(points), strict=True)
        ]
        return {
            "object": "list",
            "catalog_version": catalog.version,
            "data": rows,
            "total": len(self.visible),
            "projection": {"mean": _short(self.mean), "components": _short(self.components)},
        }


def _short(array: NDArray[Any]) -> Any:
    """As lists, in as many digits as anybody can see."""
    return np.round(array.astype(np.float64), 6).tolist()
