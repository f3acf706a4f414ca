"""The mixtures of all rows as GPU kernels read them: a weight for each row and adapter, and the tiles in use; and of
each row that has few columns a list of them.

What changes is to be written into its place (`changes`); captured graphs read it there. Knows nothing of requests.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorauter.engine.cuda_changes import Pending
from lorauter.engine.cuda_own import OWN_COLUMNS, OWN_GROUPS, OWN_HEAD, OWN_MOST, OWN_WIDTH
from lorauter.engine.mixtures import Mixtures, RowMixture
from lorauter.engine.plan import AdapterKey
from lorauter.engine.sampling import to_device
from lorauter.engine.slots import MOST_TILES, SLOTS, TILE, Group, Part, Placed

_NO_TILES, _NO_TARGETS = np.zeros((4, 0), np.int64), np.zeros(0, np.int64)


@dataclass(frozen=True)
class GroupTiles:
    """A group's columns on the device.

    Attributes:
        group: the targets.
        tiles: (4, MOST_TILES) int64: of every tile the places of A and B, how many columns, and the adapter's slot.
        starts: (targets + 1,) int32, where each target's tiles begin.
        own: (rows, OWN_WIDTH) int64, of each row its columns, in the groups that `lorauter.engine.cuda_own` is for.
    """

    group: Group
    tiles: Tensor
    starts: Tensor
    own: Tensor

    @property
    def fused(self) -> bool:
        """Whether the kernel after the product can add the mixtures' change."""
        return self.group.targets in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


_Entries = dict[int, list[list[tuple[int, int, int]]]]
"""By group, of each target entries: where A and B begin, and columns."""


@dataclass
class _InUse:
    placed: Placed
    tiles: NDArray[np.int64]  # (4, tiles) of all groups and targets
    targets: NDArray[np.int64]  # (tiles,) which group and target each is of, in their order
    own: _Entries
    rows: int


