"""The mixture of adapters that every token of a batch gets, over the columns that the batch uses.

With A (C, in) and B (C, out) the rank columns of all adapters that some token uses, the scaling s_k in B, and m the
(tokens, C) matrix that repeats each token's adapter weights over the columns of the adapters,

    y += ((x A^T) * m) B        =   sum_k w_k s_k B_k A_k x      for every token at once,

exact, and at a cost that does not depend on how many adapters a token mixes. The columns stay where they are in the
stacks; a batch names their places. Knows nothing of which adapters there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lorauter.engine.cpu_kernels import SparseLora
from lorauter.engine.stacks import StackGroup, to_device

Groups = Mapping[str, "GroupMixture"]


@dataclass(frozen=True)
class GroupMixture:
    """What a batch's mixtures add in the targets with the same input, whose outputs lie side by side.

    Attributes:
        a: (layers, all columns of these targets, in).
        bs: of each target, (layers, its columns, out).
        bounds: where each target's columns begin among the C that are used, and C.
        starts: the same on the device, (targets + 1,) int32.
        a_places: (C,) int32, which of `a` are used.
        b_places: (C,) int32, which of its target's B belongs to each.
        mask: (tokens, C) in the model's dtype, or (1, C) for tokens that all have the same mixture.
    """

    a: Tensor
    bs: Sequence[Tensor]
    bounds: Sequence[int]
    starts: Tensor
    a_places: Tensor
    b_places: Tensor
    mask: Tensor

    def add(self, layer: int, x: Tensor, y: Tensor) -> None:
        """Add the mixtures' change to `y`, (tokens, sum of out), given their input x, (tokens, in)."""
        mixed = (x @ self.a[layer].index_select(0, self.a_places).T) * self.mask
        offset = 0
        for i, b in enumerate(self.bs):
            begin, end, width = self.bounds[i], self.bounds[i + 1], b.shape[2]
            if end > begin:
                columns = b[layer].index_select(0, self.b_places[begin:end])
                y[:, offset : offset + width].addmm_(mixed[:, begin:end], columns)
            offset += width

    @cached_property
    def sparse(self) -> SparseLora:
        """The same as the CPU's kernels take it: for each token its own columns alone."""
        return SparseLora(self.a, self.bs, self.bounds, self.a_places, self.b_places, self.mask)


@dataclass(frozen=True)
class LoraBatch:
    """The mixture of every token in a batch.

    Attributes:
        groups: by the first of the targets with the same input; only those that some token's adapters change.
        generation: changes when the stacks' tensors do.
    """

    groups: Groups
    generation: int = 0

    def select(self, rows: Tensor | slice) -> LoraBatch:
        """The mixtures of chosen rows: (tokens,) indices into this batch, or a slice of it."""
        return LoraBatch(
            {key: replace(group, mask=group.mask[rows]) for key, group in self.groups.items()}, self.generation
        )


def mix(groups: Sequence[StackGroup], weights: Tensor, generation: int, order: Tensor) -> LoraBatch:
    """The mixtures of n tokens.

    Args:
        groups: the stacks.
        weights: (n, slots) float32 on the host, each token's weight of every slot.
        generation: of the stacks' tensors.
        order: (slots,) the place of each slot's adapter among all by key. Columns are summed in this order, so that
            sums round the same wherever loading and evicting has put the adapters.
    """
    used = weights.any(dim=0)
    mixtures = {}
    for group in groups:
        places = [_in_order(stack.owner, used[stack.owner].nonzero()[:, 0], order) for stack in group.stacks.values()]
        bounds = [0]
        for columns in places:
            bounds.append(bounds[-1] + len(columns))
        if not bounds[-1]:
            continue
        stacks = list(group.stacks.values())
        owners = torch.cat([stack.owner[columns] for stack, columns in zip(stacks, places, strict=True)])
        a_places = torch.cat([group.offset(stack) + columns for stack, columns in zip(stacks, places, strict=True)])
        device = group.a.device
        mixtures[next(iter(group.stacks))] = GroupMixture(
            group.a,
            [stack.b for stack in stacks],
            bounds,
            starts=to_device(torch.tensor(bounds).int(), device),
            a_places=to_device(a_places.int(), device),
            b_places=to_device(torch.cat(places).int(), device),
            mask=to_device(weights[:, owners].to(group.a.dtype), device),
        )
    return LoraBatch(mixtures, generation)


def _in_order(owner: Tensor, columns: Tensor, order: Tensor) -> Tensor:
    return columns[order[owner[columns]].argsort(stable=True)]
