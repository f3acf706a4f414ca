"""Which tokens the next step processes. Pure Python: no tensors, no threads, no clocks.

There are no phases: a running sequence has positions whose keys and values are computed, and tokens to come after
them; each step gives every sequence that decodes its one token, and pieces of prompts what is left of the budget.
Steps may be planned ahead: a step's tokens need not be known when the next is planned, and a sequence that turns out to
have ended is dropped then. So is what was planned after a token that is refused: the sequence goes on from the token
before. An answer that is held to a grammar and does not take the likeliest token is in no step between the one that
computes its next token's chances and the choice of that token, which follows when it is known what may come. Knows
nothing of text, models or devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lorauter.engine.blocks import BLOCK, BlockPool, Parent, blocks_of
from lorauter.engine.plan import NOT_FINITE, REFUSED, AdapterKey, Choice, Mixture, Piece, RowStart, StepPlan
from lorauter.engine.types import FinishReason, SamplingParams

_MOST_TARGETS = 256  # of a step: each takes a row of logits


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
    """

    tokens: list[int]
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
    coming: int = 0  # tokens that steps and choices on their way bring
    void: int = 0  # further ones that follow a refused one
    blocks: list[int] = field(default_factory=list)
    published: int = 0  # blocks that may be found by others
    parent: Parent = None
    passed_over: int = 0  # how many later requests were admitted before it

    def __post_init__(self) -> None:
        self.chosen = self.sampling.is_held and not self.sampling.greedy


class Event(NamedTuple):
    """A sequence has got a token, the one that ends it if there is a reason; NOT_FINITE has none, and ends it.

    `place` is the token's among those of its step.
    """

    sequence: ActiveSequence
    token: int
    reason: FinishReason | None
    place: int


class AdapterRoom(Protocol):
    """Where adapters are that running sequences use."""

    def has(self, mixture: Mixture) -> bool:
        """Whether all of them are there."""

    def acquire(self, sequence: ActiveSequence, wanted_soon: Container[AdapterKey]) -> bool:
        """Bring them there to stay; False if that takes until a later step, or running sequences hold the room.

        Raises:
            LorauterError: it can never be done.
        """

    def prepare(self, sequence: ActiveSequence) -> None:
        """Begin what `acquire` would, if there is room, for a sequence that may be the next but one."""

    def release(self, sequence: ActiveSequence) -> None:
        """Undo `acquire`, also one that has returned False."""


