"""The mixtures of all rows as GPU kernels read them: a weight for each row and adapter, and the tiles in use; and of
each row that has few columns a list of them.

What changes is to be written into its place (`changes`); captured graphs read it there. Knows nothing of requests.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


@dataclass
class _InUse:
    placed: Placed
    tiles: NDArray[np.int64]  # (4, tiles) of all groups and targets
    targets: NDArray[np.int64]  # (tiles,) which group and target each is of, in their order
    own: dict[int, list[list[tuple[int, int, int]]]]  # by group, of each target entries: where A and B begin, columns
    rows: int


class CudaMixtures(Mixtures):
    """See `Mixtures`.

    Attributes:
        weights: (rows, SLOTS) float32.
        of_group: by the first target.
        flats: weights and lists of columns as numbers (any,) int32 each.
        changes: what is to be written there before the next step, by place, counted as if one followed the other.
    """

    def __init__(self, groups: Sequence[Group], layers: int, arena: Tensor, rows: int) -> None:
        super().__init__(groups, layers, arena, rows)
        device = arena.device
        self.weights = torch.zeros(rows, SLOTS, device=device)
        self._tiles = torch.zeros(len(groups), 4, MOST_TILES, dtype=torch.long, device=device)
        self._starts = torch.zeros(len(groups), 4, dtype=torch.int32, device=device)
        self._own = torch.zeros(len(groups), rows, OWN_WIDTH, dtype=torch.long, device=device)
        self.flats = self.weights.view(-1).view(torch.int32), self._own.view(-1).view(torch.int32)
        self.changes: dict[int, int] = {}
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
        if not mixture and not self.rows[row]:
            return
        for placed, _ in self.rows[row]:
            self.changes[row * SLOTS + placed.slot] = 0
            self._in_use[placed.key].rows -= 1
        super().assign(row, mixture)
        weights: dict[AdapterKey, float] = {}
        for placed, weight in self.rows[row]:
            weights[placed.key] = weights.get(placed.key, 0.0) + weight
        bits = dict(zip(weights, _bits(weights.values()), strict=True))
        for placed, _ in mixture:
            self.changes[row * SLOTS + placed.slot] = bits[placed.key]
        for placed, _ in mixture:
            known = self._in_use.get(placed.key)
            if known is None or (not known.rows and known.placed is not placed):  # it may lie elsewhere than before
                self._in_use[placed.key] = _InUse(placed, *self._of(placed), self._own_of(placed), 0)
                self._changed = True
            self._in_use[placed.key].rows += 1
        self._list(row, bits)

    def entries(self, rows: Collection[int]) -> float:
        """How long a step over these rows has to go along their lists: of each group the entries of the row that has
        most, summed; infinite where a list does not take them all."""
        most = self._listed[list(rows)].max(axis=0, initial=0)
        return float(most.sum()) if most.max(initial=0) <= OWN_MOST else math.inf

    def _list(self, row: int, weights: Mapping[AdapterKey, int]) -> None:
        """Let a row's lists say what its mixture is, given the bits of its weights."""
        parts = [(self._in_use[key].own, bits << 32) for key, bits in weights.items() if bits]
        for g in {g for own, _ in parts for g in own}.union(np.flatnonzero(self._listed[row]).tolist()):
            numbers: list[int] = []
            ends = [0]
            for target in range(len(self.groups[g].targets)):
                for own, bits in parts:
                    for a, b, columns in own[g][target] if g in own else ():
                        numbers += (a, b, bits | columns)
                ends.append(len(numbers) // 3)
            self._listed[row, g] = ends[-1]
            listed = ends + [0] * (OWN_HEAD - len(ends)) + numbers if ends[-1] <= OWN_MOST else [0] * OWN_HEAD
            start = len(self.flats[0]) + 2 * (g * len(self.rows) + row) * OWN_WIDTH
            halves = struct.unpack(f"={2 * len(listed)}i", struct.pack(f"={len(listed)}q", *listed))
            self.changes.update(enumerate(halves, start))

    @property
    def active(self) -> frozenset[str]:
        """The groups, by their first targets, that the adapters of some row change, as of the last `of_step`."""
        return self._active

    def of_step(self, rows: Collection[int]) -> Mixtures | None:
        """See `Mixtures.of_step`; which tiles are in use is on its way to the device then, all else in `changes`."""
        gone = [key for key, in_use in self._in_use.items() if not in_use.rows]
        for key in gone:
            del self._in_use[key]
        if self._changed or gone:
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

    def _own_of(self, placed: Placed) -> dict[int, list[list[tuple[int, int, int]]]]:
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
