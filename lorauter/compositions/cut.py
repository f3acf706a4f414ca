"""A weighted stack of adapters as one adapter of a small rank.

A mixture is a LoRA itself: `sum_k w_k s_k B_k A_k = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]`. What it does in a
layer is cut back to its largest singular values, which is the nearest of that rank (Eckart and Young). The product is
never formed: with B^T = Q_b R_b and A^T = Q_a R_a its singular values are those of R_b diag(w) R_a^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorauter.compositions.stack import AdapterStack

if TYPE_CHECKING:
    from lorauter.adapters.tensors import Pair, Where


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
        for first, parts in stack.parts.items():
            widths = [stack.b[target].shape[1] for target in parts]
            for target, a in zip(parts, torch.split(stack.a[first], widths, 1), strict=True):
                self._a[target] = torch.linalg.qr(a.float().cpu().mT)
                self._b[target] = torch.linalg.qr(stack.b[target].float().cpu().mT)

    def cut(self, weights: Tensor) -> Cut:
        """The adapter of weights (layers, targets, adapters). Targets of which nothing is left are not in it."""
        stack = self._stack
        pairs: dict[Where, Pair] = {}
        total = left = 0.0
        for i, target in enumerate(stack.targets):
            columns = weights[:, i].float().cpu() @ stack.spread[target].cpu()
            (q_a, r_a), (q_b, r_b) = self._a[target], self._b[target]
            with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
                found = list(pool.map(torch.linalg.svd, (r_b * columns[:, None]) @ r_a.mT))
            values = torch.stack([s for _, s, _ in found])
            energy = values.square().sum(0)
            total += float(energy.sum())
            rank = self._rank(energy)
            left += float(energy[:rank].sum())
            for layer, (u, s, v) in enumerate(found):
                if rank:
                    root = s[:rank].sqrt()
                    pairs[layer, target] = root[:, None] * (v[:rank] @ q_a[layer].mT), q_b[layer] @ u[:, :rank] * root
        return Cut(pairs, left / total if total else 1.0)

    def _rank(self, energy: Tensor) -> int:
        """How many of the largest singular values to keep, given the layers' sums of their squares."""
        if not energy.sum() > 0:
            return 0
        enough = int((energy.cumsum(0) < self._energy * energy.sum()).sum()) + 1
        return min(enough, self._max_rank, len(energy))
