"""Stretches of one long tensor: taken where they fit best, given back, joined. Knows numbers, no tensors."""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGNMENT = 64  # elements: every stretch begins where wide loads may


class Stretches:
    """The free stretches of `size` elements."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = [(0, size)] if size else []  # (start, end), in order; no two touch

    def copy(self) -> Stretches:
        """Another that can be tried on."""
        other = Stretches(0)
        other.size, other._free = self.size, list(self._free)
        return other

    def take(self, size: int) -> int | None:
        """Where a stretch of this size begins now, in the smallest free one that holds it; None if none does."""
        size = aligned(size)
        fitting = [(end - start, start) for start, end in self._free if end - start >= size]
        if not fitting:
            return None
        length, start = min(fitting)
        place = bisect_left(self._free, (start, start + length))
        if length == size:
            del self._free[place]
        else:
            self._free[place] = (start + size, start + length)
        return start

    def give_back(self, start: int, size: int) -> None:
        """Free what `take` gave."""
        end = start + aligned(size)
        place = bisect_left(self._free, (start, end))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == start:
            start = self._free.pop(place - 1)[0]
        insort(self._free, (start, end))


def aligned(size: int) -> int:
    """The elements that a stretch of this size really takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT
