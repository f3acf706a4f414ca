"""What the scheduler tells the runner: which tokens a step processes, and whose are chosen beside it. Plain values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorauter.engine.types import SamplingParams

AdapterKey = tuple[str, str]
"""Name and version."""
Mixture = tuple[tuple[AdapterKey, float], ...]

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
    tokens: Sequence[int]
    ends: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
        left: rows that nobody has any more; after a step that failed, all of them.
        starts: rows whose mixture and sampling are new; before anything else but `left`.
        blocks: (row, place, block): the block of a row's positions from `place * BLOCK` on.
        decoding: pieces of one token.
        prompts: longer ones.
    """

    left: Sequence[int]
    starts: Sequence[RowStart]
    blocks: Sequence[tuple[int, int, int]]
    decoding: Sequence[Piece]
    prompts: Sequence[Piece]

    @property
    def sampled(self) -> Iterator[Piece]:
        """The pieces that a token is wanted of; a step's results are the tokens of those that are not `held`, in their
        order."""
        return (piece for pieces in (self.decoding, self.prompts) for piece in pieces if piece.samples)

    @property
    def scored(self) -> list[Piece]:
        """The pieces that have targets."""
        return [piece for pieces in (self.decoding, self.prompts) for piece in pieces if piece.targets]
