"""Runs planned steps on a GPU, by captured graphs, without waiting for them.

There is a graph for each size of batch, for steps that only decode and for those with pieces of prompts, and for what
the adapters in it change: nothing, attention alone, or any layer. Each token may multiply its row's own columns alone
(`lorauter.engine.cuda_own`), where rows have so few that it is faster, which is measured at the start. All are captured
before the first request, and none is ever lost: what they read (tokens, tables, mixtures) lies in fixed places, where
each step writes what has changed. A row's last token stays on the device, so that a step can be launched before the
host has seen the tokens of the one before. Which tokens may come in rows that are held to grammars a step reads from
the host's memory as it chooses, so that there is time until then to find it out; where tokens are sampled they are
chosen between two steps, by logits that the first of them has left. Knows nothing of requests.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorauter.cuda_graphs import to_host
from lorauter.engine import cuda_kernels as kernels
from lorauter.engine.cuda_changes import Changes
from lorauter.engine.cuda_flights import CudaFlight, Staging, StagingRing
from lorauter.engine.cuda_mixtures import CudaMixtures
from lorauter.engine.cuda_step import CudaStep, query_blocks
from lorauter.engine.logprobs import StepRanks
from lorauter.engine.model import Decoder
from lorauter.engine.plan import Choice, Decoding, Piece, StepPlan
from lorauter.engine.runner import Flight, Runner
from lorauter.engine.sampling import to_device
from lorauter.engine.slots import AdapterSlots, Part, Placed
from lorauter.engine.step import StepBatch

_LEAST_STEP_TOKENS = 64
_SLOWER = 2.0  # times as long as a step in which all rows decode may one with prompts take
_KINDS = 4  # of graphs of each size
_CHANGES, _LEAST_OUTPUTS = 8, 16  # that come with a step for each of its outputs, which count as so many at least
_USUAL_ADAPTERS, _USUAL_RANK = 12, 16  # of a step that is timed
_TIMES, _LONG_S = 4, 0.03  # how often that is, if it does not take so long
_RANKS = 8, 24, 64  # of adapters for which it is found out what is faster


def decode_sizes(max_batch: int) -> list[int]:
    """Batch sizes that have graphs of their own, the last at least `max_batch`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_batch + 32, 32)]
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < max_batch]


def mixed_sizes(most: int) -> list[int]:
    """Numbers of tokens of steps with prompts that have graphs of their own, the last at least `most`."""
    sizes = [size for power in range(5, 20) for size in (1 << power, 3 << (power - 1))]
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < most]


def kept_logits(rows: int, step_tokens: int) -> int:
    """How many tokens' logits all graphs together keep."""
    mixed = mixed_sizes(max(step_tokens, rows + _LEAST_STEP_TOKENS))
    return _KINDS * (sum(decode_sizes(rows)) + sum(min(size, rows) for size in mixed))


_NOTHING = StepPlan((), (), (), Decoding(), ())


@dataclass(frozen=True)
class _Size:
    """A graph's shape: T tokens, of which `decoding` at most decode, m tokens wanted, Q query blocks at most."""

    tokens: int
    decoding: int
    outputs: int
    queries: int

    @cached_property
    def ends(self) -> list[int]:
        """Where the numbers end that such a step reads: tokens, rows, positions; outputs, their rows, which are held;
        how many decode, query blocks, changes; places and values of changes; query blocks."""
        changes = _CHANGES * max(self.outputs, _LEAST_OUTPUTS)
        return [*accumulate([*[self.tokens] * 3, *[self.outputs] * 3, 3, changes, changes, 4 * self.queries])]


@dataclass(frozen=True)
class _Kind:
    """What adapters change in a step: which groups of targets, and whether each token multiplies its own columns."""

    adapted: frozenset[str]
    own: bool = False


@dataclass(frozen=True)
class _Graph:
    graph: Any
    logits: Tensor
    chosen: Tensor


