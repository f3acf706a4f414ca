"""Runs planned steps: tensors, cache, mixtures and sampling of all rows. It decides nothing.

`Runner` computes a step at once, on any device. On a GPU `lorauter.engine.cuda_runner` replays captured graphs instead,
and is a step ahead of whoever takes the tokens. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorauter.engine.cpu_kernels import load_kernels
from lorauter.engine.cpu_step import CpuStep
from lorauter.engine.logprobs import Ranker, StepRanks
from lorauter.engine.mixtures import Mixtures
from lorauter.engine.model import Decoder
from lorauter.engine.sampling import Sampler, to_device
from lorauter.engine.scheduler import NOT_FINITE, Piece, StepPlan
from lorauter.engine.slots import AdapterSlots
from lorauter.engine.step import Span, StepBatch, StepClass
from lorauter.engine.torch_step import TorchStep

_STEP_TOKENS = 512

Masks = Callable[[], Mapping[int, Tensor]]


class Flight(Protocol):
    """A step on its way.

    Attributes:
        ranks: what it tells of probabilities, once it has been waited for; None if nobody asks.
    """

    ranks: StepRanks | None

    def wait(self) -> list[int]:
        """Its tokens, or NOT_FINITE, in the order of `StepPlan.sampled`."""


class Landed:
    """A step whose tokens are there."""

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
        self._sampler = Sampler(rows + 1, decoder.vocabulary, decoder.device)
        self._ranker = Ranker(rows + 1)
        self._step_tokens = step_tokens or _STEP_TOKENS
        self._last: list[int] = [0] * (rows + 1)  # the token that each row's last step has chosen

    def _new_mixtures(self, rows: int) -> Mixtures:
        decoder, slots = self.decoder, self._slots
        if decoder.device.type == "cuda":
            from lorauter.engine.cuda_mixtures import CudaMixtures

            return CudaMixtures(slots.groups, decoder.shape.layers, slots.arena, rows + 1)
        return Mixtures(slots.groups, decoder.shape.layers, slots.arena, rows + 1)

    def launch(self, plan: StepPlan, masks: Masks | None = None) -> Flight:
        """Begin a step.

        Args:
            masks: called once the step's forward pass has begun: tells, by row, the only tokens that may come.
        """
        logits = self.logits(plan)
        sampled = list(plan.sampled)
        rows = [piece.row for piece in sampled]
        tokens = greedy(logits[: len(rows)])
        if chosen := self._sampler.sampled(rows):
            positions = [sampled[place].start + sampled[place].count for place in chosen]
            tokens[chosen] = self._sampler.choose(
                logits[chosen], [rows[place] for place in chosen], positions, masks() if masks is not None else None
            )
        result: list[int] = tokens.tolist()
        for row, token in zip(rows, result, strict=True):
            self._last[row] = token
        return Landed(result, self._ranker.of_step(plan, logits, tokens))

    def logits(self, plan: StepPlan, outputs: Sequence[int] | None = None) -> Tensor:
        """Compute a step, and return (m, vocabulary) logits: of the pieces that sample and then of those that have
        targets, or of the tokens `outputs`."""
        self._begin(plan)
        batch = self._batch([*plan.decoding, *plan.prompts], len(plan.decoding), outputs)
        return self.decoder.forward(self._step(self.memory, batch), batch)

    def _begin(self, plan: StepPlan) -> None:
        """Rows as the step needs them."""
        for row in plan.left:
            self.mixtures.assign(row, ())
        for start in plan.starts:
            self.mixtures.assign(start.row, self._slots.placed(start.mixture))
            self._sampler.start(start)
            self._ranker.start(start.row, start.sampling)
        if plan.blocks:
            rows, places, blocks = (
                to_device(torch.tensor(values), self.decoder.device) for values in zip(*plan.blocks, strict=True)
            )
            self.memory.table[rows, places] = blocks.int()

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
            positions += range(piece.start, piece.start + piece.count)
            rows += [piece.row] * piece.count
            if piece.samples:
                wanted.append(len(tokens) - 1)
        device = self.decoder.device
        spans = [Span(piece.row, piece.start, piece.count) for piece in pieces[decoding:]]

        def ids(values: Sequence[int]) -> Tensor:
            return to_device(torch.tensor(values, dtype=torch.int32), device)

        return StepBatch(
            ids(tokens),
            ids(rows),
            ids(positions),
            decoding,
            spans,
            ids([*wanted, *scored] if outputs is None else outputs),
            self.mixtures.of_step({piece.row for piece in pieces}),
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
