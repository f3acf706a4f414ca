"""The rank columns of resident adapters, stacked.

For each target (q_proj, ...) all resident adapters share one stack of rank columns: A is (layers, C, in) and B
is (layers, C, out). An adapter of rank r owns any r columns. The stacks of targets with the same input lie side by
side, so that one product shrinks x for all of them. Knows nothing of which adapters there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorauter.adapters.weights import ModelShape

FREE = 0  # owner of the columns that nobody uses; real slots count from 1
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class Stack:
    """The columns of one target.

    Attributes:
        b: (layers, C, out).
        owner: (C,) the slot that each column belongs to; on the host, as bookkeeping must not wait for the device.
        column_bytes: bytes of one column in all layers, A and B.
    """

    def __init__(self, group: StackGroup, layers: int, out_features: int) -> None:
        self.group = group
        self.b = group.a.new_zeros(layers, 0, out_features)
        self.owner = torch.zeros(0, dtype=torch.long)
        self.column_bytes = layers * (group.a.shape[2] + out_features) * group.a.itemsize

    @property
    def capacity(self) -> int:
        """C, how many columns there are."""
        return self.owner.shape[0]

    @property
    def a(self) -> Tensor:
        """(layers, C, in), a view of the group's."""
        offset = self.group.offset(self)
        return self.group.a[:, offset : offset + self.capacity]

    def used(self) -> int:
        """How many columns have an owner."""
        return int((self.owner != FREE).sum())

    def resize(self, capacity: int) -> None:
        """Keep the columns in use, packed to the front, in a stack of another capacity."""
        columns = (self.owner != FREE).nonzero()[:, 0]
        places = columns.to(self.b.device)
        a = self.group.resized(self, capacity, places)
        b = self.b.new_zeros(self.b.shape[0], capacity, self.b.shape[2])
        b[:, : len(columns)] = self.b[:, places]
        owner = self.owner.new_zeros(capacity)
        owner[: len(columns)] = self.owner[columns]
        # All at once, and last: running out of memory above must leave the stacks as they were.
        self.group.a, self.b, self.owner = a, b, owner

    def write(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Put an adapter's packed columns, (layers, r, in) and (layers, r, out), into free ones."""
        columns = (self.owner == FREE).nonzero()[: a.shape[1], 0]
        places = to_device(columns, self.b.device)
        self.a.index_copy_(1, places, a.to(self.b.device, non_blocking=True))
        self.b.index_copy_(1, places, b.to(self.b.device, non_blocking=True))
        self.owner[columns] = slot


class StackGroup:
    """The stacks of targets with the same input, whose A lie side by side.

    Attributes:
        a: (layers, sum of C, in).
        stacks: by target, in the order of `a`.
    """

    def __init__(self, targets: Sequence[str], shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self.a = torch.zeros(shape.layers, 0, shape.linears[targets[0]][0], dtype=dtype, device=device)
        self.stacks = {target: Stack(self, shape.layers, shape.linears[target][1]) for target in targets}

    def offset(self, stack: Stack) -> int:
        """Where a stack's columns begin in `a`."""
        offset = 0
        for other in self.stacks.values():
            if other is stack:
                break
            offset += other.capacity
        return offset

    def resized(self, stack: Stack, capacity: int, kept: Tensor) -> Tensor:
        """`a` with another capacity for one stack, of which the columns `kept` go to its front."""
        total = self.a.shape[1] - stack.capacity + capacity
        a = self.a.new_zeros(self.a.shape[0], total, self.a.shape[2])
        offset = 0
        for other in self.stacks.values():
            if other is stack:
                a[:, offset : offset + len(kept)] = other.a[:, kept]
                offset += capacity
            else:
                a[:, offset : offset + other.capacity] = other.a
                offset += other.capacity
        return a


def make_groups(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> list[StackGroup]:
    """Empty stacks for every linear layer of a model, those with the same input together."""
    groups = [[target for target in targets if target in shape.linears] for targets in _SAME_INPUT]
    return [StackGroup(targets, shape, dtype, device) for targets in groups if targets]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
