"""What a GPU's runner captures and which of it a step takes, with stand-ins for graphs, streams and kernels."""

import random
from array import array
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from lorauter.engine import cuda_runner
from lorauter.engine.blocks import BLOCK, BlockPool
from lorauter.engine.cuda_mixtures import CudaMixtures
from lorauter.engine.cuda_own import OWN_GROUPS, OWN_HEAD, OWN_WIDTH
from lorauter.engine.cuda_runner import CudaRunner
from lorauter.engine.cuda_step import CudaStep
from lorauter.engine.plan import Decoding, Piece, RowStart, StepPlan
from lorauter.engine.scheduler import Scheduler
from lorauter.engine.sequences import ActiveSequence
from lorauter.engine.slots import AdapterSlots, pack
from lorauter.engine.types import SamplingParams

ROWS = 4
ATTENTION = {"q_proj", "o_proj"}
FIRSTS = {"q_proj", "o_proj", "gate_proj", "down_proj"}


@pytest.fixture
def runner_for(monkeypatch, pool):
    """A runner of a tiny model whose kernels compute nothing, and whose steps take the given seconds by kind."""
    for name, value in {
        "Stream": MagicMock,
        "Event": MagicMock,
        "CUDAGraph": MagicMock,
        "current_stream": MagicMock,
        "stream": lambda _: nullcontext(),
        "graph": lambda *_, **__: nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(cuda_runner, "to_host", lambda tensor: tensor)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(cuda_runner.kernels, "take_tokens", lambda tokens, *_: torch.zeros_like(tokens))
    monkeypatch.setattr(CudaStep, "begin_lora", lambda *_: None)
    monkeypatch.setattr(
        CudaRunner,
        "_new_mixtures",
        lambda self, rows: CudaMixtures(self._slots.groups, self.decoder.shape.layers, self._slots.arena, rows + 1),
    )
    decoder, measure = pool.decoder("llama"), CudaRunner._seconds

    def make(seconds=lambda size, kind, entries: 2.0 if kind.own else 3.0, budget=1 << 22):
        def timed(self, size, kind, rows):
            measure(self, size, kind, rows)
            return seconds(size, kind, self.mixtures.entries(rows))

        monkeypatch.setattr(CudaRunner, "_seconds", timed)
        slots = AdapterSlots(
            decoder.shape, budget_bytes=budget, max_rank=512, dtype=decoder.dtype, device=decoder.device
        )
        copies = SimpleNamespace(launched=None)
        return CudaRunner(decoder, slots, rows=ROWS, blocks=32, length=96, step_tokens=400, copies=copies, measure=True)

    return make


def taken(runner, hold, mixtures, *, prompt=0):
    """Tokens and kind of the graph that a step takes whose rows have these mixtures, all decoding but the last one if
    that has a prompt of so many tokens."""
    starts, pieces = [], []
    for row, mixture in enumerate(mixtures):
        sequence = hold(runner._slots, mixture)
        assert runner._slots.acquire(sequence)
        starts.append(RowStart(row, sequence.mixture, SamplingParams(), 0, 0, ()))
        pieces.append(Piece(row, 0, [1] * (prompt if prompt and row == len(mixtures) - 1 else 1), samples=True))
    decoding = pieces[: len(pieces) - bool(prompt)]
    for graph in runner._graphs.values():
        graph.graph.replay.reset_mock()
    runner.launch(StepPlan((), starts, [], Decoding(others=decoding), pieces[len(decoding) :]))
    [(size, kind)] = [key for key, graph in runner._graphs.items() if graph.graph.replay.called]
    return size.tokens, kind.adapted, kind.own


def test_each_size_has_its_graphs_and_a_step_takes_the_one_that_changes_enough(runner_for, pool, hold):
    runner = runner_for()
    assert {(size.tokens, kind.own) for size, kind in runner._graphs} >= {(1, True), (256, False), (384, True)}
    attention, mlp = pool.mix((("attention", 1.0),)), pool.mix((("mlp-rslora", 1.0),))
    assert taken(runner, hold, [(), ()]) == (2, frozenset(), False)
    assert taken(runner, hold, [attention, ()]) == (2, FIRSTS, True)
    assert taken(runner, hold, [attention, attention], prompt=200) == (256, FIRSTS, True)
    assert taken(runner, hold, [attention, mlp], prompt=260) == (384, FIRSTS, True)
    assert taken(runner, hold, [(), ()], prompt=260) == (384, frozenset(), False)


def test_rows_of_many_columns_and_sizes_at_which_it_is_slower_take_tiles(runner_for, pool, hold):
    slower_at = 4, 384
    runner = runner_for(lambda size, kind, entries: 2.0 if kind.own != (size.tokens in slower_at) else 3.0)
    attention = pool.mix((("attention", 1.0),))
    assert taken(runner, hold, [attention] * 2) == (2, FIRSTS, True)
    assert taken(runner, hold, [attention] * 3) == (4, ATTENTION, False)
    assert taken(runner, hold, [attention] * 2, prompt=260) == (384, ATTENTION, False)
    mlp = pool.mix((("mlp-rslora", 1.0),))
    assert taken(runner, hold, [attention, mlp], prompt=260) == (384, FIRSTS, False)
    runner.mixtures._listed[0, 1] = 33  # as a row has it that has more columns than its list takes (test_cuda_mixtures)
    assert not runner._kind_of(runner._decode[0], {0}).own
    assert runner._kind_of(runner._decode[0], {1}).own


def test_an_arena_that_is_too_small_to_try_takes_tiles(runner_for, pool, hold):
    runner = runner_for(budget=1 << 14)
    assert taken(runner, hold, [()]) == (1, frozenset(), False)
    assert not runner._own_most


def test_where_lists_are_as_long_as_tiles_take_is_found_between_what_was_tried(runner_for):
    """By lists a step takes a tenth for each entry; by tiles 0.5 where attention alone is adapted, and 3 elsewhere."""
    by_tiles = {True: 3.0, False: 0.5}
    runner = runner_for(lambda _, kind, entries: entries / 10 if kind.own else by_tiles["down_proj" in kind.adapted])
    [size] = [size for size in runner._decode if size.tokens == 2]
    attention, all_layers = runner._tiles
    assert runner._own_most[size, attention] == pytest.approx(5)
    assert runner._own_most[size, all_layers] == pytest.approx(30)
    taken_by = {}
    for entries in (4, 6):
        runner.mixtures._listed[0, 1] = entries
        runner.mixtures._active, runner.mixtures._adapted = ATTENTION, {0}
        taken_by[entries] = runner._kind_of(size, [0])
    assert taken_by == {4: runner._own, 6: attention}


def test_what_takes_twice_as_long_as_all_rows_decoding_is_the_most_beside_them(runner_for):
    runner = runner_for(lambda size, kind, entries: (1.0 if kind.own else 1.5) + (size.queries and size.tokens / 200))
    assert runner.budget(0) >= 400
    assert runner.budget(1) == runner.budget(ROWS) == 192


def test_what_blocks_rows_have_is_written_by_the_step(runner_for, monkeypatch):
    runner = runner_for()
    width, first = runner.memory.table.shape[1], runner._changes.third
    pending, put = runner._changes.pending, []
    monkeypatch.setattr(
        runner._changes, "put", lambda *_: put.append((pending.places.tolist(), pending.values.tolist())) or 0
    )
    pieces = [Piece(2, 0, array("i", [1]), samples=True)]
    runner.launch(StepPlan((), (), [(2, 1, [7, 8]), (3, 0, [9])], Decoding(others=pieces), ()))
    assert put == [([first + 2 * width + 1, first + 2 * width + 2, first + 3 * width], [7, 8, 9])]
    assert not len(pending)


def test_a_step_is_written_as_its_graph_reads_it(runner_for):
    runner = runner_for()
    others = [Piece(0, 5, array("i", [31]), samples=True), Piece(1, 7, array("i", [32]), samples=False)]
    prompts = [Piece(2, 10, array("i", range(40, 60)), samples=True), Piece(3, 0, array("i", [50, 51]), samples=False)]
    decoding = Decoding(np.array([6, 4], np.int32), np.array([17, 33], np.int32), others)
    size = next(size for size in runner._mixed if size.tokens >= 26)
    runner._masked.add(2)
    runner._changes.pending.add({7: 70, runner._changes.third + 2: 9})
    runner._write(runner._staging.take(), size, StepPlan((), (), (), decoding, prompts))
    found = [runner._numbers[start:end].tolist() for start, end in pairwise((0, *size.ends))]
    pad, missing = runner._rows, size.tokens - 26
    assert found[0] == [-1, -1, 31, 32, *range(40, 60), 50, 51, *[0] * missing]
    assert found[1] == [6, 4, 0, 1, *[2] * 20, 3, 3, *[pad] * missing]
    assert found[2] == [17, 33, 5, 7, *range(10, 30), 0, 1, *[0] * missing]
    assert found[3:6] == [[0, 1, 2, 23], [6, 4, 0, 2], [-1, -1, -1, 2]]  # outputs, their rows, and which are held
    assert [found[7][:2], found[8][:2]] == [[7, runner._changes.third + 2], [70, 9]]
    each = cuda_runner.kernels.query_tokens(runner._group)
    blocks = [(4 + start, min(each, 20 - start), 2, 10 + start) for start in range(0, 20, each)]
    queries = [*blocks, (24, 2, 3, 0)]
    assert found[6] == [4, len(queries), 2]
    assert found[9][: 4 * len(queries)] == [number for query in queries for number in query]


@pytest.mark.parametrize("fails", ["of_step", "replay"])
def test_what_a_launch_that_fails_was_to_write_is_written_by_the_next(runner_for, pool, hold, monkeypatch, fails):
    """Else its rows would go on with what they had before, whoever has them."""
    runner = runner_for()
    flats, failing = runner._changes._flats, []
    whole = torch.zeros(sum(map(len, flats)), dtype=torch.int32)

    def fail(name, then):
        def call(*args):
            if name in failing:
                raise RuntimeError(name)
            return then(*args)

        return call

    def write(_, where, values, count):
        whole[where.long()[:count]] = values[:count]

    def replayed(size):
        parts = [runner._numbers[start:end] for start, end in pairwise((0, *size.ends))]
        write(flats, parts[7], parts[8], int(parts[6][2]))

    monkeypatch.setattr(cuda_runner.kernels, "write_changes", write)
    monkeypatch.setattr(runner.mixtures, "of_step", fail("of_step", runner.mixtures.of_step))
    for (size, _), graph in runner._graphs.items():
        graph.graph.replay.side_effect = fail("replay", partial(replayed, size))

    def launch(left, adapters):
        sequence = hold(runner._slots, pool.mix(adapters))
        assert runner._slots.acquire(sequence)
        starts = [RowStart(0, sequence.mixture, SamplingParams(), 0, 0, ())]
        runner.launch(StepPlan(left, starts, (), Decoding(others=[Piece(0, 0, [1], samples=True)]), ()))

    def written():
        """Weights, and how long lists are."""
        weights, own, _ = whole.split([len(flat) for flat in flats])
        return bool(weights.any()), bool(own.view(torch.long).view(-1, OWN_WIDTH)[:, :OWN_HEAD].any())

    launch((), [("attention", 1.0)])
    assert written() == (True, True)
    failing.append(fails)
    with pytest.raises(RuntimeError, match=fails):
        launch([0], [("mlp-rslora", 1.0)])
    failing.clear()
    launch(range(ROWS), [])
    assert written() == (False, False)


# --- what steps read, whatever came before


def as_columns(target, group, layers, a, b, count, weight):
    return [
        (target, a + i * layers * group.inputs, b + i * layers * group.widths[target], weight) for i in range(count)
    ]


def columns_read(mixtures, row, kind):
    """The columns that a step of a kind multiplies for a row, by group: target, places of A and B, and weight."""
    found = {}
    for first, group in mixtures.of_group.items():
        found[first] = own = []
        for target in range(len(group.group.targets)):
            if kind.own and first in OWN_GROUPS:
                numbers = group.own[row].tolist()
                for entry in range(*numbers[target : target + 2]):
                    a, b, meta = numbers[OWN_HEAD + 3 * entry :][:3]
                    weight = torch.tensor(meta >> 32, dtype=torch.int32).view(torch.float32).item()
                    own += as_columns(target, group.group, mixtures.layers, a, b, meta & 0xFF, weight)
            elif first in kind.adapted:
                for tile in range(*group.starts[target : target + 2].tolist()):
                    a, b, count, slot = group.tiles[:, tile].tolist()
                    if weight := mixtures.weights[row, slot].item():
                        own += as_columns(target, group.group, mixtures.layers, a, b, count, weight)
    return found


def columns_meant(mixtures, mixture):
    """The same as an admitted mixture says it."""
    return {
        first: [
            column
            for t, target in enumerate(of.group.targets)
            for placed, weight in mixture
            if target in placed.parts
            for part in [placed.parts[target]]
            for column in as_columns(t, of.group, mixtures.layers, part.a, part.b, part.rank, weight)
        ]
        for first, of in mixtures.of_group.items()
    }


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("seed", [2, 3])
def test_a_step_reads_what_its_rows_have_whatever_they_had_before(runner_for, monkeypatch, seed, own):
    """Random requests, cancellations, preemptions, adapters that leave and come back elsewhere, steps that fail."""
    draw, seen, running = random.Random(seed), set(), {}
    runner = runner_for(lambda size, kind, entries: 2.0 if kind.own == own else 3.0)
    shape = runner.decoder.shape
    slots = AdapterSlots(
        shape, budget_bytes=200_000, max_rank=512, dtype=torch.float32, device=torch.device("cpu"), ahead=True
    )
    runner._slots, runner.mixtures.arena = slots, slots.arena
    adapters = []
    for number in range(1, 7):
        pairs = {}
        for target in draw.sample(sorted(shape.linears), 3):
            rank, sides = draw.choice([1, 8, 9, 17]), shape.linears[target]
            pairs[target] = tuple(torch.full((rank, shape.layers, width), float(number)) for width in sides)
        adapters.append(pack((f"a{number}", "1"), pairs, torch.float32, pin=False))
    scheduler = Scheduler(ROWS, BlockPool(7), slots, runner.budget, failed=lambda *_: pytest.fail("cannot be"))

    def write(flats, where, values, count):
        places = where[:count].tolist()
        assert len({*places}) == len(places)  # what is written at once has no order
        first, second = len(flats[0]), len(flats[0]) + len(flats[1])
        for place, value in zip(places, values[:count].tolist(), strict=True):
            at = [place, place - first, place - second]
            which = (place >= first) + (place >= second)
            flats[which][at[which]] = value

    def replayed(size, kind):
        parts = [runner._numbers[start:end] for start, end in pairwise((0, *size.ends))]
        write(runner._changes._flats, parts[7], parts[8], int(parts[6][2]))
        for row in {*parts[1].tolist()} - {ROWS}:
            sequence, last = running[row], int(parts[2][parts[1] == row].max())
            blocks = sequence.blocks[: last // BLOCK + 1]
            assert runner.memory.table[row, : len(blocks)].tolist() == blocks
            assert runner._sampler._starts[row].seed == sequence.seed
            mixture = slots.placed(sequence.mixture)
            assert columns_read(runner.mixtures, row, kind) == columns_meant(runner.mixtures, mixture)
            for placed, _ in mixture:
                assert {slots.arena[part.b].item() for part in placed.parts.values()} == {float(placed.key[0][1:])}
        seen.add(kind)
        fail()

    def fail():
        if step < 150 and draw.random() < 0.06:
            raise RuntimeError("a step that fails")

    of_step = runner.mixtures.of_step
    monkeypatch.setattr(cuda_runner.kernels, "write_changes", write)
    monkeypatch.setattr(runner.mixtures, "of_step", lambda rows: fail() or of_step(rows))
    for key, graph in runner._graphs.items():
        graph.graph.replay.side_effect = partial(replayed, *key)
    flights = step = 0
    for step in range(250):
        if draw.random() < 0.5:
            some = draw.sample(adapters, draw.choice([0, 1, 1, 2]))
            tokens = array("i", [draw.randrange(3) for _ in range(draw.choice([1, 3, 17, 40]))])
            limit = len(tokens) + draw.choice([1, 9, 50, 50])
            mixture = tuple(sorted((one.key, draw.choice([1.0, -0.5])) for one in some))
            scheduler.waiting.append(ActiveSequence(tokens, len(tokens), limit, mixture, seed=step, adapters=some))
        if draw.random() < 0.1 and scheduler.running:
            scheduler.drop(draw.choice(scheduler.running))
        slots.begin_step()
        plan = scheduler.plan()
        running = {sequence.row: sequence for sequence in scheduler.running}
        try:
            if plan is not None:
                runner.launch(plan)
        except RuntimeError:
            scheduler.abandon()
            flights = 0
            continue
        flights += plan is not None
        while flights > (plan is not None):
            scheduler.take([draw.randrange(3) for _ in scheduler.decided])
            flights -= 1
    assert own in {kind.own for kind in seen if kind.adapted}
    assert scheduler.preemptions
    assert slots.counters.evictions
