"""What is planned: pure decisions, driven by a model that only counts."""

import random
import zlib
from array import array
from dataclasses import dataclass, field

import pytest

from lorauter.engine.blocks import BLOCK, BlockPool
from lorauter.engine.plan import NOT_FINITE, REFUSED
from lorauter.engine.scheduler import Scheduler
from lorauter.engine.sequences import ActiveSequence
from lorauter.engine.types import Grammar, SamplingParams


class Room:
    """Adapters by name, so many at once; counts what is held."""

    def __init__(self, size=100):
        self.size = size
        self.held: dict[int, set[str]] = {}
        self.there: set[str] = set()

    def has(self, mixture):
        return {name for (name, _), _ in mixture} <= self.there

    def acquire(self, sequence, wanted_soon):
        wanted = {name for (name, _), _ in sequence.mixture}
        if "broken" in wanted:
            raise ValueError("broken")
        pinned = set().union(*self.held.values()) if self.held else set()
        if len(pinned | wanted) > self.size:
            return False
        self.there = pinned | wanted
        self.held[id(sequence)] = wanted
        return True

    def prepare(self, sequence):
        return

    def release(self, sequence):
        self.held.pop(id(sequence), None)


@dataclass
class Device:
    """Checks that what a plan reads has been written, and by whom; the next token is the sum of all before."""

    rows: int
    cache: dict[tuple[int, int], tuple[object, int]] = field(default_factory=dict)  # (block, place): root, token
    tables: dict[int, dict[int, int]] = field(default_factory=dict)
    roots: dict[int, object] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)  # position and token of what is open
    guessing: set[int] = field(default_factory=set)  # rows whose tokens may be wrong ones
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    most: int = 0

    def run(self, plan, ends=()):
        for row in plan.left:
            self.roots.pop(row, None)
        for start in plan.starts:
            assert start.row not in self.roots, "two sequences have one row"
            self.roots[start.row], self.tables[start.row] = start.mixture, {}
            (self.guessing.add if start.sampling is GUESSED else self.guessing.discard)(start.row)
        for row, place, blocks in plan.blocks:
            assert all(blocks), "block 0 is nobody's"
            self.tables[row] |= dict(enumerate(blocks, place))
        pieces = [*plan.decoding, *plan.prompts]
        assert len({piece.row for piece in pieces}) == len(pieces) <= self.rows
        assert all(piece.size == 1 for piece in plan.decoding)
        assert all(piece.size > 1 for piece in plan.prompts)
        self.most = max(self.most, sum(piece.size for piece in plan.prompts))
        for piece in pieces:  # all keys are written before anybody attends
            for i, token in enumerate(piece.tokens or [self.last[piece.row]]):
                block, place = self._where(piece.row, piece.start + i)
                self.cache[block, place] = self.roots[piece.row], token
        tokens = []
        for piece in plan.sampled:
            end = piece.start + piece.size
            seen = [self.cache[self._where(piece.row, position)] for position in range(end)]
            assert all(root == self.roots[piece.row] for root, _ in seen), "computed under another mixture"
            token = answer_of(self.roots[piece.row], [token for _, token in seen])
            if piece.held:
                self.kept[piece.row] = end, token
                continue
            if piece.row in self.guessing and self.draw.random() < 0.3:
                token += WRONG
            tokens.append(token)
            self.last[piece.row] = max(token, 0)
        return tokens

    def choose(self, choices):
        tokens = []
        for choice in choices:
            position, token = self.kept.pop(choice.row)
            assert position == choice.position
            tokens.append(token)
            self.last[choice.row] = max(token, 0)
        return tokens

    def _where(self, row, position):
        return self.tables[row][position // BLOCK], position % BLOCK


WRONG = 1000
GUESSED = SamplingParams(grammar=Grammar("regex", "a"))
HELD = SamplingParams(temperature=1.0, grammar=Grammar("regex", "a"))


def answer_of(root, tokens):
    """The next token; one in forty ends the answer, and few are not finite."""
    number = zlib.crc32(repr((root, sum((i + 1) * token for i, token in enumerate(tokens)))).encode()) % 1000
    return NOT_FINITE if number == 999 else number % 40


def expected(sequence_tokens, root, limit):
    tokens = list(sequence_tokens)
    while True:
        token = answer_of(root, tokens)
        tokens.append(token)
        if token in (0, NOT_FINITE) or len(tokens) >= limit:
            return tokens


def make(scheduler, tokens, limit, mixture=(), sampling=None):
    sequence = ActiveSequence(array("i", tokens), len(tokens), limit, mixture, sampling or SamplingParams(), ends=(0,))
    scheduler.waiting.append(sequence)
    return sequence


def decide(scheduler, device, flights, sequences):
    for sequence in sequences:
        if sequence.sampling is GUESSED:
            scheduler.resume(sequence)
    if held := [sequence for sequence in sequences if sequence.sampling is HELD]:
        flights.append(device.choose(scheduler.choose(held)))


def checked(tokens):
    return [REFUSED if token >= WRONG - 1 else token for token in tokens]


def drive(scheduler, device, *, ahead, until=lambda: False):
    """Run until nothing is left; `ahead` steps are planned before the tokens of the first are known."""
    flights, events, steps = [], [], 0
    while not until():
        decide(scheduler, device, flights, scheduler.undecided)
        plan = scheduler.plan()
        if plan is not None:
            flights.append(device.run(plan))
            steps += 1
        if not flights:
            break
        while len(flights) > (ahead if plan is not None else 0):
            events += scheduler.take(checked(flights.pop(0)))
        assert steps < 20_000
    return events


def scheduler_of(rows=4, blocks=64, budget=lambda decoding: decoding + 16, room=None, failed=None, **options):
    failures = [] if failed is None else failed
    return Scheduler(
        rows, BlockPool(blocks), room or Room(), budget, failed=lambda s, e: failures.append((s, e)), **options
    )


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_everybody_gets_the_tokens_that_are_theirs_whatever_comes_between(seed, reuse, ahead):
    """Random arrivals, cancellations, failures, mixtures and forms, too small a cache, and prompts that begin alike."""
    draw = random.Random(seed)
    blocks = draw.choice([8, 12, 40])
    room, failed = Room(draw.choice([1, 2, 9])), []
    scheduler = scheduler_of(5, blocks, room=room, reuse=reuse, failed=failed)
    device, flights = Device(5), []
    beginnings = [[draw.randrange(1, 40) for _ in range(60)] for _ in range(3)]
    mixtures = [(), (), ((("a", "1"), 1.0),), ((("a", "1"), 0.5), (("b", "1"), 0.5)), ((("broken", "1"), 1.0),)]
    wanted, cancelled, ruined = {}, set(), set()
    for _ in range(600):
        if draw.random() < 0.3 and len(wanted) < 60:
            tokens = [*draw.choice(beginnings)[: draw.randint(1, 60)], draw.randrange(1, 40)]
            mixture = draw.choice(mixtures)
            if "broken" in str(mixture) or len({n for (n, _), _ in mixture}) <= room.size:
                limit = min(blocks * BLOCK, len(tokens) + draw.randint(1, 40))
                sequence = make(scheduler, tokens, limit, mixture, draw.choice([None, HELD, GUESSED]))
                wanted[sequence] = expected(tokens, mixture, limit)
        if draw.random() < 0.05 and (left := [s for s in wanted if not s.ended]):
            victim = draw.choice(left)
            cancelled.add(victim)
            scheduler.drop(victim)
        if draw.random() < 0.01:
            ruined.update(scheduler.abandon())
            flights.clear()
            device.cache.clear()
        decide(scheduler, device, flights, [sequence for sequence in scheduler.undecided if draw.random() < 0.7])
        plan = scheduler.plan()
        if plan is not None:
            flights.append(device.run(plan))
        while len(flights) > (ahead if plan is not None else 0):
            scheduler.take(checked(flights.pop(0)))
    while flights:
        scheduler.take(checked(flights.pop(0)))
    drive(scheduler, device, ahead=ahead)
    told = {sequence for sequence, _ in failed}
    assert not scheduler.running
    assert not scheduler.waiting
    assert not room.held, "adapters are held for nobody"
    assert scheduler._pool.free == blocks, "blocks are held by nobody"
    for sequence, tokens in wanted.items():
        assert sequence.ended
        if "broken" in str(sequence.mixture):
            assert sequence in told | cancelled
        elif sequence not in cancelled | ruined:
            assert list(sequence.tokens) == [token for token in tokens if token != NOT_FINITE]
        else:
            assert list(sequence.tokens) == tokens[: len(sequence.tokens)]


def test_who_waits_for_its_choice_is_in_no_step_and_keeps_nobody_out():
    scheduler, device = scheduler_of(), Device(4)
    held, free = make(scheduler, [5, 6], 60, sampling=HELD), make(scheduler, [7, 8], 60)
    scheduler.take(device.run(scheduler.plan()))
    assert scheduler.undecided == [held]
    for _ in range(3):
        plan = scheduler.plan()
        assert [piece.row for piece in plan.decoding] == [free.row]
        scheduler.take(device.run(plan))
    choices = scheduler.choose(scheduler.undecided)
    plan = scheduler.plan()  # its token is not known yet
    assert {piece.row for piece in plan.decoding} == {free.row, held.row}
    (event,) = scheduler.take(device.choose(choices))
    assert (event.sequence, list(held.tokens)) == (held, [5, 6, event.token])


def test_a_token_that_is_refused_takes_what_was_planned_on_it_along():
    scheduler, device = scheduler_of(), Device(4)
    guessed, free = make(scheduler, [5, 6], 60, sampling=GUESSED), make(scheduler, [7, 8], 60)
    first = device.run(scheduler.plan())
    ahead = device.run(scheduler.plan())
    (event,) = scheduler.take([REFUSED, first[1]])
    assert (event.sequence, list(guessed.tokens), scheduler.undecided) == (free, [5, 6], [guessed])
    plan = scheduler.plan()
    assert [piece.row for piece in plan.decoding] == [free.row]
    (event,) = scheduler.take(ahead)  # the other one's was made of a token that may not come
    assert (event.sequence, list(guessed.tokens)) == (free, [5, 6])
    scheduler.take(device.run(plan))
    scheduler.resume(guessed)
    plan = scheduler.plan()
    assert [(piece.start, list(piece.tokens)) for piece in plan.decoding if piece.row == guessed.row] == [(1, [6])]
    events = scheduler.take([9, 9])
    assert [event.sequence for event in events] == [free, guessed]
    assert list(guessed.tokens) == [5, 6, 9]


def test_decoding_rows_are_in_every_step_and_prompts_share_what_is_left():
    scheduler, device = scheduler_of(4, 64, lambda decoding: decoding + 10), Device(4)
    short = make(scheduler, [5], 40)
    plan = scheduler.plan()
    scheduler.take(device.run(plan))
    long = [make(scheduler, [7] * 45, 50), make(scheduler, [8] * 25, 50)]
    for _ in range(8):
        plan = scheduler.plan()
        assert any(piece.row == short.row for piece in plan.decoding)
        assert sum(piece.size for piece in plan.prompts) <= 10
        scheduler.take(device.run(plan))
    assert all(len(sequence.tokens) > sequence.prompt for sequence in long)


def test_a_prompt_that_begins_like_another_takes_what_is_computed():
    scheduler, device = scheduler_of(4, 64, lambda decoding: 4096), Device(4)
    beginning = list(range(1, 3 * BLOCK + 3))
    first = make(scheduler, [*beginning, 1], 60)
    others = [make(scheduler, [*beginning, 2 + i], 60) for i in range(3)]
    plan = scheduler.plan()  # in the very step that computes it
    assert sorted(piece.size for piece in plan.prompts) == [3, 3, 3, len(beginning) + 1]
    assert (first.reused, [other.reused for other in others]) == (0, [3 * BLOCK] * 3)
    assert scheduler.reused == 9 * BLOCK
    scheduler.take(device.run(plan))
    drive(scheduler, device, ahead=1)
    same = make(scheduler, beginning[: 3 * BLOCK], 60)  # its last token has to be computed, or nothing comes
    assert [piece.size for piece in scheduler.plan().prompts] == [BLOCK]
    assert same.reused == 2 * BLOCK


def test_out_of_blocks_the_youngest_waits_again_and_loses_nothing():
    scheduler, device = scheduler_of(3, 5, lambda decoding: 64), Device(3)
    old, young = make(scheduler, [3] * 20, 70), make(scheduler, [4] * 20, 60)
    wanted = [expected(s.tokens, (), s.limit) for s in (old, young)]
    drive(scheduler, device, ahead=1)
    assert [list(old.tokens), list(young.tokens)] == wanted
    if max(map(len, wanted)) > 48:
        assert scheduler.preemptions


def test_a_sequence_that_will_be_full_is_planned_no_further():
    scheduler, device = scheduler_of(), Device(4)
    make(scheduler, [5, 6], 3)
    tokens = device.run(scheduler.plan())
    assert scheduler.plan() is None
    (event,) = scheduler.take(tokens)
    assert event.reason == ("stop" if event.token == 0 else "length")


def test_who_waits_for_adapters_is_passed_by_others_but_not_for_ever():
    room = Room(1)
    scheduler, device = scheduler_of(2, 64, room=room), Device(2)
    a, b = ((("a", "1"), 1.0),), ((("b", "1"), 1.0),)
    make(scheduler, [1, 1, 1], 60, a)
    scheduler.take(device.run(scheduler.plan()))
    blocked = make(scheduler, [2], 4, b)
    passing = [make(scheduler, [3 + i], 3, a) for i in range(6)]
    drive(scheduler, device, ahead=0, until=lambda: blocked.row is not None or blocked.ended)
    assert blocked.passed_over == 2  # as many as there are rows
    assert not passing[-1].ended


def test_a_lane_is_for_one_token_wherever_it_is_in_the_prompt():
    scheduler, device = scheduler_of(2, 64, lambda decoding: decoding + 10), Device(2)
    make(scheduler, [7] * 11, 20)
    first = scheduler.plan()
    assert [piece.size for piece in first.prompts] == [10]
    scheduler.take(device.run(first))
    second = scheduler.plan()
    assert [(piece.start, piece.samples) for piece in second.decoding] == [(10, True)]
