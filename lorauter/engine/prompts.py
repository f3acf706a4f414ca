"""Reads prompts, and answers none: the hidden states at their ends. Knows nothing of requests and adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorauter.cuda_graphs import landed
from lorauter.engine.blocks import blocks_of
from lorauter.engine.model import Decoder
from lorauter.engine.plan import Ints
from lorauter.engine.runner import step_class
from lorauter.engine.step import Memory, Span, StepBatch
from lorauter.engine.torch_step import TorchStep

if TYPE_CHECKING:
    from lorauter.engine.cuda_prompts import PromptGraphs

logger = logging.getLogger("lorauter.engine")


class Limits(NamedTuple):
    """What is read in a pass at most: prompts, and tokens of them all, but for one prompt that is longer."""

    rows: int
    tokens: int


ON_CPU = Limits(16, 256)  # of so few a prompt has the same states, with AMX to the last bit, whatever is read beside it
ON_GPU = Limits(64, 4096)
_GRAIN = 64  # on a CPU, what tokens of a pass are a multiple of: other products than before take long to work out
_ALIKE = 0.99


class Packed(NamedTuple):
    """Prompts one after the other, each in a row of its own, and behind them tokens of nobody's row.

    Attributes:
        tokens, rows, positions: (T,), of each token.
        ends: (n,), of each prompt its last token, as an index into the T.
        spans: the prompts.
    """

    tokens: Ints
    rows: Ints
    positions: Ints
    ends: Ints
    spans: list[Span]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], size: int, nobody: int) -> Packed:
        """So many tokens in all."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        ends = lengths.cumsum(dtype=np.int32)
        total = int(ends[-1])
        tokens, rows, positions = np.zeros((3, size), np.int32)
        tokens[:total] = np.fromiter(chain.from_iterable(prompts), np.int32, total)
        rows[:total] = np.repeat(np.arange(len(prompts)), lengths)
        rows[total:] = nobody
        positions[:total] = np.arange(total) - np.repeat(ends - lengths, lengths)
        return cls(tokens, rows, positions, ends - 1, [Span(row, 0, n) for row, n in enumerate(lengths.tolist())])


class PromptReader:
    """Reads prompts with a model, one pass at a time; on a GPU by graphs, which are all captured at once.

    Args:
        decoder: the model.
        layers: after which of them states are wanted, from 1 on.
        length: tokens of a prompt at most.
    """

    def __init__(self, decoder: Decoder, layers: Sequence[int], *, length: int) -> None:
        on_gpu = decoder.device.type == "cuda"
        self._decoder = decoder
        self._layers = list(layers)
        self._limits = ON_GPU if on_gpu else ON_CPU
        # On a GPU what is held against the graphs, and goes on without them: slow, and none of their kernels is in it.
        self._step = TorchStep if on_gpu else step_class(decoder)
        self._memory = prompt_memory(decoder, self._limits.rows, length)
        self._graphs = self._by_graphs() if on_gpu else None

    def _by_graphs(self) -> PromptGraphs | None:
        """What reads by graphs, if it says what PyTorch's own operations say."""
        from lorauter.engine.cuda_prompts import PromptGraphs, graph_sizes  # with Triton, as CUDA builds alone have it

        rows, tokens = self._limits
        some = [tuple(range(1, n + 1)) for n in (3, 40, 1, 90) if n <= self._memory.length]
        try:
            sizes = graph_sizes(max(tokens, self._memory.length))
            graphs = PromptGraphs(self._decoder, self._memory, self._layers, sizes)
            same = all(
                alike(graphs.states(probe), self._launched(probe)) for probe in (some, some * (rows // len(some)))
            )
        except RuntimeError as error:
            logger.warning("prompts are read without CUDA graphs: %s", error)
            return None
        if not same:
            logger.warning("prompts are read without CUDA graphs, whose states differ")
        return graphs if same else None

    def states(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(n, layers, hidden), in the model's dtype, of n prompts of a token or more."""
        found = [self._read(batch) for batch in self._batches(prompts)]
        return torch.cat(found) if found else torch.zeros(0, len(self._layers), self._decoder.hidden)

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        batch: list[Sequence[int]] = []
        for prompt in prompts:
            if batch and (len(batch) == self._limits.rows or sum(map(len, batch)) + len(prompt) > self._limits.tokens):
                yield batch
                batch = []
            batch.append(prompt)
        if batch:
            yield batch

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        if self._graphs is not None:
            try:
                return self._graphs.states(prompts)
            except RuntimeError as error:
                logger.warning("prompts are read without CUDA graphs from now on: %s", error)
                self._graphs = None
        return self._launched(prompts)

    @torch.inference_mode()
    def _launched(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        total = sum(map(len, prompts))
        packed = Packed.of(prompts, total + -total % _GRAIN, self._limits.rows)
        tokens, rows, positions, ends = (torch.from_numpy(of).to(self._decoder.device) for of in packed[:4])
        batch = StepBatch(tokens, rows, positions, 0, packed.spans, ends)
        return landed(self._decoder.states(self._step(self._memory, batch), batch, self._layers))


def prompt_memory(decoder: Decoder, rows: int, length: int) -> Memory:
    """For steps that read whole prompts, of which nothing is kept: every row has its own blocks, and all layers have
    the same."""
    length = min(length, decoder.max_positions)
    each = blocks_of(length)
    memory = decoder.memory(blocks=rows * each, rows=rows, length=length, shared=True)
    memory.table[:rows] = torch.arange(1, rows * each + 1, dtype=torch.int32).view(rows, each)
    return memory


def alike(states: Tensor, others: Tensor) -> bool:
    """Whether states are the same but for the last bits of other kernels."""
    return bool((torch.cosine_similarity(states.float(), others.float(), dim=-1) > _ALIKE).all())