class Scheduler:
    """Waiting and running sequences, their rows and blocks.

    Args:
        rows: sequences that run at once at most.
        pool: the cache's blocks; a sequence of full length fits it alone.
        room: for adapters.
        budget: tokens in a step at most, given how many rows decode in it; more than those.
        reuse: whether computed blocks are found by sequences that begin alike.
        failed: is told a sequence that can never be admitted, and why.

    Attributes:
        waiting, running: sequences, the latter in the order of their admission.
        preemptions: how often a running sequence had to wait again, since the cache was full.
        reused: positions that were found computed, of all prompts so far.
    """

    def __init__(
        self,
        rows: int,
        pool: BlockPool,
        room: AdapterRoom,
        budget: Callable[[int], int],
        *,
        reuse: bool = True,
        failed: Callable[[ActiveSequence, Exception], None],
    ) -> None:
        self._pool = pool
        self._room = room
        self._budget = budget
        self._reuse = reuse
        self._failed = failed
        self._max_rows = rows
        self._free_rows = list(range(rows - 1, -1, -1))
        self._left_rows: list[int] = []  # since the last plan
        self.waiting: deque[ActiveSequence] = deque()
        self.running: list[ActiveSequence] = []
        self._flights: deque[_Flight] = deque()
        self.preemptions = 0
        self.reused = 0

    @property
    def cache_used(self) -> float:
        """Share of the blocks that running sequences hold."""
        return 1 - self._pool.free / self._pool.size

    # --- planning

    @property
    def undecided(self) -> list[ActiveSequence]:
        """Running sequences that wait until it is known what may come: for `resume` where the likeliest token is taken,
        else for `choose`."""
        return [sequence for sequence in self.running if sequence.undecided]

    def choose(self, sequences: Sequence[ActiveSequence]) -> list[Choice]:
        """Have the next tokens of these, which are undecided, chosen after the steps that are planned so far: `take`
        brings them in its turn, as a step's."""
        choices = []
        for sequence in sequences:
            assert sequence.row is not None
            sequence.undecided = False
            sequence.coming += 1
            choices.append(Choice(sequence.row, sequence.computed))
        self._flights.append(_Flight(list(sequences), []))
        return choices

    def resume(self, sequence: ActiveSequence) -> None:
        """Compute the chances of a refused token again, as it is known now what may come."""
        sequence.undecided = False

    @property
    def decided(self) -> Sequence[ActiveSequence]:
        """Whose tokens the oldest step or choice on its way brings, in their order."""
        return self._flights[0].decided

    def plan(self) -> StepPlan | None:
        """The next step, or None if there is nothing to process before a token that is on its way has come."""
        step = _Step()
        before = self.preemptions
        prompts = []
        for sequence in list(self.running):
            left = 0 if sequence.undecided else _left(sequence)
            if left > 1:
                prompts.append(sequence)
                continue
            has_block = sequence.computed < len(sequence.blocks) * BLOCK  # most have
            if left and sequence.row is not None and (has_block or self._grow(sequence, step)):
                if sequence.sampling.prompt_logprobs is None:
                    self._decode(sequence, sequence.row, step)
                else:
                    self._process(sequence, 1, step)
        budget = self._budget(len(step.decoding)) - len(step.decoding)
        for sequence in prompts:
            if sequence.row is not None and budget > 0:
                budget -= self._process(sequence, budget, step)
        # Who was preempted may not come back at once: tokens of its own may be on their way.
        while budget > 0 and self.preemptions == before and (admitted := self._admit()) is not None:
            row = admitted.row
            assert row is not None
            step.starts.append(
                RowStart(
                    row,
                    admitted.mixture,
                    admitted.sampling,
                    admitted.seed,
                    admitted.prompt,
                    tuple(admitted.tokens),
                    admitted.ends,
                )
            )
            step.blocks += [(row, place, block) for place, block in enumerate(admitted.blocks)]
            budget -= self._process(admitted, budget, step)
        if not step.decoding and not step.prompts:
            return None
        self._flights.append(_Flight([*step.decided, *step.decided_prompts], [*step.scored, *step.scored_prompts]))
        rows, self._left_rows = self._left_rows, []
        return StepPlan(rows, step.starts, step.blocks, step.decoding, step.prompts)

    def _decode(self, sequence: ActiveSequence, row: int, step: _Step) -> None:
        """What `_process` does with the last token of a sequence: most of what there is to do."""
        start = sequence.computed
        step.decoding.append(Piece(row, start, sequence.tokens[start:], True, (), sequence.chosen))
        sequence.computed = start + 1
        if sequence.chosen:
            sequence.undecided = True
        else:
            step.decided.append(sequence)
            sequence.coming += 1
        if (start + 1) // BLOCK > sequence.published:
            self._publish(sequence)

    def _process(self, sequence: ActiveSequence, most: int, step: _Step) -> int:
        """Let the step process the next tokens of a running sequence; returns how many."""
        count = min(most, _left(sequence))
        start, known = sequence.computed, len(sequence.tokens)
        scores = _scores(sequence) and start + 1 < sequence.prompt
        if scores:
            count = min(count, step.targets)
            if not count:
                return 0
        end = start + count
        samples = end == known + sequence.coming
        targets = sequence.tokens[start + 1 : min(end + 1, sequence.prompt)] if scores else ()
        assert sequence.row is not None
        known_tokens = sequence.tokens[start:end] if start < known else ()
        held = samples and sequence.chosen
        piece = Piece(sequence.row, start, known_tokens, samples, targets, held)
        (step.decoding if count == 1 else step.prompts).append(piece)
        sequence.computed = end
        if targets:
            step.targets -= len(targets)
            (step.scored if count == 1 else step.scored_prompts).append((sequence, start))
        if held:
            sequence.undecided = True
        elif samples:
            (step.decided if count == 1 else step.decided_prompts).append(sequence)
            sequence.coming += 1
        self._publish(sequence)
        return count

    def _grow(self, sequence: ActiveSequence, step: _Step) -> bool:
        """Give a sequence that has none the block of its next position, if need be the youngest's; False if it is the
        youngest."""
        place = sequence.computed // BLOCK
        while (blocks := self._pool.take(1)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += blocks
        assert sequence.row is not None
        step.blocks.append((sequence.row, place, blocks[0]))
        return True

    def _publish(self, sequence: ActiveSequence) -> None:
        """Let others find the full blocks whose tokens are known, once a step that fills them is planned.

        The step's keys and values are written before any of its tokens attends, so this very step may use them.
        """
        if not self._reuse:
            return
        full = min(sequence.computed, len(sequence.tokens)) // BLOCK
        for place in range(sequence.published, full):
            tokens = sequence.tokens[place * BLOCK : (place + 1) * BLOCK]
            sequence.parent = self._pool.publish(sequence.parent, tokens, sequence.blocks[place])
        sequence.published = max(full, sequence.published)

    # --- admission

    def _admit(self) -> ActiveSequence | None:
        """The next waiting sequence, now running, if there is a row, and room for it and its adapters.

        First come, first served, but while one waits for its adapters, later ones whose adapters are all there go
        before it (loading for them would only take more room): as many as there are rows, then it is next.
        """
        blocked: list[ActiveSequence] = []
        for sequence in self.waiting:
            if not self._free_rows:
                return None
            if blocked and not (blocked[0].passed_over < self._max_rows and self._room.has(sequence.mixture)):
                if len(blocked) < len(self._free_rows):  # it may have its turn in the next step
                    self._room.prepare(sequence)
                    blocked.append(sequence)
                continue
            if not self._take_blocks(sequence):
                return None
            try:
                soon = {key for other in blocked or [sequence] for key, _ in other.mixture}
                admitted = self._room.acquire(sequence, soon)
            except Exception as error:  # noqa: BLE001 (this request's trouble alone)
                self._drop_blocks(sequence)
                self.drop(sequence)
                self._failed(sequence, error)
                return self._admit()
            if not admitted:
                self._drop_blocks(sequence)
                blocked.append(sequence)
                continue
            for other in blocked:
                other.passed_over += 1
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.row = self._free_rows.pop()
            if not sequence.begun:
                sequence.begun, sequence.reused = True, min(sequence.computed, sequence.prompt)
                self.reused += sequence.reused
            return sequence
        return None

    def _take_blocks(self, sequence: ActiveSequence) -> bool:
        """Blocks for all tokens that are known: those found computed, but for the last token's, and free ones."""
        length, root = len(sequence.tokens), (sequence.tenant, sequence.mixture)
        most = (length - 1) // BLOCK if self._reuse and not _scores(sequence) else 0
        found, parent = self._pool.find(root, sequence.tokens, most)
        fresh = self._pool.take(blocks_of(length) - len(found))
        if fresh is None:
            self._pool.release(found)
            return False
        sequence.blocks = found + fresh
        sequence.parent, sequence.published, sequence.computed = parent, len(found), len(found) * BLOCK
        return True

    def _drop_blocks(self, sequence: ActiveSequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks, sequence.published, sequence.computed = [], 0, 0

    # --- leaving

    def scored(self) -> list[tuple[ActiveSequence, int]]:
        """Whose prompts' tokens the oldest step on its way scores, and from which position on, in the order of
        `StepPlan.scored`."""
        return self._flights[0].scored

    def take(self, tokens: Sequence[int]) -> list[Event]:
        """The tokens of the oldest step or choice on its way, in the order of its plan; what has ended is let go."""
        events = []
        decided = self._flights.popleft().decided
        for place, (sequence, token) in enumerate(zip(decided, tokens, strict=True)):
            if sequence.ended:  # by the step before
                continue
            if sequence.void:
                sequence.void -= 1
                continue
            sequence.coming -= 1
            if token == REFUSED:
                self._refuse(sequence)
                continue
            reason: FinishReason | None = None
            if token == NOT_FINITE:
                sequence.ended = True
                self._pool.forget(sequence.blocks)
            else:
                sequence.tokens.append(token)
                if token in sequence.ends:
                    reason = "stop"
                elif len(sequence.tokens) >= sequence.limit:
                    reason = "length"
                sequence.ended = reason is not None
                if not len(sequence.tokens) % BLOCK:
                    self._publish(sequence)
            events.append(Event(sequence, token, reason, place))
            if sequence.ended:
                self._let_go(sequence)
        return events

    def _refuse(self, sequence: ActiveSequence) -> None:
        """What was planned on a token is of no use, and neither is what that brings."""
        sequence.void, sequence.coming = sequence.coming, 0
        if sequence.row is not None:
            sequence.computed = len(sequence.tokens) - 1
            sequence.undecided = True

    def abandon(self) -> list[ActiveSequence]:
        """After a step that failed: forget steps on their way and all that was computed; who ran has ended."""
        ended = list(self.running)
        for sequence in ended:
            self.drop(sequence)
        self._flights.clear()
        self._left_rows = list(range(self._max_rows))  # also of the plan that failed
        for sequence in self.waiting:
            sequence.coming = sequence.void = 0
        self._pool.forget()
        return ended

    def forget(self) -> None:
        """Let nothing that was computed so far be found any more."""
        self._pool.forget()

    def drop(self, sequence: ActiveSequence) -> None:
        """Let a sequence go, whatever it has; of no effect on one that has ended."""
        if not sequence.ended:
            sequence.ended = True
            self._let_go(sequence)

    def _preempt(self, sequence: ActiveSequence) -> None:
        """Let a running sequence wait again, before all others; what it has is computed again."""
        self.preemptions += 1
        self._leave_row(sequence)
        self.waiting.appendleft(sequence)

    def _let_go(self, sequence: ActiveSequence) -> None:
        if sequence.row is None:
            self.waiting.remove(sequence)
            self._room.release(sequence)
        else:
            self._leave_row(sequence)

    def _leave_row(self, sequence: ActiveSequence) -> None:
        assert sequence.row is not None
        self.running = [other for other in self.running if other is not sequence]
        self._free_rows.append(sequence.row)
        self._left_rows.append(sequence.row)
        sequence.row, sequence.undecided = None, False
        self._drop_blocks(sequence)
        self._room.release(sequence)


@dataclass(slots=True)
class _Step:
    """A step in the making: what `StepPlan` has, and who gets the tokens and scores of its pieces."""

    starts: list[RowStart] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    decoding: list[Piece] = field(default_factory=list)
    prompts: list[Piece] = field(default_factory=list)
    decided: list[ActiveSequence] = field(default_factory=list)
    decided_prompts: list[ActiveSequence] = field(default_factory=list)
    scored: list[tuple[ActiveSequence, int]] = field(default_factory=list)
    scored_prompts: list[tuple[ActiveSequence, int]] = field(default_factory=list)
    targets: int = _MOST_TARGETS  # that there is room for


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step or choice that is on its way: who gets its tokens, and its scores."""

    decided: list[ActiveSequence]
    scored: list[tuple[ActiveSequence, int]]


def _left(sequence: ActiveSequence) -> int:
    """How many tokens are there to process, those on their way included; none of a sequence that will be full."""
    length = len(sequence.tokens) + sequence.coming
    return 0 if length >= sequence.limit else length - sequence.computed


def _scores(sequence: ActiveSequence) -> bool:
    """Whether probabilities of its prompt's tokens are wanted yet."""
    return sequence.sampling.prompt_logprobs is not None and sequence.told + 1 < sequence.prompt
