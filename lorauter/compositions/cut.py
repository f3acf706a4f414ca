"""A weighted stack of adapters as one adapter of a small rank.

A mixture is a LoRA itself: `sum_k w_k s_k B_k A_k = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]`. What it does in a
layer is cut back to its largest singular values, which is the nearest of that rank (Eckart and Young). The product is
never formed: with B^T = Q_b R_b and A^T = Q_a R_a its singular values are those of R_b diag(w) R_a^T, of which the
largest are found by subspace iteration (Halko et al., arXiv 0909.4061).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorauter.compositions.stack import AdapterStack

if TYPE_CHECKING:
    from lorauter.adapters.tensors import Pair, Where

_SPARE = 8  # directions beyond the rank, which make the last of it exact
_ITERATIONS = 2


@dataclass(frozen=True)
class Cut:
    """One adapter.

    Attributes:
        pairs: `{(layer, target): (A, B)}` float32, the scaling in B.
        kept: share of the squared singular values.
    """

    pairs: Mapping[Where, Pair]
    kept: float


class Cutter:
    """Cuts mixtures of one stack, whose QR decompositions are made once.

    Args:
        energy: share of the squared singular values that each target keeps over its layers, at least.
        max_rank: whatever share that keeps.
    """

    def __init__(self, stack: AdapterStack, *, energy: float, max_rank: int) -> None:
        self._stack = stack
        self._energy = energy
        self._max_rank = max_rank
        self._a: dict[str, tuple[Tensor, Tensor]] = {}
        self._b: dict[str, tuple[Tensor, Tensor]] = {}
        for target, a, b in stack.pairs():
            self._a[target] = torch.linalg.qr(a.float().cpu().mT)
            self._b[target] = torch.linalg.qr(b.float().cpu().mT)

    def cut(self, columns: Tensor) -> Cut:
        """The adapter of weights (layers, all columns). Targets of which nothing is left are not in it; where that is
        all of them, it is one that changes nothing."""
        pairs: dict[Where, Pair] = {}
        total = left = 0.0
        for target, of in self._stack.by_target(columns.float().cpu()).items():
            (q_a, r_a), (q_b, r_b) = self._a[target], self._b[target]
            product = (r_b * of[:, None]) @ r_a.mT
            u, s, v = _largest(product, self._max_rank)
            energy = float(product.square().sum())
            rank = self._rank(s.square().sum(0), energy)
            total += energy
            left += float(s[:, :rank].square().sum())
            if rank:
                root = s[:, :rank].sqrt()
                of_a = root[..., None] * (v[:, :, :rank].mT @ q_a.mT)
                of_b = q_b @ u[:, :, :rank] * root[:, None]
                pairs |= {(layer, target): pair for layer, pair in enumerate(zip(of_a, of_b, strict=True))}
        if not pairs:
            target, a, b = next(self._stack.pairs())
            nothing = torch.zeros(1, a.shape[2]), torch.zeros(b.shape[2], 1)
            pairs = {(layer, target): nothing for layer in range(len(a))}
        return Cut(pairs, min(1.0, left / total) if total else 1.0)

    def _rank(self, energy: Tensor, total: float) -> int:
        """How many of the largest singular values to keep, given the layers' sums of their squares, and of all."""
        if not total > 0:
            return 0
        enough = int((energy.cumsum(0) < self._energy * total).sum()) + 1
        return min(enough, self._max_rank, len(energy))


def _largest(matrices: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of each of (n, rows, columns) and a few more, falling, with their vectors."""
    width = min(count + _SPARE, *matrices.shape[1:])
    drawn = torch.randn(matrices.shape[2], width, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(matrices @ drawn).Q
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(matrices @ (matrices.mT @ q)).Q
    v, r = torch.linalg.qr(matrices.mT @ q)
    inner, s, outer = torch.linalg.svd(r.mT)
    return q @ inner, s, v @ outer.mT
