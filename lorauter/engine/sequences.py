"""Requests that wait or run, and those among them that merely decode, of whom a step takes no notice one by one.

Knows nothing of who is next or of the cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lorauter.engine.blocks import BLOCK, Parent
from lorauter.engine.plan import Ints, Mixture
from lorauter.engine.types import FinishReason, SamplingParams


@dataclass(eq=False)
class ActiveSequence:
    """A request that waits or runs.

    Attributes:
        tokens: prompt and answer, as far as they are known.
        prompt: how many are the prompt's.
        limit: length at which it is full.
        mixture, sampling, seed: what computes it, how its tokens are chosen, and by which random numbers.
        adapters: what `AdapterRoom` takes.
        tenant: whose computed blocks alone it may use.
        ends: tokens that end it.
        reused: positions of the prompt that were found computed.
        ended: whether its last token is known, or nobody waits for it any more.
        id: what others know it by.
        told: positions of the prompt whose next tokens' probabilities are known.
        undecided: whether it waits until it is known what may come, for `choose` or `resume`.
        chosen: whether its tokens are chosen by `choose`.
        computed: positions whose keys and values are computed; of one in a lane, when it joined.
        expected: its length once all tokens on their way have come; of one in a lane, when it joined.
        joined: of one in a lane, how many steps had been planned when it joined.
        stop: there, the position before which it needs attention.
        age: its place in the order of admission.
        published: blocks that may be found by others.
        passed_over: how many later requests were admitted before it.
    """

    tokens: array[int]
    prompt: int
    limit: int
    mixture: Mixture = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    adapters: Sequence[object] = ()
    tenant: str | None = None
    ends: Collection[int] = ()
    reused: int = 0
    ended: bool = False
    id: int = 0
    told: int = 0
    undecided: bool = False
    chosen: bool = field(init=False)
    row: int | None = None
    begun: bool = False
    computed: int = 0
    expected: int = field(init=False)
    joined: int | None = None
    stop: int = 0
    age: int = 0
    blocks: list[int] = field(default_factory=list)
    published: int = 0
    parent: Parent = None
    passed_over: int = 0

    def __post_init__(self) -> None:
        self.chosen = self.sampling.is_held and not self.sampling.greedy
        self.expected = len(self.tokens)

    def position(self, planned: int) -> int:
        """How much of it is computed, once so many steps have been planned."""
        return self.computed if self.joined is None else self.computed + planned - self.joined

    @property
    def left(self) -> int:
        """Of one in no lane, how many tokens are there to process, those on their way included; none of one that will
        be full."""
        return 0 if self.expected >= self.limit else self.expected - self.computed

    @property
    def scores(self) -> bool:
        """Whether probabilities of its prompt's tokens are wanted yet."""
        return self.sampling.prompt_logprobs is not None and self.told + 1 < self.prompt

    def set_stop(self) -> None:
        """Where the blocks that it has end, or where its last token is to be computed."""
        self.stop = min(len(self.blocks) * BLOCK, self.limit - 2)


class Lanes:
    """Sequences that go on by one token in each step, until one of them needs attention.

    Args:
        sequences: all of them in a lane.
        planned: how many steps have been planned.

    Attributes:
        rows: theirs.
        appends: what takes the next token of each.
    """

    def __init__(self, sequences: list[ActiveSequence], planned: int) -> None:
        self.sequences = sequences
        self.rows: Ints = np.array([sequence.row for sequence in sequences], np.int32)
        self.appends = [sequence.tokens.append for sequence in sequences]
        self._planned = planned
        self._positions: Ints = np.array([sequence.position(planned) for sequence in sequences], np.int32)
        self._stops: Ints = np.array([sequence.stop for sequence in sequences], np.int32)
        self._find_next()

    def _find_next(self) -> None:
        self._next = self._planned + int((self._stops - self._positions).min()) if self.sequences else 0

    def due(self, planned: int) -> list[int]:
        """Which need attention before the step after so many."""
        if not self.sequences or planned < self._next:
            return []
        found: list[int] = np.flatnonzero(self.starts(planned) >= self._stops).tolist()
        return found

    def renew(self, places: Sequence[int]) -> None:
        """The stops of some have changed."""
        self._stops[places] = [self.sequences[place].stop for place in places]
        self._find_next()

    def starts(self, planned: int) -> Ints:
        """The position that each processes in the step after so many."""
        return self._positions + np.int32(planned - self._planned)


class Event(NamedTuple):
    """A sequence has got a token, the one that ends it if there is a reason; NOT_FINITE has none, and ends it.

    `place` is the token's among those of its step.
    """

    sequence: ActiveSequence
    token: int
    reason: FinishReason | None
    place: int


@dataclass(frozen=True, slots=True)
class Came:
    """Who has got which tokens.

    Attributes:
        sequences, tokens: they.
        ended: which of them have ended, and why; None if the model's output was not finite.
        places: of each token, its place among those of its step; None where all have their own.
    """

    sequences: Sequence[ActiveSequence]
    tokens: Sequence[int]
    ended: Mapping[int, FinishReason | None]
    places: Sequence[int] | None

    def __len__(self) -> int:
        return len(self.sequences)

    def sound(self) -> Came:
        """Those of them that are tokens."""
        events = [event for event in self if event.token >= 0]
        return Came(
            [event.sequence for event in events],
            [event.token for event in events],
            {i: event.reason for i, event in enumerate(events) if event.reason is not None},
            [event.place for event in events],
        )

    def __iter__(self) -> Iterator[Event]:
        places = range(len(self.sequences)) if self.places is None else self.places
        for i, (sequence, token, place) in enumerate(zip(self.sequences, self.tokens, places, strict=True)):
            yield Event(sequence, token, self.ended.get(i), place)
