"""Runs planned steps: tensors, cache, mixtures and sampling of all rows. It decides nothing.

`Runner` computes a step at once, on any device. On a GPU `lorauter.engine.cuda_runner` replays captured graphs instead,
and is a step ahead of whoever takes the tokens. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorauter.engine.board import MaskBoard
from lorauter.engine.cpu_kernels import load_kernels
from lorauter.engine.cpu_step import CpuStep
from lorauter.engine.logprobs import Ranker, StepRanks
from lorauter.engine.mixtures import Mixtures, RowMixture
from lorauter.engine.model import Decoder
from lorauter.engine.plan import NOT_FINITE, Choice, Piece, StepPlan
from lorauter.engine.sampling import Sampler, to_device
from lorauter.engine.slots import AdapterSlots
from lorauter.engine.step import Span, StepBatch, StepClass
from lorauter.engine.torch_step import TorchStep

_STEP_TOKENS = 512


class Flight(Protocol):
    """A step or choice on its way.

    Attributes:
        ranks: what it tells of probabilities, once it has been waited for; None if nobody asks.
    """

    ranks: StepRanks | None

    @property
    def computed(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> list[int]:
        """Its tokens, or NOT_FINITE: a step's as `StepPlan.sampled` says, a choice's in its order."""


class Landed:
    """A step or choice whose tokens are there."""

    computed = True

    def __init__(self, tokens: Sequence[int], ranks: StepRanks | None = None) -> None:
        self._tokens = list(tokens)
        self.ranks = ranks

    def wait(self) -> list[int]:
        """See `Flight.wait`."""
        return self._tokens


def step_class(decoder: Decoder) -> StepClass:
    """What runs a model's steps where it is."""
    if decoder.device.type == "cuda":
        from lorauter.engine.cuda_step import CudaStep  # Triton comes with PyTorch's CUDA builds alone

        return CudaStep
    return TorchStep if load_kernels(decoder.dtype) is None else CpuStep


