"""LoRA pairs of several adapters on the device, one beside the other, for passes in which every row has one of its own.

Knows packed adapters and the model's shape; knows nothing of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorauter.adapters.weights import ModelShape
from lorauter.engine.slots import PackedAdapter, groups_of


@dataclass(frozen=True)
class LoraStack:
    """Adapters, or the parameters of some that are being trained.

    Attributes:
        a: by the first target of a group, (layers, adapters, in, R); R is the sum over the group's targets of the
            largest ranks. Layers and ranks that an adapter lacks are 0.
        b: by the same, (layers, adapters, R, out of the group), with the scaling; 0 where a column is another target's.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    def mixed(self, weights: Sequence[float]) -> LoraStack:
        """The one adapter that is their weighted sum."""
        a, b = {}, {}
        for first, own in self.a.items():
            layers, count, inputs, ranks = own.shape
            a[first] = own.permute(0, 2, 1, 3).reshape(layers, 1, inputs, count * ranks)
            weighted = self.b[first] * torch.tensor(weights).to(own)[:, None, None]
            b[first] = weighted.reshape(layers, 1, count * ranks, -1)
        return LoraStack(a, b)


def stacked(
    adapters: Sequence[PackedAdapter], shape: ModelShape, *, dtype: torch.dtype, device: torch.device
) -> LoraStack:
    """Stack adapters."""
    ranks = largest_ranks(adapters)
    numbers = [adapter.numbers.to(device, non_blocking=True) for adapter in adapters]
    a, b = {}, {}
    for group in groups_of(shape):
        whole = sum(ranks.get(target, 0) for target in group.targets)
        if not whole:
            continue
        size = (shape.layers, len(adapters))
        a[group.first] = torch.zeros(*size, group.inputs, whole, dtype=dtype, device=device)
        b[group.first] = torch.zeros(*size, whole, sum(group.widths), dtype=dtype, device=device)
        row = column = 0
        for target, width in zip(group.targets, group.widths, strict=True):
            for i, adapter in enumerate(adapters):
                if (part := adapter.parts.get(target)) is not None:
                    rows, columns = slice(row, row + part.rank), slice(column, column + width)
                    own = (part.rank, shape.layers)
                    own_a = numbers[i][part.a :][: part.rank * shape.layers * group.inputs].view(*own, group.inputs)
                    own_b = numbers[i][part.b :][: part.rank * shape.layers * width].view(*own, width)
                    a[group.first][:, i, :, rows] = own_a.permute(1, 2, 0)
                    b[group.first][:, i, rows, columns] = own_b.transpose(0, 1)
            row += ranks.get(target, 0)
            column += width
    return LoraStack(a, b)


def largest_ranks(adapters: Sequence[PackedAdapter]) -> dict[str, int]:
    """The largest rank of each target that any of them changes."""
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for target, part in adapter.parts.items():
            ranks[target] = max(ranks.get(target, 0), part.rank)
    return ranks


def stacked_bytes(adapters: Sequence[PackedAdapter], shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes that a stack of them takes."""
    ranks = largest_ranks(adapters)
    one = 0
    for group in groups_of(shape):
        whole = sum(ranks.get(target, 0) for target in group.targets)
        one += whole * (group.inputs + sum(group.widths))
    return one * shape.layers * len(adapters) * dtype.itemsize
