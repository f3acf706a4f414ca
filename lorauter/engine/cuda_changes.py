"""What is new of tensors that steps read: it comes with a step's other numbers, and the step's graph writes it first.
So it costs no launch and no copy of its own.

Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lorauter.engine import cuda_kernels as kernels
from lorauter.engine.plan import Ints
from lorauter.engine.sampling import to_device


class Pending:
    """What is new of tensors, by place: no place twice before it is cleared, for what is written at once has no order.
    It is cleared once its writing is launched: what a step takes that fails before is not lost."""

    def __init__(self) -> None:
        self.clear()

    def __len__(self) -> int:
        return len(self.places)

    def add(self, values: Mapping[int, int]) -> None:
        """Values by place."""
        self.places.extend(values)
        self.values.extend(values.values())

    def add_run(self, start: int, values: Sequence[int]) -> None:
        """Values from a place on."""
        self.places.extend(range(start, start + len(values)))
        self.values.extend(values)

    def copy(self, places: Ints, values: Ints) -> int:
        """Copy all that is new there, and return how many that is."""
        count = len(self)
        places[:count], values[:count] = self.places, self.values
        return count

    def clear(self) -> None:
        """It is written, or will be before anything that is launched from now on."""
        self.places = array("i")
        self.values = array("i")


class Changes:
    """What is to be written.

    Args:
        flats: three tensors (any,) int32 on the device.
        pending: what is new there; places are counted as if one tensor followed the other.
    """

    def __init__(self, flats: tuple[Tensor, Tensor, Tensor], pending: Pending) -> None:
        self._flats = flats
        self.pending = pending
        self.third = len(flats[0]) + len(flats[1])

    def put(self, places: Ints, values: Ints) -> int:
        """Put all that is new where a graph reads it, and return how many that is; if it is more than there is room
        for, write it at once, and return 0."""
        if len(self.pending) > len(places):
            self.write()
            return 0
        return self.pending.copy(places, values)

    def write(self) -> None:
        """Write all that is new at once."""
        count = len(self.pending)
        if not count:
            return
        pairs = np.empty((2, -(-count // 4) * 4), np.int32)  # both halves begin where the kernel is compiled for
        self.pending.copy(*pairs)
        where, values = to_device(torch.from_numpy(pairs), self._flats[0].device)
        kernels.write_changes(self._flats, where[:count], values[:count], None)
        self.pending.clear()

    def written(self, where: Tensor, values: Tensor, count: Tensor) -> None:
        """Write the first `count` (1,) of what was put; both (n,) int32 on the device."""
        kernels.write_changes(self._flats, where, values, count)