class CopyStream:
    """Copies adapters to the device beside its work.

    Attributes:
        launched: what happens once the latest step is computed: until then it may read what is to be overwritten.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.launched: torch.cuda.Event | None = None

    def __call__(self, to: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            if self.launched is not None:
                self._stream.wait_event(self.launched)
            to.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return done


class CudaRunner(Runner):
    """See `Runner`; `launch` returns at once.

    Args:
        decoder, slots, rows, blocks, length: as for `Runner`.
        step_tokens: tokens of a step at most.
        copies: what brings adapters here.
        measure: whether to find out how many tokens a step with prompts may have while rows decode; else `step_tokens`.
    """

    overlaps = True

    def __init__(
        self,
        decoder: Decoder,
        slots: AdapterSlots,
        *,
        rows: int,
        blocks: int,
        length: int,
        step_tokens: int,
        copies: CopyStream,
        measure: bool,
    ) -> None:
        super().__init__(decoder, slots, rows=rows, blocks=blocks, length=length, step_tokens=step_tokens)
        self._rows = rows
        self._copies = copies
        self._group = decoder.heads // decoder.kv_heads
        self._decode = [_Size(size, size, size, 0) for size in decode_sizes(rows)]
        self._mixed = [
            _Size(
                size, min(size, rows), min(size, rows), -(-size // kernels.query_tokens(self._group)) + min(size, rows)
            )
            for size in mixed_sizes(max(step_tokens, rows + _LEAST_STEP_TOKENS))
        ]
        self._most = self._mixed[-1].tokens
        self._beside = self._most  # tokens of a step in which rows decode, at most
        sizes = [*self._decode, *self._mixed]
        device = decoder.device
        most = max(size.ends[-1] for size in sizes)
        self._numbers = torch.zeros(most, dtype=torch.int32, device=device)
        self._last = [-1] * (rows + 1)  # the device alone knows them
        self._staging = StagingRing(most, rows, device)
        self._places = np.arange(self._most, dtype=np.int32)
        self._last_tokens = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        firsts = frozenset(group.first for group in slots.groups)
        assert isinstance(self.mixtures, CudaMixtures)
        flats = *self.mixtures.flats, self.memory.table.view(-1)
        self._changes = Changes(flats, self.mixtures.changes)
        nothing, attention, any_layer = frozenset[str](), firsts & {"q_proj", "o_proj"}, _Kind(firsts)
        self._tiles = [*dict.fromkeys((_Kind(attention), any_layer))]
        self._own = _Kind(firsts, own=True)
        self._kinds = [_Kind(nothing), *self._tiles, self._own]
        self._graphs: dict[tuple[_Size, _Kind], _Graph] = {}
        self._pool: Any = None
        self._capture_all(sizes)
        self._own_most, beside = self._measure()
        kernels.keep_rows(self._kept, self._kept, torch.zeros(1, 2, dtype=torch.int32, device=device))
        if measure:
            self._beside = beside

    # --- graphs

    def _capture_all(self, sizes: Sequence[_Size]) -> None:
        for size in sorted(sizes, key=lambda size: -size.tokens):  # the largest first: the others use its memory
            for kind in self._kinds:
                self._graphs[size, kind] = self._capture(size, kind)

    def _capture(self, size: _Size, kind: _Kind) -> _Graph:
        self._write(self._staging.take(), size, _NOTHING)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and warm up what may not happen in a capture
            self._forward(size, kind)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits, chosen = self._forward(size, kind)
        self._pool = graph.pool()
        return _Graph(graph, logits, chosen)

    @torch.inference_mode()
    def _forward(self, size: _Size, kind: _Kind) -> tuple[Tensor, Tensor]:
        parts = (self._numbers[start:end] for start, end in pairwise((0, *size.ends)))
        tokens, rows, positions, outputs, output_rows, held, counts, places, values, queries = parts
        self._changes.written(places, values, counts[2:])
        batch = StepBatch(
            kernels.take_tokens(tokens, rows, self._last_tokens),
            rows,
            positions,
            size.decoding,
            (),
            outputs if size.queries else None,
            self.mixtures if kind.adapted else None,
            kind.adapted,
            kind.own,
            counts,
            queries.view(-1, 4),
        )
        logits = self.decoder.forward(CudaStep(self.memory, batch), batch)
        posted = kernels.Posted(self.board.numbers, held, outputs, positions)
        return logits, kernels.greedy(logits, output_rows, self._last_tokens, posted)

    def _measure(self) -> tuple[dict[tuple[_Size, _Kind], float], int]:
        """How long rows' lists may be (`CudaMixtures.entries`) for steps to be faster if each token multiplies its own
        columns than by a kind's tiles; and how many tokens a step with prompts may have while rows decode."""
        rows = range(self._rows)
        assert isinstance(self.mixtures, CudaMixtures)
        most: dict[tuple[_Size, _Kind], float] = {}
        for tiles in self._tiles:
            known = dict.fromkeys((*self._decode, *self._mixed), (0.0, 0.0))
            for rank in _RANKS:
                if not self._put_on(rows, tiles.adapted, rank):
                    break
                for size, (before, gain) in list(known.items()):
                    entries = self.mixtures.entries(rows[: size.decoding])
                    gains = self._seconds(size, tiles, rows) - self._seconds(size, self._own, rows)
                    if gains > 0:
                        most[size, tiles], known[size] = entries, (entries, gains)
                    else:  # between the two
                        most[size, tiles] = before + (entries - before) * gain / (gain - gains) if gain else 0.0
                        del known[size]
        self._put_on(rows, self._tiles[0].adapted, _USUAL_RANK)

        def usual(size: _Size) -> float:
            return min(self._seconds(size, kind, rows) for kind in self._kinds[1:])

        longest = _SLOWER * usual(self._decode[-1])
        fitting = [size.tokens for size in self._mixed if usual(size) <= longest]
        self._put_on(rows, frozenset(), 0)
        return most, max([_LEAST_STEP_TOKENS, *fitting])

    def _put_on(self, rows: Sequence[int], firsts: Collection[str], rank: int) -> bool:
        """Let rows have one of some adapters each, of this rank in these groups of targets, which compute nothing, or
        without groups none; False if there is no room for such."""
        layers, parts, end = self.decoder.shape.layers, {}, 0
        for group in self._slots.groups:
            for target, width in zip(group.targets, group.widths, strict=True):
                if group.first in firsts:
                    parts[target] = Part(end, end + rank * layers * group.inputs, rank)
                    end += rank * layers * (group.inputs + width)
        fits = end <= self._slots.arena.numel()
        self._slots.arena[: end * fits].zero_()
        placed = [Placed(("", str(i)), i, parts) for i in range(_USUAL_ADAPTERS)]
        of_row = [[(one, 1.0)] if parts and fits else () for one in placed]
        self.mixtures.change({row: of_row[row % len(of_row)] for row in rows})
        self.mixtures.of_step(rows)
        self._changes.write()
        return fits

    def _seconds(self, size: _Size, kind: _Kind, rows: Sequence[int]) -> float:
        """What a step takes in which as many of these rows decode as may, or half of those beside prompts of others."""
        decoding, others = rows[: size.decoding], rows[:0]
        if size.queries:
            half = min(size.decoding, size.tokens // 2) // 2
            decoding, others = rows[:half], rows[half : max(1, 2 * half)]
        length = min(self.memory.length, (size.tokens - len(decoding)) // max(1, len(others)))
        prompts = [Piece(row, 0, [0] * length, samples=True) for row in others]
        numbers = np.array(decoding, np.int32)
        plan = StepPlan((), (), (), Decoding(numbers, np.zeros_like(numbers)), prompts)
        self._write(self._staging.take(), size, plan)
        graph = self._graphs[size, kind].graph
        times: list[float] = []
        while len(times) < _TIMES and sum(times) < _LONG_S:
            torch.cuda.synchronize()
            began = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    # --- steps

    def budget(self, decoding: int) -> int:
        """See `Runner.budget`: what costs rows that decode little; without any, as much as a step takes."""
        return min(self._most, max(self._beside, decoding + _LEAST_STEP_TOKENS)) if decoding else self._most

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Flight:
        """See `Runner.launch`."""
        self._changes.write()  # what a launch that failed has left
        for mixture in self._begin(plan):
            for placed, _ in mixture:
                if placed.copied is not None and not placed.copied.query():
                    torch.cuda.current_stream().wait_event(placed.copied)
        width, first = self.memory.table.shape[1], self._changes.third
        for row, place, blocks in plan.blocks:
            self._changes.pending.add_run(first + row * width + place, blocks)
        staging = self._staging.take()
        logits, chosen = self._compute(plan) if self._ranker.asked and plan.scored else self._replay(plan, staging)
        ends, positions = plan.ends
        rows = ends.tolist()
        held = plan.held
        if held:
            pairs = to_device(torch.tensor([(place, rows[place]) for place in held], dtype=torch.int32), logits.device)
            kernels.keep_rows(logits, self._kept, pairs)
        if special := [place for place in self._sampler.sampled(rows) if place not in held]:
            where = to_device(torch.tensor(special), chosen.device)
            chosen = chosen.clone()
            chosen[where] = self._sample(logits[where], [rows[place] for place in special], positions[special].tolist())
        places = sorted({*range(len(rows))} - {*held}) if held else None
        return self._flight(staging, chosen, self._ranker.of_step(plan, logits, chosen), places)

    @torch.inference_mode()
    def choose(self, choices: Sequence[Choice], masks: Sequence[Tensor]) -> Flight:
        """See `Runner.choose`; returns at once."""
        rows = [choice.row for choice in choices]
        device = self._kept.device
        logits = self._kept[to_device(torch.tensor(rows), device)]
        positions = [choice.position for choice in choices]
        tokens = self._sample(logits, rows, positions, to_device(torch.stack(list(masks)), device))
        ranks = self._ranker.of_choice(rows, logits, tokens) if self._ranker.asked else None
        return self._flight(self._staging.take(), tokens, ranks, None)

    def _flight(
        self, staging: Staging, chosen: Tensor, ranks: StepRanks | None, places: Sequence[int] | None
    ) -> CudaFlight:
        """What has been launched so far, on its way to the host."""
        if ranks is not None:
            ranks = replace(ranks, table=to_host(ranks.table))
        flight = staging.launched(chosen, ranks, places)
        self._copies.launched = flight.done
        return flight

    def _compute(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """A step without a graph, which none has for the logits of whole prompts: logits and likeliest tokens."""
        self._changes.write()
        batch = self._batch(list(plan.pieces), len(plan.decoding), None)
        batch = replace(batch, tokens=kernels.take_tokens(batch.tokens, batch.rows, self._last_tokens))
        logits = self.decoder.forward(self._step(self.memory, batch), batch)
        ends, _ = plan.ends
        rows = to_device(torch.from_numpy(ends), logits.device)
        if not len(rows):
            return logits, rows
        assert batch.outputs is not None
        held = to_device(torch.tensor(self._boards(ends.tolist())).int(), logits.device)
        posted = kernels.Posted(self.board.numbers, held, batch.outputs, batch.positions)
        return logits, kernels.greedy(logits[: len(rows)], rows, self._last_tokens, posted)

    def _replay(self, plan: StepPlan, staging: Staging) -> tuple[Tensor, Tensor]:
        """A step by its graph: logits of the pieces that sample, and their likeliest tokens."""
        rows = len(plan.decoding.rows)
        beside, _, sizes, samples = plan.beside.T
        tokens, outputs = rows + int(sizes.sum()), rows + int(samples.sum())
        only_decodes = not plan.prompts and outputs == tokens
        size = next(size for size in (self._decode if only_decodes else self._mixed) if size.tokens >= tokens)
        self._write(staging, size, plan)
        graph = self._graphs[size, self._kind_of(size, [*plan.decoding.rows.tolist(), *beside.tolist()])]
        graph.graph.replay()
        self._changes.pending.clear()
        return graph.logits, graph.chosen[:outputs]

    def _kind_of(self, size: _Size, rows: Collection[int]) -> _Kind:
        """Which graph a step over these rows takes."""
        mixtures = self.mixtures.of_step(rows)
        if not isinstance(mixtures, CudaMixtures):
            return self._kinds[0]
        tiles = next(kind for kind in self._tiles if mixtures.active <= kind.adapted)
        return self._own if mixtures.entries(rows) <= self._own_most.get((size, tiles), -1) else tiles

    def _sample(
        self, logits: Tensor, rows: Sequence[int], positions: Sequence[int], masks: Tensor | None = None
    ) -> Tensor:
        """The tokens of rows that do not take the likeliest, which are their last tokens now too."""
        tokens = self._sampler.choose(logits, rows, positions, masks)
        self._last_tokens[to_device(torch.tensor(rows), tokens.device)] = tokens.clamp_min(0)
        return tokens

    def _boards(self, rows: Sequence[int]) -> list[int]:
        """Where on the board it may be what may come in these rows; -1 where it is not asked."""
        return [row if row in self._masked else -1 for row in rows] if self._masked else [-1] * len(rows)

    def _write(self, staging: Staging, size: _Size, plan: StepPlan) -> None:
        """Put a step's numbers where its graph reads them, filled up with a row that is for padding."""
        parts = (staging.numbers[start:end] for start, end in pairwise((0, *size.ends)))
        tokens, rows, positions, outputs, output_rows, held, counts, places, values, blocks = parts
        at = wanted = len(plan.decoding.rows)
        tokens[:at], rows[:at], positions[:at] = -1, plan.decoding.rows, plan.decoding.starts
        outputs[:at], output_rows[:at] = self._places[:at], plan.decoding.rows
        if len(plan.beside):
            known = array("i")
            for piece in (*plan.decoding.others, *plan.prompts):
                known.extend(piece.tokens or (-1,))
            first, at = at, at + len(known)
            own, starts, lengths, samples = plan.beside.T
            ends = first + lengths.cumsum()
            tokens[first:at], rows[first:at] = known, own.repeat(lengths)
            positions[first:at] = self._places[first:at] + (starts - ends + lengths).repeat(lengths)
            asked = samples.astype(bool)
            begun, wanted = wanted, wanted + int(samples.sum())
            outputs[begun:wanted], output_rows[begun:wanted] = ends[asked] - 1, own[asked]
        tokens[at:], rows[at:], positions[at:] = 0, self._rows, 0
        outputs[wanted:], output_rows[wanted:], held[:] = 0, self._rows, -1
        if self._masked:
            held[:wanted] = self._boards(output_rows[:wanted].tolist())
        queries = query_blocks(plan.beside[len(plan.decoding.others) :, :3], len(plan.decoding), self._group)
        counts[:] = len(plan.decoding), len(queries), self._changes.put(places, values)
        blocks[: queries.size] = queries.reshape(-1)
        staging.send(self._numbers[: size.ends[-2] + queries.size])

    def close(self) -> None:
        """See `Runner.close`."""
        torch.cuda.synchronize()
        self._graphs.clear()
