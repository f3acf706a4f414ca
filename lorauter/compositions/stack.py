"""The sources of compositions on a device, rank beside rank, as one pair of matrices for each layer and target.

Knows adapters and the model's shape; knows nothing of weights or examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorauter.adapters.weights import LoraWeights, ModelShape
from lorauter.engine.slots import groups_of


class AdapterStack:
    """Adapters side by side.

    Args:
        adapters: at least one, all of which fit the model.
        shape: the model's.
        dtype, device: of the matrices.

    Attributes:
        sources: the adapters.
        targets: those that any of them changes, in the order of the model's groups.
        a: by the first target of a group, (layers, R, in); R is the sum over its parts of the adapters' largest ranks,
            part after part. Layers and ranks that an adapter lacks are 0.
        b: by the first target of a group, (layers, R, out of the group), with the adapters' own scaling; 0 where a
            column is another target's.
        spread: by target, (adapters, columns of the part) float32, 1 where a column is an adapter's.
    """

    def __init__(
        self, adapters: Sequence[LoraWeights], shape: ModelShape, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sources = tuple(adapters)
        self.shape = shape
        self.groups = groups_of(shape)
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}
        for group in self.groups:
            changed = tuple(target for target in group.targets if any(target in of.ranks for of in adapters))
            if changed:
                found = {target: self._stacked(target) for target in changed}
                self.a[group.first] = torch.cat([a for a, _, _ in found.values()], 1).to(device, dtype)
                whole = torch.zeros(*self.a[group.first].shape[:2], sum(group.widths), dtype=dtype)
                row = column = 0
                for target, width in zip(group.targets, group.widths, strict=True):
                    if target in found:
                        _, b, spread = found[target]
                        whole[:, row : row + b.shape[1], column : column + width] = b
                        self.spread[target] = spread.to(device)
                        row += b.shape[1]
                    column += width
                self.b[group.first] = whole.to(device)
        self.targets = tuple(self.spread)

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each target, its A (layers, columns of the part, in) and its B (layers, columns of the part, out)."""
        for group in self.groups:
            row = column = 0
            for target, width in zip(group.targets, group.widths, strict=True):
                if target in self.spread:
                    rows = slice(row, row + self.spread[target].shape[1])
                    yield target, self.a[group.first][:, rows], self.b[group.first][:, rows, column : column + width]
                    row = rows.stop
                column += width

    def columns(self, weights: Tensor) -> Tensor:
        """Weights of adapters (..., layers, targets, adapters) as weights of columns (..., layers, all columns)."""
        return torch.cat([weights[..., i, :] @ self.spread[target] for i, target in enumerate(self.targets)], -1)

    def by_target(self, columns: Tensor) -> dict[str, Tensor]:
        """The columns (..., all columns) of each target."""
        widths = [self.spread[target].shape[1] for target in self.targets]
        return dict(zip(self.targets, torch.split(columns, widths, -1), strict=True))

    def by_group(self, columns: Tensor) -> dict[str, Tensor]:
        """The columns (..., all columns) of each group, by its first target."""
        widths = [of.shape[1] for of in self.a.values()]
        return dict(zip(self.a, torch.split(columns, widths, -1), strict=True))

    def means(self, columns: Tensor) -> Tensor:
        """The mean weight of each adapter's columns: (..., targets, adapters), NaN where it has none."""
        spread = {target: of.to(columns.device) for target, of in self.spread.items()}
        found = [of @ (spread[t] / spread[t].sum(1, keepdim=True)).mT for t, of in self.by_target(columns).items()]
        return torch.stack(found, -2)

    def _stacked(self, target: str) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and the spread of one target."""
        inputs, outputs = self.shape.linears[target]
        ranks = [adapter.ranks.get(target, 0) for adapter in self.sources]
        a, b = torch.zeros(self.shape.layers, sum(ranks), inputs), torch.zeros(self.shape.layers, sum(ranks), outputs)
        spread, first = torch.zeros(len(ranks), sum(ranks)), 0
        for i, (adapter, rank) in enumerate(zip(self.sources, ranks, strict=True)):
            for layer in range(self.shape.layers):
                if (layer, target) in adapter.tensors:
                    own_a, own_b = adapter.tensors[layer, target]
                    a[layer, first : first + own_a.shape[0]] = own_a.float()
                    b[layer, first : first + own_a.shape[0]] = own_b.float().T
            spread[i, first : first + rank] = 1
            first += rank
        return a, b, spread