class Runner:
    """Computes each step as it comes.

    Args:
        decoder: the model.
        slots: where adapters are.
        rows: sequences at most.
        blocks: of the cache.
        length: positions of a row at most.
        step_tokens: tokens of prompts in a step at most; None takes 512.

    Attributes:
        overlaps: whether a step may be launched before the last one's tokens are taken.
        board: where steps read what may come next in rows, as far as it is there when they choose.
    """

    overlaps = False

    def __init__(
        self,
        decoder: Decoder,
        slots: AdapterSlots,
        *,
        rows: int,
        blocks: int,
        length: int,
        step_tokens: int | None = None,
    ) -> None:
        self.decoder = decoder
        self._slots = slots
        self._step = step_class(decoder)
        self.memory = decoder.memory(blocks=blocks, rows=rows, length=length)
        self.mixtures = self._new_mixtures(rows)
        self.board = MaskBoard(rows + 1, decoder.vocabulary, pin=decoder.device.type == "cuda")
        self._masked: set[int] = set()  # rows that look there
        self._sampler = Sampler(rows + 1, decoder.vocabulary, decoder.device)
        self._ranker = Ranker(rows + 1)
        self._step_tokens = step_tokens or _STEP_TOKENS
        self._last: list[int] = [0] * (rows + 1)  # each row's last token
        # What the next tokens of rows are chosen by that wait for what may come.
        self._kept = torch.zeros(rows, decoder.vocabulary, dtype=decoder.dtype, device=decoder.device)

    def _new_mixtures(self, rows: int) -> Mixtures:
        decoder, slots = self.decoder, self._slots
        if decoder.device.type == "cuda":
            from lorauter.engine.cuda_mixtures import CudaMixtures

            return CudaMixtures(slots.groups, decoder.shape.layers, slots.arena, rows + 1)
        return Mixtures(slots.groups, decoder.shape.layers, slots.arena, rows + 1)

    def launch(self, plan: StepPlan) -> Flight:
        """Begin a step. What follows on pieces that are held is left to `choose`."""
        logits = self.logits(plan)
        sampled = list(plan.sampled)
        rows = [piece.row for piece in sampled]
        positions = [piece.start + piece.size for piece in sampled]
        now = [place for place, piece in enumerate(sampled) if not piece.held]
        if len(now) < len(sampled):
            held = [place for place, piece in enumerate(sampled) if piece.held]
            self._kept[[rows[place] for place in held]] = logits[held]
        tokens = greedy(logits[: len(rows)])
        if special := [place for place in self._sampler.sampled(rows) if not sampled[place].held]:
            tokens[special] = self._sampler.choose(
                logits[special], [rows[place] for place in special], [positions[place] for place in special]
            )
        masked = [p for p in now if rows[p] in self._masked and self.board.has(rows[p], positions[p])]
        if masked:
            own = [rows[place] for place in masked]
            tokens[masked] = self._sampler.choose(
                logits[masked], own, [positions[place] for place in masked], self.board.numbers[own, 1:]
            )
        chosen = tokens.tolist()
        for place in now:
            self._last[rows[place]] = chosen[place]
        return Landed([chosen[place] for place in now], self._ranker.of_step(plan, logits, tokens))

    def choose(self, choices: Sequence[Choice], masks: Sequence[Tensor]) -> Flight:
        """Choose tokens that steps have left open.

        Args:
            masks: of each, the only tokens that may come, on the host, as `lorauter.engine.grammars` has them.
        """
        rows = [choice.row for choice in choices]
        logits = self._kept[rows]
        tokens = self._sampler.choose(logits, rows, [choice.position for choice in choices], torch.stack(list(masks)))
        result: list[int] = tokens.tolist()
        for row, token in zip(rows, result, strict=True):
            self._last[row] = token
        return Landed(result, self._ranker.of_choice(rows, logits, tokens))

    def logits(self, plan: StepPlan, outputs: Sequence[int] | None = None) -> Tensor:
        """Compute a step, and return (m, vocabulary) logits: of the pieces that sample and then of those that have
        targets, or of the tokens `outputs`."""
        self._begin(plan)
        for row, place, blocks in plan.blocks:
            self.memory.table[row, place : place + len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        batch = self._batch(list(plan.pieces), len(plan.decoding), outputs)
        return self.decoder.forward(self._step(self.memory, batch), batch)

    def _begin(self, plan: StepPlan) -> Collection[RowMixture]:
        """Rows as the step needs them; returns the mixtures of those that are new."""
        placed = {start.row: self._slots.placed(start.mixture) for start in plan.starts}
        self.mixtures.change({**dict.fromkeys(plan.left, ()), **placed})
        for start in plan.starts:
            self._sampler.start(start)
            self._ranker.start(start.row, start.sampling)
            masked = start.sampling.is_held and start.sampling.greedy
            (self._masked.add if masked else self._masked.discard)(start.row)
        return placed.values()

    def _batch(self, pieces: Sequence[Piece], decoding: int, outputs: Sequence[int] | None) -> StepBatch:
        """A step's tokens.

        Args:
            pieces: those of one token first.
            decoding: how many of them have one token.
            outputs: which tokens' logits are wanted; None takes the last of each piece that samples, then those before
                targets.
        """
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        wanted: list[int] = []
        scored: list[int] = []
        for piece in pieces:
            scored += range(len(tokens), len(tokens) + len(piece.targets))
            tokens += piece.tokens or [self._last[piece.row]]
            positions += range(piece.start, piece.start + piece.size)
            rows += [piece.row] * piece.size
            if piece.samples:
                wanted.append(len(tokens) - 1)
        device = self.decoder.device
        spans = [Span(piece.row, piece.start, piece.size) for piece in pieces[decoding:]]

        def ids(values: Sequence[int]) -> Tensor:
            return to_device(torch.tensor(values, dtype=torch.int32), device)

        return StepBatch(
            ids(tokens),
            ids(rows),
            ids(positions),
            decoding,
            spans,
            ids([*wanted, *scored] if outputs is None else outputs),
            self.mixtures.of_step([piece.row for piece in pieces]),
        )

    def budget(self, decoding: int) -> int:
        """Tokens in a step at most, beside so many rows that decode."""
        return decoding + self._step_tokens

    def close(self) -> None:
        """Let go of what the device holds."""


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row (n, vocabulary), the first of equals, or NOT_FINITE: (n,) int32."""
    if not len(logits):
        return torch.zeros(0, dtype=torch.int32, device=logits.device)
    kernels = load_kernels(logits.dtype) if logits.device.type == "cpu" else None
    if kernels is not None:
        return kernels.greedy(logits.contiguous()).int()
    best, tokens = logits.max(dim=-1)
    finite = best.isfinite() & logits.amin(dim=-1).isfinite()
    return tokens.where(finite, NOT_FINITE).int()
