"""The rank columns of resident adapters, stacked, and the mixture of them that every token of a batch gets.

For each target (q_proj, ...) all resident adapters share one stack of rank columns: A is (layers, C, in) and B
is (layers, C, out). An adapter of rank r owns any r columns. With m the (tokens, C) matrix that repeats each
token's adapter weights over the columns of the adapters,

    y += ((x A^T) * m) B        =   sum_k w_k s_k B_k A_k x      for every token at once,

the cost does not depend on how many adapters a token mixes. The stacks of targets with the same input lie side by
side, so that one product shrinks x for all of them. Knows nothing of which adapters there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorauter.adapters.weights import ModelShape
from lorauter.engine.cpu_kernels import SparseLora

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
        places = columns.to(self.b.device)
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


@dataclass(frozen=True)
class Columns:
    """A target's columns as a batch uses them.

    Attributes:
        a: (layers, sum of C, in), those of all targets with the same input.
        first: where this target's begin in `a`.
        b: (layers, C, out).
    """

    a: Tensor
    first: int
    b: Tensor

    @property
    def capacity(self) -> int:
        """C, how many columns there are."""
        return self.b.shape[1]


@dataclass(frozen=True)
class LoraBatch:
    """The mixture of every token in a batch.

    Attributes:
        columns: by target; only targets that have any.
        masks: `{target: m}`, m (tokens, C) in the model's dtype, or (1, C) for tokens that all have the same mixture;
            only targets that some token's adapters have.
        generation: changes when the stacks' tensors do.
    """

    columns: Mapping[str, Columns]
    masks: Mapping[str, Tensor]
    generation: int = 0
    _sparse: dict[str, SparseLora | None] = field(default_factory=dict, init=False, compare=False)

    def add(self, layer: int, parts: Sequence[tuple[str, int]], x: Tensor, y: Tensor) -> None:
        """Add the mixture's change to `y`, (tokens, out), given its input x, (tokens, in).

        The parts are targets with the same input, and their widths: the columns of `y` from left to right.
        """
        shrunk = self.shrink(layer, parts, x)
        if shrunk is None:
            return
        offset = 0
        for target, width in parts:
            if target in self.masks:
                columns = self.columns[target]
                mixed = shrunk[:, columns.first : columns.first + columns.capacity] * self.masks[target]
                y[:, offset : offset + width].addmm_(mixed, columns.b[layer])
            offset += width

    def shrink(self, layer: int, parts: Sequence[tuple[str, int]], x: Tensor) -> Tensor | None:
        """`x A^T` for all columns of these targets, (tokens, sum of C); None if no token uses any."""
        for target, _ in parts:
            if target in self.masks:
                return x @ self.columns[target].a[layer].T
        return None

    def sparse(self, parts: Sequence[tuple[str, int]]) -> SparseLora | None:
        """The mixtures as the CPU's kernels take them; None if no token uses any of these targets."""
        key = parts[0][0]
        if key not in self._sparse:
            used: list[tuple[int, tuple[Tensor, Tensor, Tensor] | None]] = []
            for target, width in parts:
                if target in self.masks:
                    columns = self.columns[target]
                    used.append((width, (columns.a[:, columns.first :], columns.b, self.masks[target])))
                else:
                    used.append((width, None))
            self._sparse[key] = SparseLora(used) if any(part for _, part in used) else None
        return self._sparse[key]

    def select(self, rows: Tensor | slice) -> LoraBatch:
        """The mixtures of chosen rows: (tokens,) indices into this batch, or a slice of it."""
        masks = {target: mask[rows] for target, mask in self.masks.items()}
        return LoraBatch(self.columns, masks, self.generation)


def all_columns(groups: Sequence[StackGroup]) -> dict[str, Columns]:
    """Every column that there is, in place."""
    return {
        target: Columns(group.a, group.offset(stack), stack.b)
        for group in groups
        for target, stack in group.stacks.items()
        if stack.capacity
    }


def columns_of(groups: Sequence[StackGroup], slots: Sequence[int]) -> tuple[dict[str, Columns], dict[str, Tensor]]:
    """Copies of the columns of some slots alone, and the owners (C,) of each target's."""
    wanted = torch.tensor(slots)
    columns, owners = {}, {}
    for group in groups:
        kept = {target: torch.isin(stack.owner, wanted).nonzero()[:, 0] for target, stack in group.stacks.items()}
        places = [group.offset(stack) + kept[target] for target, stack in group.stacks.items()]
        a = group.a[:, torch.cat(places)]
        first = 0
        for target, stack in group.stacks.items():
            if len(kept[target]):
                columns[target] = Columns(a, first, stack.b[:, kept[target]])
                owners[target] = stack.owner[kept[target]]
                first += len(kept[target])
    return columns, owners
