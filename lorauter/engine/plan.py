"""What the scheduler tells the runner: which tokens a step processes, and whose are chosen beside it. Plain values."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorauter.engine.types import SamplingParams

AdapterKey = tuple[str, str]
"""Name and version."""
Mixture = tuple[tuple[AdapterKey, float], ...]

Ints = NDArray[np.int32]

NOT_FINITE = -1
"""In place of a token, where the model's output is not finite."""
REFUSED = -2
"""In place of a token that may not come, of an answer that is held to a grammar."""


class Piece(NamedTuple):
    """What a step processes of one row.

    Attributes:
        row: which.
        start: the position of its first token.
        tokens: its tokens; empty for the one that the row's last step has chosen, which only the device may know yet.
        samples: whether the token after it is wanted.
        targets: the tokens that follow its first ones, where their probabilities are wanted.
        held: whether the token after it is chosen later, as a `Choice`, once it is known which may come.
    """

    row: int
    start: int
    tokens: Sequence[int]
    samples: bool
    targets: Sequence[int] = ()
    held: bool = False

    @property
    def size(self) -> int:
        """How many tokens."""
        return len(self.tokens) or 1


_NOBODY = np.zeros(0, np.int32)


class Decoding:
    """A step's pieces of one token.

    A row that merely goes on decoding costs no object: its token is the one that its last step has chosen, and the one
    after it is wanted.

    Args:
        rows: of those that merely go on.
        starts: their positions.
        others: pieces of one token that are more than that; they come after those.
    """

    __slots__ = ("others", "rows", "starts")

    def __init__(self, rows: Ints = _NOBODY, starts: Ints = _NOBODY, others: Sequence[Piece] = ()) -> None:
        self.rows = rows
        self.starts = starts
        self.others = others

    def __len__(self) -> int:
        return len(self.rows) + len(self.others)

    def __iter__(self) -> Iterator[Piece]:
        """All as pieces."""
        for row, start in zip(self.rows.tolist(), self.starts.tolist(), strict=True):
            yield Piece(row, start, (), samples=True)
        yield from self.others


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's token that a step has left open.

    Attributes:
        row: which.
        position: where in its sequence the token will be.
    """

    row: int
    position: int


@dataclass(frozen=True, slots=True)
class RowStart:
    """A row begins to be used.

    Attributes:
        row: which.
        mixture: of its adapters, all of them resident.
        sampling: how its tokens are chosen.
        seed: of its own random numbers.
        prompt: how many of `tokens` the answer does not count.
        tokens: those that are known.
        ends: tokens that end the answer.
    """

    row: int
    mixture: Mixture
    sampling: SamplingParams
    seed: int
    prompt: int
    tokens: array[int]
    ends: Collection[int] = ()


@dataclass(frozen=True)
class StepPlan:
    """One step.

    Attributes:
        left: rows that nobody has any more; after a step that failed, all of them.
        starts: rows whose mixture and sampling are new; before anything else but `left`.
        blocks: (row, place, blocks): those of a row's positions from `place * BLOCK` on.
        decoding: pieces of one token.
        prompts: longer ones.
    """

    left: Sequence[int]
    starts: Sequence[RowStart]
    blocks: Sequence[tuple[int, int, Sequence[int]]]
    decoding: Decoding
    prompts: Sequence[Piece]

    @property
    def pieces(self) -> Iterator[Piece]:
        """All, those of one token first."""
        yield from self.decoding
        yield from self.prompts

    @property
    def sampled(self) -> Iterator[Piece]:
        """The pieces that a token is wanted of; a step's results are the tokens of those that are not `held`, in their
        order."""
        return (piece for piece in self.pieces if piece.samples)

    @cached_property
    def beside(self) -> Ints:
        """Those that are not of rows that merely go on, as numbers: (n, 4), of each its row, start, size, and whether
        it samples."""
        pieces = (*self.decoding.others, *self.prompts)
        numbers = [(piece.row, piece.start, piece.size, piece.samples) for piece in pieces]
        return np.array(numbers, np.int32).reshape(-1, 4)

    @property
    def ends(self) -> tuple[Ints, Ints]:
        """Of the pieces that sample the row of each, and the position of the token that is wanted."""
        rows, starts = self.decoding.rows, self.decoding.starts
        own = self.beside[self.beside[:, 3] != 0]
        return np.concatenate((rows, own[:, 0])), np.concatenate((starts + 1, own[:, 1] + own[:, 2]))

    @property
    def held(self) -> list[int]:
        """Which of those pieces, by their place, are held."""
        others = [piece for piece in (*self.decoding.others, *self.prompts) if piece.samples]
        return [n for n, piece in enumerate(others, len(self.decoding.rows)) if piece.held]

    @property
    def scored(self) -> list[Piece]:
        """The pieces that have targets."""
        return [piece for pieces in (self.decoding.others, self.prompts) for piece in pieces if piece.targets]
