"""Which adapters are on the device: packed in host memory, copied into the arena, pinned, and evicted.

The arena is one tensor, laid out once. An adapter has one stretch of it, with all its targets one after the other, so
that loading is one copy whatever mix of target modules comes. Knows nothing of scheduling or of what rows compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorauter.adapters.counters import TierCounters
from lorauter.adapters.tensors import is_finite
from lorauter.adapters.weights import LoraWeights, ModelShape
from lorauter.engine.arena import Stretches, aligned
from lorauter.engine.plan import AdapterKey, Mixture
from lorauter.engine.sequences import ActiveSequence
from lorauter.errors import AdapterRejected, AdapterUnavailable

SLOTS = 4096
"""Adapters on a device at most."""
TILE = 16
"""Columns that GPU kernels multiply together: those of one adapter and target, the last ones filled up."""
MOST_TILES = 2048
"""Tiles of targets with the same input that the adapters of all running rows may have."""
_WIDE = 8
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Group:
    """Targets with the same input, whose outputs lie side by side.

    Attributes:
        targets: those that the model has.
        inputs, widths: of the input, and of each target's output.
    """

    targets: tuple[str, ...]
    inputs: int
    widths: tuple[int, ...]

    @property
    def first(self) -> str:
        """The first of the targets, by which the group is known."""
        return self.targets[0]


def groups_of(shape: ModelShape) -> list[Group]:
    """The groups of a model's linear layers."""
    present = [tuple(target for target in targets if target in shape.linears) for targets in SAME_INPUT]
    return [
        Group(targets, shape.linears[targets[0]][0], tuple(shape.linears[target][1] for target in targets))
        for targets in present
        if targets
    ]


