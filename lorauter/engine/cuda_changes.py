"""What is new of tensors that steps read: it comes with a step's other numbers, and the step's graph writes it first.
So it costs no launch and no copy of its own.

Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lorauter.engine import cuda_kernels as kernels
from lorauter.engine.plan import Ints
from lorauter.engine.sampling import to_device


class Changes:
    """What is to be written.

    Args:
        flats: three tensors (any,) int32 on the device.
        pending: by place, what is new there; places are counted as if one tensor followed the other.
    """

    def __init__(self, flats: tuple[Tensor, Tensor, Tensor], pending: dict[int, int]) -> None:
        self._flats = flats
        self.pending = pending
        self.third = len(flats[0]) + len(flats[1])

    def put(self, places: Ints, values: Ints) -> int:
        """Put all that is new where a graph reads it, and return how many that is; if it is more than there is room
        for, write it at once, and return 0."""
        if len(self.pending) > len(places):
            self.write()
            return 0
        return self._take(places, values)

    def write(self) -> None:
        """Write all that is new at once."""
        count = len(self.pending)
        if not count:
            return
        pairs = np.empty((2, -(-count // 4) * 4), np.int32)  # both halves begin where the kernel is compiled for
        self._take(*pairs)
        where, values = to_device(torch.from_numpy(pairs), self._flats[0].device)
        kernels.write_changes(self._flats, where[:count], values[:count], None)

    def _take(self, places: Ints, values: Ints) -> int:
        """Move all that is new there, and return how many that is."""
        count = len(self.pending)
        places[:count] = np.fromiter(self.pending, np.int32, count)
        values[:count] = np.fromiter(self.pending.values(), np.int32, count)
        self.pending.clear()
        return count

    def written(self, where: Tensor, values: Tensor, count: Tensor) -> None:
        """Write the first `count` (1,) of what was put; both (n,) int32 on the device."""
        kernels.write_changes(self._flats, where, values, count)
