"""Which adapters are alike, by their weights alone: those that compute the same, and those that are of one descent.

Of an adapter's change B A in every layer and target the numbers u^T B A v are kept, for some random u and v that are
the same for all adapters: a sketch, in which inner products are those of the changes, up to noise, whatever their
factors are. Knows nothing of tasks or scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lorauter.adapters.weights import ModelShape
from lorauter.engine.slots import PackedAdapter

Sketch = NDArray[np.float32]
_Near = Callable[[NDArray[np.float64], int], NDArray[np.bool_]]
"""From the inner products of some rows with all, and which the first of them is, to who is near whom."""

_PROBES = 8  # of each layer and target
_SAME = 0.05  # of an adapter's norm: what rounding to 8 bits changes, and no training
_KIN = 0.5  # cosine: what noise, cut ranks or half of the layers leave; of two trainings of one task it is under 0.2
_BLOCK = 1024


def sketch(adapter: PackedAdapter, shape: ModelShape) -> Sketch:
    """An adapter's sketch, of (targets * layers * probes) numbers."""
    found = []
    for target, (inputs, outputs) in sorted(shape.linears.items()):
        part = adapter.parts.get(target)
        if part is None:
            found.append(torch.zeros(shape.layers, _PROBES))
            continue
        sides = []
        for seed, start, width in ((0, part.a, inputs), (1, part.b, outputs)):
            draw = torch.Generator().manual_seed(seed)
            probes = torch.randn(width, _PROBES, generator=draw)
            side = adapter.numbers[start : start + part.rank * shape.layers * width].view(-1, width).float()
            sides.append((side @ probes).view(part.rank, shape.layers, _PROBES))
        found.append((sides[0] * sides[1]).sum(0))
    return np.asarray(torch.cat([of.reshape(-1) for of in found]).numpy())


def twins(sketches: Mapping[str, Sketch]) -> dict[str, str]:
    """Of every adapter the first, in the order given, that computes the same but for rounding; maybe itself."""
    names, rows, squares = _matrix(sketches)

    def near(inner: NDArray[np.float64], start: int) -> NDArray[np.bool_]:
        mine = squares[start : start + len(inner), None]
        apart = mine + squares - 2 * inner
        return np.asarray(apart <= _SAME**2 * np.minimum(mine, squares) + 1e-30)

    return _grouped(names, rows, near)


def kin(sketches: Mapping[str, Sketch]) -> dict[str, str]:
    """Of every adapter the first, in the order given, of whose descent it seems to be; maybe itself."""
    names, rows, squares = _matrix(sketches)

    def near(inner: NDArray[np.float64], start: int) -> NDArray[np.bool_]:
        return np.asarray(inner > _KIN * np.sqrt(squares[start : start + len(inner), None] * squares))

    return _grouped(names, rows, near)


def _matrix(sketches: Mapping[str, Sketch]) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    rows = np.stack([*sketches.values()]).astype(np.float64) if sketches else np.zeros((0, 1))
    return list(sketches), rows, (rows**2).sum(axis=1)


def _grouped(names: Sequence[str], rows: NDArray[np.float64], near: _Near) -> dict[str, str]:
    """Whoever is near the first that is left is of its group, and so on."""
    first = np.full(len(names), -1)
    for start in range(0, len(names), _BLOCK):
        # With whom those before are near, was asked then; what they have taken is taken.
        close = near(rows[start : start + _BLOCK] @ rows.T, start)
        for i in range(start, min(start + _BLOCK, len(names))):
            if first[i] < 0:
                mine = close[i - start] & (first < 0)
                mine[i] = True
                first[mine] = i
    return {name: names[first[i]] for i, name in enumerate(names)}
