"""The mixtures of all rows as GPU kernels read them: a weight for each row and adapter, and the tiles in use.

What changes is written into its place; captured graphs read it there. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorauter.engine import cuda_kernels as kernels
from lorauter.engine.mixtures import Mixtures, RowMixture
from lorauter.engine.plan import AdapterKey
from lorauter.engine.sampling import to_device
from lorauter.engine.slots import MOST_TILES, SLOTS, TILE, Group, Placed


@dataclass(frozen=True)
class GroupTiles:
    """A group's columns on the device.

    Attributes:
        group: the targets.
        tiles: (4, MOST_TILES) int64: of every tile the places of A and B, how many columns, and the adapter's slot.
        starts: (targets + 1,) int32, where each target's tiles begin.
    """

    group: Group
    tiles: Tensor
    starts: Tensor

    @property
    def fused(self) -> bool:
        """Whether the kernel after the product can add the mixtures' change."""
        return self.group.targets in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class _InUse:
    placed: Placed
    tiles: list[list[NDArray[np.int64]]]  # by group and target, (4, tiles)
    rows: int


class CudaMixtures(Mixtures):
    """See `Mixtures`.

    Attributes:
        weights: (rows, SLOTS) float32.
        of_group: by the first target.
    """

    def __init__(self, groups: Sequence[Group], layers: int, arena: Tensor, rows: int) -> None:
        super().__init__(groups, layers, arena, rows)
        device = arena.device
        self.weights = torch.zeros(rows, SLOTS, device=device)
        self._tiles = torch.zeros(len(groups), 4, MOST_TILES, dtype=torch.long, device=device)
        self._starts = torch.zeros(len(groups), 4, dtype=torch.int32, device=device)
        self.of_group = {
            group.first: GroupTiles(group, self._tiles[i], self._starts[i, : len(group.targets) + 1])
            for i, group in enumerate(groups)
        }
        self._in_use: dict[AdapterKey, _InUse] = {}
        self._changed = False
        self._writes: dict[int, float] = {}  # to weights

    def assign(self, row: int, mixture: RowMixture) -> None:
        """See `Mixtures.assign`."""
        for placed, _ in self.rows[row]:
            self._writes[row * SLOTS + placed.slot] = 0.0
            self._in_use[placed.key].rows -= 1
        weights: dict[int, float] = {}
        for placed, weight in mixture:
            place = row * SLOTS + placed.slot
            weights[place] = weights.get(place, 0.0) + weight
        self._writes |= weights
        super().assign(row, mixture)
        for placed, _ in mixture:
            known = self._in_use.get(placed.key)
            if known is None or (not known.rows and known.placed is not placed):  # it may lie elsewhere than before
                self._in_use[placed.key] = _InUse(placed, [self._of(placed, group) for group in self.groups], 0)
                self._changed = True
            self._in_use[placed.key].rows += 1

    @property
    def active(self) -> frozenset[str]:
        """The groups, by their first targets, that the adapters of some row change."""
        return frozenset(
            group.first
            for g, group in enumerate(self.groups)
            if any(tiles.shape[1] for in_use in self._in_use.values() if in_use.rows for tiles in in_use.tiles[g])
        )

    def of_step(self, rows: Collection[int]) -> Mixtures | None:
        """See `Mixtures.of_step`; what has changed is on its way to the device then."""
        self._flush()
        return super().of_step(rows)

    def _flush(self) -> None:
        device = self.weights.device
        if self._writes:
            places = to_device(torch.tensor(list(self._writes), dtype=torch.int32), device)
            values = to_device(torch.tensor(list(self._writes.values()), dtype=torch.float32), device)
            kernels.write_pairs(self.weights.view(-1), places, values)
            self._writes.clear()
        gone = [key for key, in_use in self._in_use.items() if not in_use.rows]
        for key in gone:
            del self._in_use[key]
        if self._changed or gone:
            self._write_tiles()
            self._changed = False

    def _write_tiles(self) -> None:
        """The tiles in use, in the order of their adapters' keys: sums round the same wherever the adapters are."""
        in_order = [self._in_use[key].tiles for key in sorted(self._in_use)]
        tables, starts = [], np.zeros((len(self.groups), 4), np.int32)
        for g, group in enumerate(self.groups):
            columns = [tiles[g][t] for t in range(len(group.targets)) for tiles in in_order]
            tables.append(np.concatenate(columns, axis=1) if columns else np.zeros((4, 0), np.int64))
            for t in range(len(group.targets)):
                starts[g, t + 1 :] += sum(tiles[g][t].shape[1] for tiles in in_order)
        most = max(table.shape[1] for table in tables)
        packed = np.zeros((len(tables), 4, most), np.int64)
        for table, place in zip(tables, packed, strict=True):
            place[:, : table.shape[1]] = table
        device = self.weights.device
        self._tiles[:, :, :most].copy_(to_device(torch.from_numpy(packed), device))
        self._starts.copy_(to_device(torch.from_numpy(starts), device))

    def _of(self, placed: Placed, group: Group) -> list[NDArray[np.int64]]:
        """An adapter's tiles in each target of a group."""
        tiles = []
        for target, width in zip(group.targets, group.widths, strict=True):
            part = placed.parts.get(target)
            if part is None:
                tiles.append(np.zeros((4, 0), np.int64))
                continue
            first = np.arange(0, part.rank, TILE, dtype=np.int64)
            tiles.append(
                np.stack(
                    [
                        part.a + first * self.layers * group.inputs,
                        part.b + first * self.layers * width,
                        np.minimum(part.rank - first, TILE),
                        np.full_like(first, placed.slot),
                    ]
                )
            )
        return tiles
