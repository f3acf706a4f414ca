"""What an engine's two sides say to each other: the callers' side in orders, the device's side in reports.

Plain values that travel between threads or between processes, one message for all that belongs together. A sequence is
known by its number. Knows nothing of how they travel.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lorauter.adapters.counters import TierCounters
from lorauter.adapters.weights import ModelShape
from lorauter.engine.plan import AdapterKey
from lorauter.engine.types import FinishReason, SamplingParams

REASONS: tuple[FinishReason | None, ...] = (None, "stop", "length")


class Adapter(Protocol):
    """An adapter that is ready for an engine, in memory of its device's side. It stays there while anybody holds it."""

    @property
    def key(self) -> AdapterKey:
        """Name and version."""

    @property
    def name(self) -> str:
        """The adapter's name."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""


# --- orders


class Begin(NamedTuple):
    """A sequence begins: see `lorauter.engine.scheduler.ActiveSequence`.

    Attributes:
        came: when it was asked for, in seconds of the clock that all of a machine's processes share.
    """

    id: int
    tokens: array[int]
    prompt: int
    limit: int
    adapters: tuple[tuple[Adapter, float], ...]
    sampling: SamplingParams
    seed: int
    tenant: str | None
    ends: Collection[int]
    came: float = 0.0


@dataclass(frozen=True, slots=True)
class Drop:
    """Nobody waits for a sequence any more; of no effect on one that has ended."""

    id: int


@dataclass(frozen=True, slots=True)
class Lockstep:
    """From now on no step is planned before what came of each report that is `awaited` has been said.

    It comes while nothing runs, and makes all forgotten that was computed or loaded before.
    """

    on: bool


@dataclass(frozen=True, slots=True)
class Handled:
    """What came of the last report that was awaited has been said."""


Order = Begin | Drop | Lockstep | Handled


# --- reports


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change of a device's side.

    Attributes:
        shape: what an adapter has to fit.
        vocabulary: tokens that the model knows.
        max_model_len: positions of a sequence.
        adapter_bytes: bytes of adapters on the device at most.
        cache_blocks: of the key-value cache.
    """

    shape: ModelShape
    vocabulary: int
    max_model_len: int
    adapter_bytes: int
    cache_blocks: int


@dataclass(frozen=True, slots=True)
class Counters:
    """What the device's side counts.

    Attributes:
        cache_used: share of the cache's blocks that running requests hold.
        preemptions: how often a running request had to wait again.
        reused: tokens of prompts that were found computed.
        adapters: the tier of the adapters on the device.
        resident: they, the least recently used first.
        resident_bytes: their bytes.
    """

    cache_used: float = 0.0
    preemptions: int = 0
    reused: int = 0
    adapters: TierCounters = field(default_factory=TierCounters)
    resident: Sequence[AdapterKey] = ()
    resident_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ranked:
    """Of some tokens each one's logarithm and rank, and those of the likeliest in its place.

    Attributes:
        most: how many likeliest.
        ids, values: of each token its own, then theirs.
        ranks: of each token its own.
    """

    most: int
    ids: array[int]
    values: array[float]
    ranks: array[int]

    def __len__(self) -> int:
        return len(self.ranks)

    def after(self, count: int) -> Ranked:
        """The same without the first tokens."""
        skipped = count * (1 + self.most)
        return Ranked(self.most, self.ids[skipped:], self.values[skipped:], self.ranks[count:])

    def __iter__(self) -> Iterator[tuple[Sequence[int], Sequence[float], int]]:
        """Of each token ids and logarithms, its own first, and its rank."""
        for i, rank in enumerate(self.ranks):
            here = slice(i * (1 + self.most), (i + 1) * (1 + self.most))
            yield self.ids[here], self.values[here], rank


@dataclass(slots=True)
class Report:
    """What a step brought, or what else has happened since the last report.

    Attributes:
        ids, tokens, reasons: who has got which token, and as an index of REASONS whether it is the last.
        reused: of sequences that get their first token here, how much of the prompt was found computed.
        waited: of the same, the seconds until they began to run.
        ranked, scored: of sequences that want them, the probabilities of the token, and of further ones of the prompt.
        failed: who has ended by an error.
        let_go: who was dropped.
        step: decoding rows, prompt tokens and seconds of a step.
        answered: of those that have ended, the prompt's tokens that were computed, and the answer's.
        running: how many run.
        failures: steps that have failed since the last one that did not.
        counters: where it is time to tell them.
        awaited: whether no step begins until this is handled.
    """

    ids: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("i"))
    reasons: bytearray = field(default_factory=bytearray)
    reused: dict[int, int] = field(default_factory=dict)
    waited: dict[int, float] = field(default_factory=dict)
    ranked: dict[int, Ranked] = field(default_factory=dict)
    scored: dict[int, Ranked] = field(default_factory=dict)
    failed: list[tuple[int, Exception]] = field(default_factory=list)
    let_go: list[int] = field(default_factory=list)
    step: tuple[int, int, float] | None = None
    answered: list[tuple[int, int]] = field(default_factory=list)
    running: int = 0
    failures: int = 0
    counters: Counters | None = None
    awaited: bool = False

    def add(self, ids: Sequence[int], tokens: Sequence[int], ended: Mapping[int, FinishReason | None]) -> None:
        """Sequences have got tokens: who, which, and of whom it is the last, by their place, and why."""
        before, count = len(self.ids), len(ids)
        self.ids.frombytes(struct.pack(f"{count}q", *ids))  # `extend` takes five times as long
        self.tokens.frombytes(struct.pack(f"{count}i", *tokens))
        self.reasons.extend(bytes(count))
        for place, reason in ended.items():
            self.reasons[before + place] = REASONS.index(reason)

    @property
    def events(self) -> Iterator[tuple[int, int, FinishReason | None]]:
        """The tokens: of whom, which, and why it is the last."""
        return zip(self.ids, self.tokens, map(REASONS.__getitem__, self.reasons), strict=True)

    @property
    def ended(self) -> list[int]:
        """Who has ended, however it did."""
        done = [id for id, reason in zip(self.ids, self.reasons, strict=True) if reason]
        return done + [id for id, _ in self.failed] + self.let_go

    @property
    def outcomes(self) -> bool:
        """Whether it says anything of any sequence."""
        return bool(self.ids or self.scored or self.failed or self.let_go)
