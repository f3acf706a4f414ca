"""The mixture of adapters of every row, and what steps on a CPU read of them.

    y += sum_k w_k (x A_k^T) B_k        for every token, the w_k of its row and the scaling in B_k

exact, and at no cost to tokens whose rows have none. Changing a row changes nothing else. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lorauter.engine.cpu_kernels import RowMixtures, TargetMixtures
from lorauter.engine.slots import Group, Part, Placed

RowMixture = Sequence[tuple[Placed, float]]
_Columns = tuple[Tensor, Tensor, Tensor]
_NOTHING = torch.zeros(0, dtype=torch.long)


class Mixtures:
    """The mixtures of rows 0, 1, ...

    Args:
        groups: of the model's targets.
        layers: of the model.
        arena: where the adapters are.
        rows: how many rows there are, one for padding among them, which has no mixture.
    """

    def __init__(self, groups: Sequence[Group], layers: int, arena: Tensor, rows: int) -> None:
        self.groups = groups
        self.layers = layers
        self.arena = arena
        self.rows: list[RowMixture] = [()] * rows
        self._adapted: set[int] = set()  # rows that have adapters
        self._native: dict[str, RowMixtures] = {}  # made of the mixtures as they are
        self._known: list[dict[str, _Columns]] = [{} for _ in range(rows)]  # of each row, by target

    def assign(self, row: int, mixture: RowMixture) -> None:
        """Let a row have this mixture from the next step on. Its adapters come in the order of their keys, so that sums
        round the same wherever loading and evicting has put them."""
        if mixture or self.rows[row]:
            self.rows[row] = sorted(mixture, key=lambda item: item[0].key)
            (self._adapted.add if mixture else self._adapted.discard)(row)
            self._native.clear()
            self._known[row] = {}

    def change(self, rows: Mapping[int, RowMixture]) -> None:
        """The same for several rows, whose former mixtures are all gone before the new ones come."""
        for row, mixture in rows.items():
            self.assign(row, mixture)

    def of_step(self, rows: Collection[int]) -> Mixtures | None:
        """What a step over these rows takes: None if none of them has adapters."""
        return None if self._adapted.isdisjoint(rows) else self

    def pair(self, part: Part, layer: int, inputs: int, width: int) -> tuple[Tensor, Tensor]:
        """Views of A (rank, inputs) and B (rank, width) of one layer."""
        a = self.arena.as_strided((part.rank, inputs), (self.layers * inputs, 1), part.a + layer * inputs)
        b = self.arena.as_strided((part.rank, width), (self.layers * width, 1), part.b + layer * width)
        return a, b

    def native(self, first: str) -> RowMixtures:
        """All rows' mixtures in a group, known by its first target, as the CPU's kernels take them."""
        if first not in self._native:
            group = next(group for group in self.groups if group.first == first)
            targets = zip(group.targets, group.widths, strict=True)
            columns = [self._columns(target, group.inputs, width) for target, width in targets]
            self._native[first] = RowMixtures(self.arena, columns)
        return self._native[first]

    def _columns(self, target: str, inputs: int, width: int) -> TargetMixtures:
        """Every row's columns in a target, one row's after another's."""
        found = [self._of_row(row, target, inputs, width) for row in range(len(self.rows))]
        starts = torch.tensor([0, *(len(weights) for _, _, weights in found)]).cumsum(0).int()
        a, b, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
        return TargetMixtures(width, starts, a, b, weights)

    def _of_row(self, row: int, target: str, inputs: int, width: int) -> _Columns:
        """The places of A and B, and the weights, of a row's columns in a target; made once for each mixture."""
        known = self._known[row]
        if target not in known:
            parts = [(placed.parts[target], w) for placed, w in self.rows[row] if target in placed.parts and w]
            columns = torch.cat([_NOTHING, *(torch.arange(part.rank) * self.layers for part, _ in parts)])
            ranks = torch.tensor([part.rank for part, _ in parts], dtype=torch.long)

            def spread(values: list[int]) -> Tensor:
                return torch.tensor(values, dtype=torch.long).repeat_interleave(ranks)

            known[target] = (
                spread([part.a for part, _ in parts]) + columns * inputs,
                spread([part.b for part, _ in parts]) + columns * width,
                torch.tensor([w for _, w in parts]).float().repeat_interleave(ranks),
            )
        return known[target]
