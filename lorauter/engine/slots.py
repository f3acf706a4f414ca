"""Resident adapters, stacked, and the mixture of them that every token of a batch gets.

For each target (q_proj, ...) all resident adapters share one stack of rank columns: A is (layers, C, in) and B
is (layers, C, out). An adapter of rank r owns any r columns. With m the (tokens, C) matrix that repeats each
token's adapter weights over the columns of the adapters,

    y += ((x A^T) * m) B        =   sum_k w_k s_k B_k A_k x      for every token at once,

the cost does not depend on how many adapters a token mixes. Knows nothing of requests or scheduling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorauter.adapters.weights import LoraWeights, ModelShape
from lorauter.errors import AdapterRejected, AdapterUnavailable

AdapterKey = tuple[str, str]
Mixture = tuple[tuple[AdapterKey, float], ...]

_FREE = 0  # owner of the columns that nobody uses; real slots count from 1
_FIRST_COLUMNS = 16


class _Stack:
    """The columns of one target."""

    def __init__(
        self, layers: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.a = torch.zeros(layers, 0, in_features, dtype=dtype, device=device)
        self.b = torch.zeros(layers, 0, out_features, dtype=dtype, device=device)
        self.owner = torch.zeros(0, dtype=torch.long, device=device)
        self.column_bytes = layers * (in_features + out_features) * dtype.itemsize

    @property
    def capacity(self) -> int:
        return self.owner.shape[0]

    def used(self) -> int:
        return int((self.owner != _FREE).sum())

    def resize(self, capacity: int) -> None:
        """Keep the columns in use, packed to the front, in a stack of another capacity."""
        columns = (self.owner != _FREE).nonzero()[:, 0]
        resized = []
        for old in (self.a, self.b):
            new = old.new_zeros(old.shape[0], capacity, old.shape[2])
            new[:, : len(columns)] = old[:, columns]
            resized.append(new)
        owner = self.owner.new_zeros(capacity)
        owner[: len(columns)] = self.owner[columns]
        # All at once, and last: running out of memory above must leave the stack as it was.
        self.a, self.b = resized
        self.owner = owner

    def write(self, slot: int, rank: int, pairs: Mapping[int, tuple[Tensor, Tensor]], name: str) -> None:
        """Put an adapter's `{layer: (A, B)}` into free columns; layers it lacks, and missing rank, are zero.

        Raises:
            AdapterRejected: its numbers overflow the dtype.
        """
        a = torch.zeros(self.a.shape[0], rank, self.a.shape[2], dtype=torch.float32)
        b = torch.zeros(self.b.shape[0], rank, self.b.shape[2], dtype=torch.float32)
        for layer, (layer_a, layer_b) in pairs.items():
            # Rows that do not use the adapter multiply x A by 0, which must not meet infinity or NaN: a power of
            # two takes A's entries below 1, and goes over to B.
            factor = 2.0 ** min(max(math.frexp(float(layer_a.abs().max()))[1], 0), 127)
            a[layer, : layer_a.shape[0]] = layer_a.float() / factor
            b[layer, : layer_b.shape[1]] = layer_b.T.float() * factor
        a, b = a.to(self.a), b.to(self.b)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterRejected(f"has numbers too large for {self.a.dtype}", adapter=name)
        columns = (self.owner == _FREE).nonzero()[:rank, 0]
        self.a.index_copy_(1, columns, a)
        self.b.index_copy_(1, columns, b)
        self.owner[columns] = slot


@dataclass
class _Resident:
    slot: int
    ranks: dict[str, int]
    pins: int
    last_used: int


@dataclass(frozen=True)
class LoraBatch:
    """The mixture of every token in a batch.

    Attributes:
        masks: `{target: m}`, m (tokens, C) in the model's dtype; only targets that some token's adapters have.
    """

    stacks: Mapping[str, _Stack]
    masks: Mapping[str, Tensor]

    def add(self, target: str, layer: int, x: Tensor, y: Tensor) -> None:
        """Add the mixture's change to `y` (tokens, out), given the layer's input `x` (tokens, in)."""
        mask = self.masks.get(target)
        if mask is not None:
            stack = self.stacks[target]
            y.addmm_((x @ stack.a[layer].T).mul_(mask), stack.b[layer])

    def select(self, rows: Tensor) -> LoraBatch:
        """The mixtures of chosen rows: (tokens,) indices into this batch."""
        return LoraBatch(self.stacks, {target: mask[rows] for target, mask in self.masks.items()})


class AdapterSlots:
    """Adapters on the device, up to a byte budget; pinned while a request uses them, else evicted LRU.

    Args:
        shape: the base model's layers and linear shapes.
        budget_bytes: bytes of adapter columns to hold at most.
        max_rank: the largest rank to take.
    """

    def __init__(
        self, shape: ModelShape, *, budget_bytes: int, max_rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape = shape
        self._budget = budget_bytes
        self._max_rank = max_rank
        self._dtype = dtype
        self._device = device
        self._stacks = {
            target: _Stack(shape.layers, in_features, out_features, dtype, device)
            for target, (in_features, out_features) in shape.linears.items()
        }
        self._resident: dict[AdapterKey, _Resident] = {}
        self._free_slots: list[int] = []
        self._clock = 0

    @property
    def resident(self) -> list[AdapterKey]:
        """The adapters on the device, the least recently used first."""
        return sorted(self._resident, key=lambda key: self._resident[key].last_used)

    @property
    def used_bytes(self) -> int:
        """Bytes of the columns in use."""
        return sum(self._cost(resident.ranks) for resident in self._resident.values())

    def check(self, adapters: Sequence[LoraWeights]) -> None:
        """Raise unless these adapters fit the model, and all of them together the budget.

        Raises:
            AdapterRejected, AdapterUnavailable.
        """
        total = 0
        for weights in {weights.key: weights for weights in adapters}.values():
            weights.check_fits(self._shape, max_rank=self._max_rank)
            total += self._cost(weights.ranks)
            if total > self._budget:
                raise AdapterUnavailable(
                    f"the request's adapters need {total} bytes on the device, but adapter_bytes is {self._budget}",
                    adapter=weights.name,
                )

    def acquire(self, adapters: Sequence[LoraWeights]) -> bool:
        """Make adapters resident and pin them; False, and nothing pinned, if running requests hold the room."""
        wanted = {weights.key: weights for weights in adapters}
        missing = [weights for key, weights in wanted.items() if key not in self._resident]
        excess = self.used_bytes + sum(self._cost(weights.ranks) for weights in missing) - self._budget
        leaving = []
        for key in self.resident:
            if excess <= 0:
                break
            if not self._resident[key].pins and key not in wanted:
                leaving.append(key)
                excess -= self._cost(self._resident[key].ranks)
        if excess > 0:
            return False
        for key in leaving:
            self._evict(key)
        for weights in missing:
            self._load(weights)
        self._clock += 1
        for key in wanted:
            self._resident[key].pins += 1
            self._resident[key].last_used = self._clock
        return True

    def release(self, keys: Sequence[AdapterKey]) -> None:
        """Undo one `acquire` of these adapters; they stay resident until their room is needed."""
        for key in set(keys):
            self._resident[key].pins -= 1

    def batch(self, mixtures: Sequence[Mixture]) -> LoraBatch | None:
        """The mixtures of n rows, adapters acquired before; None if no row has any."""
        if not any(mixtures):
            return None
        slots = len(self._resident) + len(self._free_slots) + 1
        weights = torch.zeros(len(mixtures), slots)
        targets: set[str] = set()
        for row, mixture in enumerate(mixtures):
            for key, weight in mixture:
                weights[row, self._resident[key].slot] += weight
                targets.update(self._resident[key].ranks)
        weights = weights.to(self._device)
        return LoraBatch(self._stacks, {t: weights[:, self._stacks[t].owner].to(self._dtype) for t in sorted(targets)})

    def _cost(self, ranks: Mapping[str, int]) -> int:
        return sum(rank * self._stacks[target].column_bytes for target, rank in ranks.items())

    def _evict(self, key: AdapterKey) -> None:
        resident = self._resident.pop(key)
        self._clear(resident.slot)

    def _clear(self, slot: int) -> None:
        self._free_slots.append(slot)
        for stack in self._stacks.values():
            stack.owner[stack.owner == slot] = _FREE

    def _load(self, weights: LoraWeights) -> None:
        slot = self._free_slots.pop() if self._free_slots else len(self._resident) + 1
        ranks = weights.ranks
        try:
            for target, rank in ranks.items():
                self._reserve(target, rank)
                pairs = {layer: pair for (layer, t), pair in weights.tensors.items() if t == target}
                self._stacks[target].write(slot, rank, pairs, weights.name)
        except Exception:
            self._clear(slot)
            raise
        self._resident[weights.key] = _Resident(slot, ranks, pins=0, last_used=self._clock)

    def _reserve(self, target: str, rank: int) -> None:
        """Make `rank` columns of a stack free. All stacks together never take more than the budget."""
        stack = self._stacks[target]
        needed = stack.used() + rank
        if needed <= stack.capacity:
            return
        others = [other for other in self._stacks.values() if other is not stack]
        if sum(s.capacity * s.column_bytes for s in others) + needed * stack.column_bytes > self._budget:
            for other in others:
                other.resize(other.used())
        room = (self._budget - sum(s.capacity * s.column_bytes for s in others)) // stack.column_bytes
        stack.resize(max(needed, min(room, max(_FIRST_COLUMNS, 2 * stack.capacity))))
