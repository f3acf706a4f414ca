"""Which tokens the next step processes. No tensors, no threads, no clocks.

There are no phases: a running sequence has positions whose keys and values are computed, and tokens to come after
them; each step gives every sequence that decodes its one token, and pieces of prompts what is left of the budget.
Steps may be planned ahead: a step's tokens need not be known when the next is planned, and a sequence that turns out to
have ended is dropped then. So is what was planned after a token that is refused: the sequence goes on from the token
before. Sequences that merely decode are in lanes, which advance together until one needs a block, or its last token is
next. An answer that is held to a grammar and does not take the likeliest token is in no step between the one that
computes its next token's chances and the choice of that token, which follows when it is known what may come. Knows
nothing of text, models or devices.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lorauter.engine.blocks import BLOCK, BlockPool, blocks_of
from lorauter.engine.plan import REFUSED, AdapterKey, Choice, Decoding, Mixture, Piece, RowStart, StepPlan
from lorauter.engine.sequences import ActiveSequence, Came, Lanes
from lorauter.engine.types import FinishReason

_MOST_TARGETS = 256  # of a step: each takes a row of logits
_NOTHING = array("i")


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
        self._planned = 0  # steps
        self._admitted = 0  # sequences
        self._ends: set[int] = set()  # tokens that may end one that runs
        self._lanes: Lanes | None = None  # None where they have changed, or those beside them
        self._beside: list[ActiveSequence] = []
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
            sequence.expected += 1
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

    def is_void(self, sequence: ActiveSequence) -> bool:
        """Whether what these bring of a sequence is of no use: it has ended, or a token before was refused."""
        return sequence in self._flights[0].gone

    def plan(self) -> StepPlan | None:
        """The next step, or None if there is nothing to process before a token that is on its way has come."""
        step = _Step()
        before = self.preemptions
        lanes = self._make_room(step)
        starts = lanes.starts(self._planned)
        self._planned += 1
        prompts = []
        for sequence in self._beside:
            left = 0 if sequence.undecided else sequence.left
            if left > 1:
                prompts.append(sequence)
            elif left:
                self._process(sequence, 1, step)
        decoding = len(starts) + len(step.decoding)
        budget = self._budget(decoding) - decoding
        for sequence in prompts:
            if budget > 0:
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
                    admitted.tokens[:],
                    admitted.ends,
                )
            )
            step.blocks.append((row, 0, admitted.blocks[:]))
            budget -= self._process(admitted, budget, step)
        decodes = Decoding(lanes.rows, starts, step.decoding)
        if not decodes and not step.prompts:
            return None
        decided = [*lanes.sequences, *step.decided, *step.decided_prompts]
        self._flights.append(_Flight(decided, [*step.scored, *step.scored_prompts], lanes.appends))
        rows, self._left_rows = self._left_rows, []
        return StepPlan(rows, step.starts, step.blocks, decodes, step.prompts)

    def _make_room(self, step: _Step) -> Lanes:
        """Give blocks to all who decode and have none for their next position, the oldest first; and the lanes of those
        who merely decode in this step."""
        if self._lanes is None:  # else those who are due tell
            self._leave_full(self.running)
        lanes = self._gathered()
        due = lanes.due(self._planned)
        if self._leave_full([lanes.sequences[place] for place in due]):
            lanes = self._gathered()
            due = lanes.due(self._planned)
        needy = [lanes.sequences[place] for place in due]
        needy += [one for one in self._beside if not one.undecided and one.left == 1]
        for sequence in sorted(needy, key=lambda one: one.age):
            # An older one may have taken what a younger one had, a row too.
            if sequence.row is not None and sequence.position(self._planned) == len(sequence.blocks) * BLOCK:
                self._grow(sequence, step)
        if self._lanes is lanes and due:
            lanes.renew(due)
        return self._gathered()

    def _gathered(self) -> Lanes:
        """The lanes as they are; `_beside` are the other running sequences."""
        if self._lanes is None:
            self._lanes = Lanes([one for one in self.running if one.joined is not None], self._planned)
            self._beside = [one for one in self.running if one.joined is None]
        return self._lanes

    def _leave_full(self, sequences: Sequence[ActiveSequence]) -> bool:
        """Nobody's last token comes in a lane. Returns whether any of these has left one."""
        now = self._planned
        full = [one for one in sequences if one.joined is not None and one.position(now) >= one.limit - 2]
        for sequence in full:
            self._leave_lane(sequence)
        return bool(full)

    def _leave_lane(self, sequence: ActiveSequence) -> None:
        """A sequence is looked at one by one again, if it was not."""
        if sequence.joined is not None:
            sequence.computed = sequence.position(self._planned)
            sequence.expected = sequence.computed + 1
            sequence.joined = self._lanes = None

    def _process(self, sequence: ActiveSequence, most: int, step: _Step) -> int:
        """Let the step process the next tokens of a running sequence; returns how many."""
        count = min(most, sequence.left)
        start, known = sequence.computed, len(sequence.tokens)
        scores = sequence.scores and start + 1 < sequence.prompt
        if scores:
            count = min(count, step.targets)
            if not count:
                return 0
        end = start + count
        samples = end == sequence.expected
        targets = sequence.tokens[start + 1 : min(end + 1, sequence.prompt)] if scores else _NOTHING
        assert sequence.row is not None
        known_tokens = sequence.tokens[start:end] if start < known else _NOTHING
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
            sequence.expected += 1
            if sequence.expected < sequence.limit - 1:  # then it merely decodes from the next step on
                sequence.joined, self._lanes = self._planned, None
                sequence.set_stop()
        self._publish(sequence)
        return count

    def _grow(self, sequence: ActiveSequence, step: _Step) -> None:
        """Give a sequence the block of its next position, if need be the youngest's, which may be itself."""
        self._publish(sequence)
        while (blocks := self._pool.take(1)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return
        assert sequence.row is not None
        step.blocks.append((sequence.row, len(sequence.blocks), blocks))
        sequence.blocks += blocks
        sequence.set_stop()

    def _publish(self, sequence: ActiveSequence) -> None:
        """Let others find the full blocks whose tokens are known, once a step that fills them is planned.

        The step's keys and values are written before any of its tokens attends, so this very step may use them.
        """
        if not self._reuse:
            return
        first, full = sequence.published, min(sequence.position(self._planned), len(sequence.tokens)) // BLOCK
        if full > first:
            tokens, blocks = sequence.tokens[first * BLOCK : full * BLOCK], sequence.blocks[first:full]
            sequence.parent, sequence.published = self._pool.publish(sequence.parent, tokens, blocks), full

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
            if not self.running:
                self._ends.clear()
            self._ends.update(sequence.ends)
            self.running.append(sequence)
            self._lanes = None
            self._admitted += 1
            sequence.row, sequence.age = self._free_rows.pop(), self._admitted
            if not sequence.begun:
                sequence.begun, sequence.reused = True, min(sequence.computed, sequence.prompt)
                self.reused += sequence.reused
            return sequence
        return None

    def _take_blocks(self, sequence: ActiveSequence) -> bool:
        """Blocks for all tokens that are known: those found computed, but for the last token's, and free ones."""
        length, root = len(sequence.tokens), (sequence.tenant, sequence.mixture)
        most = (length - 1) // BLOCK if self._reuse and not sequence.scores else 0
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

    def take(self, tokens: Sequence[int]) -> Came:
        """The tokens of the oldest step or choice on its way, in the order of its plan; what has ended is let go."""
        flight = self._flights.popleft()
        sequences: Sequence[ActiveSequence] = flight.decided
        places: list[int] | None = None
        if flight.gone or REFUSED in tokens:
            places = []
            for place, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
                if sequence in flight.gone:
                    continue
                if token == REFUSED:
                    self._refuse(sequence)
                else:
                    places.append(place)
            sequences, tokens = [sequences[place] for place in places], [tokens[place] for place in places]
        ended: dict[int, FinishReason | None] = {}
        steady = 0
        if places is None and min(tokens, default=0) >= 0 and self._ends.isdisjoint(tokens):
            steady = len(flight.steady)  # nobody's last token comes in a lane
            for append, token in zip(flight.steady, tokens, strict=False):
                append(token)
        for i in range(steady, len(sequences)):
            sequence, token = sequences[i], tokens[i]
            if token < 0:
                ended[i] = None
                continue
            sequence.tokens.append(token)
            if token in sequence.ends:
                ended[i] = "stop"
            elif len(sequence.tokens) >= sequence.limit:
                ended[i] = "length"
        for i, reason in ended.items():
            sequence = sequences[i]
            if reason is None:
                self._pool.forget(sequence.blocks)
            else:
                self._publish(sequence)
            sequence.ended = True
            self._let_go(sequence)
        return Came(sequences, tokens, ended, places)

    def _refuse(self, sequence: ActiveSequence) -> None:
        """What was planned on a token is of no use, and neither is what that brings."""
        self._void(sequence)
        self._leave_lane(sequence)
        sequence.expected = len(sequence.tokens)
        if sequence.row is not None:
            sequence.computed = len(sequence.tokens) - 1
            sequence.undecided = True

    def _void(self, sequence: ActiveSequence) -> None:
        """Nobody takes what is on its way for a sequence."""
        for flight in self._flights:
            flight.gone.add(sequence)

    def abandon(self) -> list[ActiveSequence]:
        """After a step that failed: forget steps on their way and all that was computed; who ran has ended."""
        ended = list(self.running)
        for sequence in ended:
            self.drop(sequence)
        self._flights.clear()
        self._left_rows = list(range(self._max_rows))  # also of the plan that failed
        for sequence in self.waiting:
            sequence.expected = len(sequence.tokens)
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
        self._void(sequence)
        if sequence.row is None:
            self.waiting.remove(sequence)
            self._room.release(sequence)
        else:
            self._leave_row(sequence)

    def _leave_row(self, sequence: ActiveSequence) -> None:
        assert sequence.row is not None
        self._leave_lane(sequence)
        self.running.remove(sequence)
        self._lanes = None
        self._free_rows.append(sequence.row)
        self._left_rows.append(sequence.row)
        sequence.row, sequence.undecided = None, False
        self._drop_blocks(sequence)
        self._room.release(sequence)


@dataclass(slots=True)
class _Step:
    """A step in the making: what `StepPlan` has beside the lanes, and who gets the tokens and scores of its pieces."""

    starts: list[RowStart] = field(default_factory=list)
    blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    decoding: list[Piece] = field(default_factory=list)
    prompts: list[Piece] = field(default_factory=list)
    decided: list[ActiveSequence] = field(default_factory=list)
    decided_prompts: list[ActiveSequence] = field(default_factory=list)
    scored: list[tuple[ActiveSequence, int]] = field(default_factory=list)
    scored_prompts: list[tuple[ActiveSequence, int]] = field(default_factory=list)
    targets: int = _MOST_TARGETS  # that there is room for


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step or choice that is on its way: who gets its tokens, and its scores; what takes the tokens of the lanes,
    which come first; and for whom it has no use any more."""

    decided: list[ActiveSequence]
    scored: list[tuple[ActiveSequence, int]]
    steady: list[Callable[[int], None]] = field(default_factory=list)
    gone: set[ActiveSequence] = field(default_factory=set)
