"""Which tokens may come next in rows, in host memory where whoever chooses them reads it: a GPU in the midst of a step.

What is not there in time is not waited for: the token is chosen among all then, and has to be checked. Knows nothing of
grammars or models.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]
"""Tokens that may come, 32 in each number, the first its least bit."""


class Seat:
    """Somebody whose next token may not be just any.

    Attributes:
        index: of that token in its sequence; at least 1.
        row: which it has, if any; the board's to change.
        found: what may come, and the index of the token that it is for.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.row: int | None = None
        self.found: tuple[int, Words] | None = None

    @property
    def words(self) -> Words | None:
        """What may come next, if that is known."""
        found = self.found
        return found[1] if found is not None and found[0] == self.index else None


class MaskBoard:
    """What may come next in each row.

    Args:
        rows: how many rows there are.
        vocabulary: tokens of the model.
        pin: whether a GPU is to read it.

    Attributes:
        numbers: (rows, 1 + words) int32: the index of the token that it is for, which is written last and is 0 where
            any may come, and what may come.
    """

    def __init__(self, rows: int, vocabulary: int, *, pin: bool) -> None:
        import torch  # whoever only checks a grammar needs none

        self.numbers = torch.zeros(rows, 1 + -(-vocabulary // 32), dtype=torch.int32, pin_memory=pin)
        self._array: Words = self.numbers.numpy()
        self._seats: dict[int, Seat] = {}
        self._lock = threading.Lock()

    def give(self, row: int, seat: Seat | None) -> None:
        """From now on a row is somebody's, or may have any token."""
        if seat is None and row not in self._seats:
            return
        with self._lock:
            former = self._seats.pop(row, None)
            if former is not None and former.row == row:
                former.row = None
            self._array[row, 0] = 0
            if seat is not None:
                self._seats[row] = seat
                seat.row = row
                self._write(seat)

    def post(self, seats: Sequence[Seat]) -> None:
        """It is known what may come next, in the rows of these or in those which they will have."""
        with self._lock:
            for seat in seats:
                self._write(seat)

    def _write(self, seat: Seat) -> None:
        if seat.row is None or seat.found is None:
            return
        index, words = seat.found
        if index == seat.index:
            self._array[seat.row, 1:] = words[: self._array.shape[1] - 1]
            self._array[seat.row, 0] = index

    def has(self, row: int, index: int) -> bool:
        """Whether it is there for the token of this index."""
        return bool(self._array[row, 0] == index)