class CudaMixtures(Mixtures):
    """See `Mixtures`.

    Attributes:
        weights: (rows, SLOTS) float32.
        of_group: by the first target.
        flats: weights and lists of columns as numbers (any,) int32 each.
        changes: what is to be written there before the next step; places are counted as if one followed the other.
    """

    def __init__(self, groups: Sequence[Group], layers: int, arena: Tensor, rows: int) -> None:
        super().__init__(groups, layers, arena, rows)
        device = arena.device
        self.weights = torch.zeros(rows, SLOTS, device=device)
        self._tiles = torch.zeros(len(groups), 4, MOST_TILES, dtype=torch.long, device=device)
        self._starts = torch.zeros(len(groups), 4, dtype=torch.int32, device=device)
        self._own = torch.zeros(len(groups), rows, OWN_WIDTH, dtype=torch.long, device=device)
        self.flats = self.weights.view(-1).view(torch.int32), self._own.view(-1).view(torch.int32)
        self.changes = Pending()
        self.of_group = {
            group.first: GroupTiles(group, self._tiles[i], self._starts[i, : len(group.targets) + 1], self._own[i])
            for i, group in enumerate(groups)
        }
        self._firsts = np.cumsum([0, *(len(group.targets) for group in groups)])  # each group's among all targets
        self._in_use: dict[AdapterKey, _InUse] = {}
        self._changed = False
        self._active: frozenset[str] = frozenset()
        self._listed = np.zeros((rows, len(groups)), np.int32)  # entries of each row, by group

    def assign(self, row: int, mixture: RowMixture) -> None:
        """See `Mixtures.assign`."""
        self.change({row: mixture})

    def change(self, rows: Mapping[int, RowMixture]) -> None:
        """See `Mixtures.change`."""
        for row in rows:
            for placed, _ in self.rows[row]:
                self._in_use[placed.key].rows -= 1
        for row, mixture in rows.items():
            if mixture or self.rows[row]:
                self._set(row, mixture)

    def _set(self, row: int, mixture: RowMixture) -> None:
        first = row * SLOTS
        numbers = dict.fromkeys([first + placed.slot for placed, _ in self.rows[row]], 0)
        super().assign(row, mixture)
        weights: dict[AdapterKey, float] = {}
        for placed, weight in self.rows[row]:
            weights[placed.key] = weights.get(placed.key, 0.0) + weight
            known = self._in_use.get(placed.key)
            if known is None or (not known.rows and known.placed is not placed):  # it may lie elsewhere than before
                known = self._in_use[placed.key] = _InUse(placed, *self._of(placed), self._own_of(placed), 0)
                self._changed = True
            known.rows += 1
        bits = _bits(weights.values())
        of_keys = [self._in_use[key] for key in weights]
        numbers.update(zip([first + one.placed.slot for one in of_keys], bits, strict=True))
        self.changes.add(numbers)
        self._list(row, [(one.own, own << 32) for one, own in zip(of_keys, bits, strict=True) if own])

    def entries(self, rows: Collection[int]) -> float:
        """How long a step over these rows has to go along their lists: of each group the entries of the row that has
        most, summed; infinite where a list does not take them all."""
        most = self._listed[list(rows)].max(axis=0, initial=0)
        return float(most.sum()) if most.max(initial=0) <= OWN_MOST else math.inf

    def _list(self, row: int, parts: Sequence[tuple[_Entries, int]]) -> None:
        """Let a row's lists say what its mixture is: the entries of adapters and the bits of their weights, shifted."""
        counts = [0] * len(self.groups)
        before = {g for g, count in enumerate(self._listed[row].tolist()) if count}
        for g in before.union(*[entries for entries, _ in parts]):
            ends, numbers = [0] * OWN_HEAD, list[int]()
            for target in range(len(self.groups[g].targets)):
                for entries, bits in parts:
                    for a, b, columns in entries[g][target] if g in entries else ():
                        numbers += (a, b, bits | columns)
                ends[target + 1] = len(numbers) // 3
            counts[g] = len(numbers) // 3
            listed = array("q", ends + numbers if counts[g] <= OWN_MOST else [0] * OWN_HEAD)
            start = len(self.flats[0]) + 2 * (g * len(self.rows) + row) * OWN_WIDTH
            self.changes.add_run(start, array("i", listed.tobytes()))
        self._listed[row] = counts

    @property
    def active(self) -> frozenset[str]:
        """The groups, by their first targets, that the adapters of some row change, as of the last `of_step`."""
        return self._active

    def of_step(self, rows: Collection[int]) -> Mixtures | None:
        """See `Mixtures.of_step`; which tiles are in use is on its way to the device then, all else in `changes`."""
        gone = [key for key, in_use in self._in_use.items() if not in_use.rows]
        for key in gone:
            del self._in_use[key]
            self._changed = True  # until it is written
        if self._changed:
            self._write_tiles()
            self._changed = False
        return super().of_step(rows)

    def _write_tiles(self) -> None:
        """The tiles in use, in the order of their adapters' keys: sums round the same wherever the adapters are."""
        in_order = [self._in_use[key] for key in sorted(self._in_use)]
        targets = np.concatenate([_NO_TARGETS, *(in_use.targets for in_use in in_order)])
        order = np.argsort(targets, kind="stable")
        tiles = np.concatenate([_NO_TILES, *(in_use.tiles for in_use in in_order)], axis=1)[:, order]
        ends = np.cumsum(np.bincount(targets, minlength=self._firsts[-1]))
        starts = np.zeros((len(self.groups), 4), np.int32)
        bounds = [0, *(int(ends[last - 1]) for last in self._firsts[1:])]  # of each group's tiles
        packed = np.zeros((len(self.groups), 4, max(np.diff(bounds))), np.int64)
        for g, (first, end) in enumerate(pairwise(bounds)):
            packed[g, :, : end - first] = tiles[:, first:end]
            own = ends[self._firsts[g] : self._firsts[g + 1]] - first
            starts[g, 1 : len(own) + 1] = own
        self._active = frozenset(
            group.first for group, (first, end) in zip(self.groups, pairwise(bounds), strict=True) if end > first
        )
        device = self.weights.device
        self._tiles[:, :, : packed.shape[2]].copy_(to_device(torch.from_numpy(packed), device))
        self._starts.copy_(to_device(torch.from_numpy(starts), device))

    def _own_of(self, placed: Placed) -> _Entries:
        """An adapter's entries, by group, of each target, where it has some."""

        def entries(part: Part | None, inputs: int, width: int) -> list[tuple[int, int, int]]:
            if part is None:
                return []
            return [
                (part.a + i * self.layers * inputs, part.b + i * self.layers * width, min(OWN_COLUMNS, part.rank - i))
                for i in range(0, part.rank, OWN_COLUMNS)
            ]

        return {
            g: [
                entries(placed.parts.get(t), group.inputs, width)
                for t, width in zip(group.targets, group.widths, strict=True)
            ]
            for g, group in enumerate(self.groups)
            if group.first in OWN_GROUPS and not placed.parts.keys().isdisjoint(group.targets)
        }

    def _of(self, placed: Placed) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """An adapter's tiles, and the target of each."""
        tiles, targets, number = [_NO_TILES], [_NO_TARGETS], 0
        for group in self.groups:
            for target, width in zip(group.targets, group.widths, strict=True):
                if (part := placed.parts.get(target)) is not None:
                    first = np.arange(0, part.rank, TILE, dtype=np.int64)
                    rows = [
                        part.a + first * self.layers * group.inputs,
                        part.b + first * self.layers * width,
                        np.minimum(part.rank - first, TILE),
                        np.full_like(first, placed.slot),
                    ]
                    tiles.append(np.stack(rows))
                    targets.append(np.full_like(first, number))
                number += 1
        return np.concatenate(tiles, axis=1), np.concatenate(targets)


def _bits(numbers: Iterable[float]) -> array[int]:
    """Numbers as float32 has them, infinite where they are too large."""
    return array("i", array("f", numbers).tobytes())