@dataclass(frozen=True)
class Part:
    """Where an adapter's pair for one target lies: A (rank, layers, in) from element `a` on, B (rank, layers, out)."""

    a: int
    b: int
    rank: int

    def moved(self, offset: int) -> Part:
        """The same in something that begins `offset` elements earlier."""
        return Part(self.a + offset, self.b + offset, self.rank)


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in host memory as the device takes it: checked, in the model's dtype, in one piece.

    Attributes:
        key: name and version.
        numbers: (elements,); in pinned memory where the model is on a GPU. The scaling is in B; layers and ranks that
            the adapter lacks are zero.
        parts: by target.
    """

    key: AdapterKey
    numbers: Tensor
    parts: Mapping[str, Part]

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.key[0]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.numbers.nbytes

    def tiles(self, groups: Sequence[Group]) -> list[int]:
        """How many tiles it has in each group."""
        known = self._tiles
        return [sum([known.get(target, 0) for target in group.targets]) for group in groups]

    @cached_property
    def all_tiles(self) -> int:
        """How many it has in all groups."""
        return sum(self._tiles.values())

    @cached_property
    def _tiles(self) -> dict[str, int]:
        """How many it has of each target."""
        return {target: -(-part.rank // TILE) for target, part in self.parts.items()}


def pack(
    key: AdapterKey, pairs: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype, *, pin: bool
) -> PackedAdapter:
    """Lay out an adapter for the device.

    Args:
        key: name and version.
        pairs: by target, A (rank, layers, in) and B (rank, layers, out) with the scaling in it.
        dtype: the model's.
        pin: whether to take pinned memory.
    """
    parts, size = {}, 0
    for target, (a, b) in pairs.items():
        parts[target] = Part(size, size + _whole(a.numel()), a.shape[0])
        size = parts[target].b + _whole(b.numel())
    numbers = torch.zeros(size, dtype=dtype, pin_memory=pin)
    for target, pair in pairs.items():
        for start, tensor in zip((parts[target].a, parts[target].b), pair, strict=True):
            numbers[start : start + tensor.numel()] = tensor.reshape(-1)
    return PackedAdapter(key, numbers, parts)


def pack_weights(
    weights: LoraWeights, shape: ModelShape, dtype: torch.dtype, *, max_rank: int, pin: bool
) -> PackedAdapter:
    """Check an adapter and lay it out; slow, and done once for each.

    Raises:
        AdapterRejected: it does not fit the model, or its numbers overflow the model's dtype.
    """
    weights.check_fits(shape, max_rank=max_rank)
    pairs = {}
    for target, rank in weights.ranks.items():
        inputs, outputs = shape.linears[target]
        a = torch.zeros(rank, shape.layers, inputs, dtype=dtype)
        b = torch.zeros(rank, shape.layers, outputs, dtype=dtype)
        for layer in range(shape.layers):
            pair = weights.tensors.get((layer, target))
            if pair is not None:
                a[: pair[0].shape[0], layer] = pair[0].to(dtype)
                b[: pair[1].shape[1], layer] = pair[1].T.to(dtype)
        if not (is_finite(a) and is_finite(b)):
            raise AdapterRejected(f"has numbers too large for {dtype}", adapter=weights.name)
        pairs[target] = a, b
    return pack(weights.key, pairs, dtype, pin=pin)


def _whole(size: int) -> int:
    """Elements of a tensor of so many, filled up so that the next one begins where wide loads may."""
    return -(-size // _WIDE) * _WIDE


@dataclass(frozen=True)
class Placed:
    """An adapter on the device: its number, its parts in the arena, and what happens once its copy is there."""

    key: AdapterKey
    slot: int
    parts: Mapping[str, Part]
    copied: Any = None


@dataclass
class _Resident:
    placed: Placed
    start: int
    size: int
    tiles: list[int]
    loaded: int  # the step before which its copy began
    last_used: int
    pins: int = 0


class AdapterSlots:
    """Adapters on the device, up to the arena's size; pinned while a sequence uses them, else evicted LRU.

    Args:
        shape: the base model's layers and linear shapes.
        budget_bytes: the arena's size.
        max_rank: the largest rank to take.
        copy: how numbers get to the device, (to, from); returns `Placed.copied`. None copies at once.
        ahead: whether a copy begun before one step is for the next, so that no step waits for it, unless no other
            adapter is in use.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        budget_bytes: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        copy: Callable[[Tensor, Tensor], Any] | None = None,
        ahead: bool = False,
    ) -> None:
        self.shape = shape
        self.groups = groups_of(shape)
        self.budget_bytes = budget_bytes
        self.arena = torch.empty(budget_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._max_rank = max_rank
        self._copy = copy or _copy_now
        self._ahead = ahead
        self._stretches = Stretches(self.arena.numel())
        self._resident: dict[AdapterKey, _Resident] = {}
        self._free_slots = list(range(SLOTS - 1, -1, -1))
        self._pinned: dict[ActiveSequence, list[AdapterKey]] = {}
        self._in_use = 0  # pinned adapters
        self._tiles = [0] * len(self.groups)  # of theirs
        self._early: dict[ActiveSequence, None] = {}  # wait for their copies or turns, and have them pinned
        self._releases = 0
        self._refused: dict[ActiveSequence, int] = {}  # found no room, after so many releases
        self._step = 0
        self._clock = 0
        self.counters = TierCounters()

    @property
    def resident(self) -> list[AdapterKey]:
        """The adapters on the device, the least recently used first; may be asked for by any thread."""
        return [key for key, _ in sorted(self._resident.copy().items(), key=lambda item: item[1].last_used)]

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena in use; may be asked for by any thread."""
        return sum(aligned(resident.size) for resident in list(self._resident.values())) * self.arena.itemsize

    def pack(self, weights: LoraWeights) -> PackedAdapter:
        """See `pack_weights`."""
        return pack_weights(
            weights,
            self.shape,
            self.arena.dtype,
            max_rank=self._max_rank,
            pin=self.arena.device.type == "cuda",
        )

    def check(self, adapters: Sequence[PackedAdapter]) -> None:
        """Raise AdapterUnavailable unless all of these adapters together fit the device."""
        unique = {packed.key: packed for packed in adapters}
        total = 0
        for packed in unique.values():
            total += aligned(packed.numbers.numel()) * self.arena.itemsize
            if total > self.arena.nbytes or len(unique) > SLOTS:
                raise AdapterUnavailable(
                    f"the request's adapters need {total} bytes on the device; adapter_bytes is {self.budget_bytes}",
                    adapter=packed.name,
                )
        if sum([packed.all_tiles for packed in unique.values()]) <= MOST_TILES:  # so no group has more
            return
        tiles = [packed.tiles(self.groups) for packed in unique.values()]
        for group, counts in zip(self.groups, zip(*tiles, strict=True), strict=False):
            if sum(counts) > MOST_TILES:
                raise AdapterUnavailable(
                    f"the request's {len(unique)} adapters have together more than {MOST_TILES * TILE} columns in "
                    f"{', '.join(group.targets)}; mix fewer or smaller ones",
                    adapter=adapters[-1].name,
                )

    def begin_step(self) -> None:
        """A step is about to be planned: what was loaded before the last one is there."""
        self._step += 1

    def forget(self) -> None:
        """Let go of every adapter that no sequence uses."""
        unused = [key for key, resident in self._resident.items() if not resident.pins]
        for key in unused:
            resident = self._resident.pop(key)
            self._free_slots.append(resident.placed.slot)
            self._stretches.give_back(resident.start, resident.size)
        self.counters.evictions += len(unused)

    def placed(self, mixture: Mixture) -> list[tuple[Placed, float]]:
        """Where the adapters of an admitted mixture are."""
        return [(self._resident[key].placed, weight) for key, weight in mixture]

    # --- lorauter.engine.scheduler.AdapterRoom

    def has(self, mixture: Mixture) -> bool:
        """Whether all of these adapters are there."""
        return all(key in self._resident and self._is_ready(self._resident[key]) for key, _ in mixture)

    def acquire(self, sequence: ActiveSequence, wanted_soon: Container[AdapterKey] = ()) -> bool:
        """See `AdapterRoom.acquire`. A sequence that waits for copies has its adapters pinned already.

        Of what may leave, the least recently used goes first, but what is wanted soon only after all the rest.
        """
        if not sequence.adapters:
            return True
        wanted = {packed.key: packed for packed in sequence.adapters if isinstance(packed, PackedAdapter)}
        if sequence not in self._pinned and not self._begin(sequence, wanted, wanted_soon):
            others = [early for early in self._early if early is not sequence]
            for early in others:  # it is not their turn
                self.release(early)
            if not others or not self._begin(sequence, wanted, wanted_soon):
                return False
        ready = all(self._is_ready(self._resident[key]) for key in wanted)
        if ready:
            self._early.pop(sequence, None)
        else:
            self._early[sequence] = None
        return ready

    def prepare(self, sequence: ActiveSequence) -> None:
        """See `AdapterRoom.prepare`."""
        refused = self._refused.get(sequence) == self._releases
        if self._ahead and sequence.adapters and sequence not in self._pinned and not refused:
            wanted = {packed.key: packed for packed in sequence.adapters if isinstance(packed, PackedAdapter)}
            if self._begin(sequence, wanted, ()):
                self._early[sequence] = None

    def _begin(
        self, sequence: ActiveSequence, wanted: Mapping[AdapterKey, PackedAdapter], wanted_soon: Container[AdapterKey]
    ) -> bool:
        """Load and pin what is wanted; False, and nothing changed, if there is no room. Whoever waits asks before each
        step, and is answered without a search until something has been released."""
        if self._refused.get(sequence) == self._releases:
            return False
        alone = not self._in_use
        if not self._load(wanted, wanted_soon):
            self._refused[sequence] = self._releases
            return False
        self._refused.pop(sequence, None)
        self._clock += 1
        for key in wanted:
            resident = self._resident[key]
            self._pin(resident, 1)
            resident.last_used = self._clock
            if alone:
                resident.loaded = -1
        self._pinned[sequence] = list(wanted)
        return True

    def release(self, sequence: ActiveSequence) -> None:
        """Undo `acquire`, if there was one; the adapters stay until their room is needed."""
        self._early.pop(sequence, None)
        self._refused.pop(sequence, None)
        if keys := self._pinned.pop(sequence, ()):
            self._releases += 1
        for key in keys:
            self._pin(self._resident[key], -1)

    def _pin(self, resident: _Resident, change: int) -> None:
        before, resident.pins = resident.pins, resident.pins + change
        if bool(before) != bool(resident.pins):
            self._in_use += change
            self._tiles = [total + change * own for total, own in zip(self._tiles, resident.tiles, strict=True)]

    def _is_ready(self, resident: _Resident) -> bool:
        return not self._ahead or resident.loaded < self._step

    def _load(self, wanted: Mapping[AdapterKey, PackedAdapter], wanted_soon: Container[AdapterKey]) -> bool:
        """Make adapters resident; False, and nothing changed, if those in use leave them no room."""
        missing = [packed for key, packed in wanted.items() if key not in self._resident]
        new = [packed.tiles(self.groups) for packed in missing]
        new += [self._resident[key].tiles for key in wanted if key in self._resident and not self._resident[key].pins]
        if any(total + sum(own) > MOST_TILES for total, own in zip(self._tiles, zip(*new, strict=True), strict=False)):
            return False
        if not missing:
            self.counters.hits += len(wanted)
            return True
        unused = sorted((key for key in self.resident if not self._resident[key].pins), key=wanted_soon.__contains__)
        room = self._make_room(missing, [key for key in unused if key not in wanted])
        if room is None:  # perhaps where all that is unused has left, what is wanted among it
            again = [packed for key, packed in wanted.items() if key in unused]
            missing = sorted([*missing, *again], key=lambda packed: -packed.numbers.numel())
            room = self._make_room(missing, unused, at_least=len(unused))
            if room is None:
                return False
        self._stretches, leaving, starts = room
        for key in leaving:
            self._free_slots.append(self._resident.pop(key).placed.slot)
        began = time.perf_counter()
        for packed, start in zip(missing, starts, strict=True):
            size = packed.numbers.numel()
            copied = self._copy(self.arena[start : start + size], packed.numbers)
            parts = {target: part.moved(start) for target, part in packed.parts.items()}
            placed = Placed(packed.key, self._free_slots.pop(), parts, copied)
            tiles = packed.tiles(self.groups)
            self._resident[packed.key] = _Resident(placed, start, size, tiles, self._step, self._clock)
        self.counters.load_seconds += time.perf_counter() - began
        self.counters.hits += len(wanted) - len(missing)
        self.counters.misses += len(missing)
        self.counters.evictions += len(leaving)
        return True

    def _make_room(
        self, missing: Sequence[PackedAdapter], unused: Sequence[AdapterKey], *, at_least: int = 0
    ) -> tuple[Stretches, list[AdapterKey], list[int]] | None:
        """The free stretches, who has left of `unused` (the first `at_least`, and more in need), and where each of the
        missing will be; None if there is too little room."""
        stretches, leaving, starts = self._stretches.copy(), list[AdapterKey](), list[int]()
        candidates = iter(unused)

        def leave() -> bool:
            key = next(candidates, None)
            if key is not None:
                leaving.append(key)
                stretches.give_back(self._resident[key].start, self._resident[key].size)
            return key is not None

        while len(leaving) < at_least:
            leave()
        for packed in missing:
            start = None
            while start is None:
                if len(self._resident) - len(leaving) + len(starts) < SLOTS:
                    start = stretches.take(packed.numbers.numel())
                if start is None and not leave():
                    return None
            starts.append(start)
        return stretches, leaving, starts


def _copy_now(to: Tensor, source: Tensor) -> None:
    to.copy_(source)


def default_budget(device: torch.device) -> int:
    """Bytes for adapters where no setting says how many: a quarter of what a GPU has free, or 1 GiB."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 1 << 30
