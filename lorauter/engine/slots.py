"""Which adapters are on the device: packed in host memory, loaded into the stacks, pinned, and evicted.

Knows nothing of requests or scheduling; `lorauter.engine.stacks` has the columns themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lorauter.adapters.counters import TierCounters
from lorauter.adapters.weights import LoraWeights, ModelShape
from lorauter.engine.lora import LoraBatch, mix
from lorauter.engine.stacks import FREE, Stack, make_groups
from lorauter.errors import AdapterRejected, AdapterUnavailable

AdapterKey = tuple[str, str]
Mixture = tuple[tuple[AdapterKey, float], ...]

_FIRST_COLUMNS = 16
_FIRST_COLUMNS_GPU = 256  # captured graphs end when a stack grows


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in host memory as the device takes it: checked, in the model's dtype, one stack for each target.

    Attributes:
        key: name and version.
        stacks: `{target: (A, B)}`, A (layers, r, in) and B (layers, r, out) with the scaling in it; layers and
            ranks that the adapter lacks are zero. In pinned memory where the model is on a GPU.
    """

    key: AdapterKey
    stacks: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.key[0]

    @property
    def ranks(self) -> dict[str, int]:
        """Columns for each target."""
        return {target: a.shape[1] for target, (a, _) in self.stacks.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(a.nbytes + b.nbytes for a, b in self.stacks.values())


def _pack(weights: LoraWeights, shape: ModelShape, dtype: torch.dtype, *, pin: bool) -> PackedAdapter:
    stacks = {}
    for target, rank in weights.ranks.items():
        in_features, out_features = shape.linears[target]
        a = torch.zeros(shape.layers, rank, in_features)
        b = torch.zeros(shape.layers, rank, out_features)
        for layer in range(shape.layers):
            pair = weights.tensors.get((layer, target))
            if pair is not None:
                # Rows that do not use the adapter multiply x A by 0, which must not meet infinity or NaN: a power
                # of two takes A's entries below 1, and goes over to B.
                factor = 2.0 ** min(max(math.frexp(float(pair[0].abs().max()))[1], 0), 127)
                a[layer, : pair[0].shape[0]] = pair[0].float() / factor
                b[layer, : pair[1].shape[1]] = pair[1].T.float() * factor
        a, b = a.to(dtype), b.to(dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterRejected(f"has numbers too large for {dtype}", adapter=weights.name)
        stacks[target] = (a.pin_memory(), b.pin_memory()) if pin else (a, b)
    return PackedAdapter(weights.key, stacks)


@dataclass
class _Resident:
    slot: int
    ranks: dict[str, int]
    pins: int
    last_used: int


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
        self.shape = shape
        self.budget_bytes = budget_bytes
        self._max_rank = max_rank
        self._dtype = dtype
        self._device = device
        self._groups = make_groups(shape, dtype, device)
        self.stacks = {target: stack for group in self._groups for target, stack in group.stacks.items()}
        self._generation = 0
        self._resident: dict[AdapterKey, _Resident] = {}
        self._free_slots: list[int] = []
        self._clock = 0
        self._tight = False  # the device had no memory for more, and no request has let go of any since
        self.counters = TierCounters()

    @property
    def resident(self) -> list[AdapterKey]:
        """The adapters on the device, the least recently used first; may be asked for by any thread."""
        return [key for key, _ in sorted(self._resident.items(), key=lambda item: item[1].last_used)]

    @property
    def used_bytes(self) -> int:
        """Bytes of the columns in use; may be asked for by any thread."""
        return sum(self._cost(resident.ranks) for resident in list(self._resident.values()))

    def pack(self, weights: LoraWeights) -> PackedAdapter:
        """Check an adapter and make it ready for the device; slow, and done once for each.

        Raises:
            AdapterRejected: it does not fit the model, or its numbers overflow the model's dtype.
        """
        weights.check_fits(self.shape, max_rank=self._max_rank)
        return _pack(weights, self.shape, self._dtype, pin=self._device.type == "cuda")

    def check(self, adapters: Sequence[PackedAdapter]) -> None:
        """Raise AdapterUnavailable unless all of these adapters together fit the budget."""
        total = 0
        for packed in {packed.key: packed for packed in adapters}.values():
            total += self._cost(packed.ranks)
            if total > self.budget_bytes:
                raise AdapterUnavailable(
                    f"the request's adapters need {total} bytes on the device; adapter_bytes is {self.budget_bytes}",
                    adapter=packed.name,
                )

    def has(self, keys: Iterable[AdapterKey]) -> bool:
        """Whether all of these adapters are resident."""
        return all(key in self._resident for key in keys)

    def acquire(self, adapters: Sequence[PackedAdapter], *, wanted_soon: Container[AdapterKey] = ()) -> bool:
        """Make adapters resident and pin them; False, and nothing pinned, if running requests hold the room.

        Of what may leave, the least recently used goes first, but what is wanted soon only after all the rest. Where
        the device has no memory for what the budget allows, the columns that are there have to do.

        Raises:
            AdapterUnavailable: they are too few even with nothing else in them.
        """
        if self._tight and not self.has(packed.key for packed in adapters):
            return False
        try:
            return self._acquire(adapters, wanted_soon, self.budget_bytes)
        except torch.OutOfMemoryError:
            there = sum(stack.capacity * stack.column_bytes for stack in self.stacks.values())
        with suppress(torch.OutOfMemoryError):
            if self._acquire(adapters, wanted_soon, there):
                return True
        self._tight = any(resident.pins for resident in self._resident.values())
        if not self._tight:
            raise AdapterUnavailable("the device has no memory left for it", adapter=adapters[-1].name)
        return False

    def _acquire(
        self, adapters: Sequence[PackedAdapter], wanted_soon: Container[AdapterKey], budget_bytes: int
    ) -> bool:
        wanted = {packed.key: packed for packed in adapters}
        missing = [packed for key, packed in wanted.items() if key not in self._resident]
        excess = self.used_bytes + sum(self._cost(packed.ranks) for packed in missing) - budget_bytes
        leaving = []
        for key in sorted(self.resident, key=lambda key: key in wanted_soon):
            if excess <= 0:
                break
            if not self._resident[key].pins and key not in wanted:
                leaving.append(key)
                excess -= self._cost(self._resident[key].ranks)
        if excess > 0:
            return False
        for key in leaving:
            self._clear(self._resident.pop(key).slot)
        started = time.perf_counter()
        for packed in missing:
            self._load(packed)
        self.counters.load_seconds += time.perf_counter() - started
        self.counters.hits += len(wanted) - len(missing)
        self.counters.misses += len(missing)
        self.counters.evictions += len(leaving)
        self._clock += 1
        for key in wanted:
            self._resident[key].pins += 1
            self._resident[key].last_used = self._clock
        return True

    def release(self, keys: Sequence[AdapterKey]) -> None:
        """Undo one `acquire` of these adapters; they stay resident until their room is needed."""
        self._tight = False
        for key in set(keys):
            self._resident[key].pins -= 1

    def batch(self, mixtures: Sequence[Mixture]) -> LoraBatch | None:
        """The mixtures of n rows, adapters acquired before; None if no row has any."""
        if not any(mixtures):
            return None
        highest = len(self._resident) + len(self._free_slots)  # slot number given so far
        weights = torch.zeros(len(mixtures), highest + 1)
        for row, mixture in enumerate(mixtures):
            for key, weight in mixture:
                weights[row, self._resident[key].slot] += weight
        order = torch.zeros(highest + 1, dtype=torch.long)
        order[[self._resident[key].slot for key in sorted(self._resident)]] = torch.arange(len(self._resident))
        batch = mix(self._groups, weights, self._generation, order)
        return batch if batch.groups else None

    def _cost(self, ranks: Mapping[str, int]) -> int:
        return sum(rank * self.stacks[target].column_bytes for target, rank in ranks.items())

    def _clear(self, slot: int) -> None:
        self._free_slots.append(slot)
        for stack in self.stacks.values():
            stack.owner[stack.owner == slot] = FREE

    def _load(self, packed: PackedAdapter) -> None:
        slot = self._free_slots.pop() if self._free_slots else len(self._resident) + 1
        try:
            for target, (a, b) in packed.stacks.items():
                self._reserve(target, a.shape[1])
                self.stacks[target].write(slot, a, b)
        except Exception:
            self._clear(slot)
            raise
        self._resident[packed.key] = _Resident(slot, packed.ranks, pins=0, last_used=self._clock)

    def _reserve(self, target: str, rank: int) -> None:
        """Make `rank` columns of a stack free. All stacks together never take more than the budget."""
        stack = self.stacks[target]
        needed = stack.used() + rank
        if needed <= stack.capacity:
            return
        others = [other for other in self.stacks.values() if other is not stack]
        if sum(s.capacity * s.column_bytes for s in others) + needed * stack.column_bytes > self.budget_bytes:
            for other in others:
                self._resize(other, other.used())
        room = (self.budget_bytes - sum(s.capacity * s.column_bytes for s in others)) // stack.column_bytes
        first = _FIRST_COLUMNS_GPU if self._device.type == "cuda" else _FIRST_COLUMNS
        self._resize(stack, max(needed, min(room, max(first, 2 * stack.capacity))))

    def _resize(self, stack: Stack, capacity: int) -> None:
        if capacity != stack.capacity:
            stack.resize(capacity)
            self._generation += 1  # last: what has failed has changed nothing


def default_budget(device: torch.device) -> int:
    """Bytes for adapters where no setting says how many: a quarter of what a GPU has free, or 1 GiB."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 1 << 30
