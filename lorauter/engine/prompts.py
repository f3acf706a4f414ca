"""Reads prompts, and answers none: the hidden states at their ends. Knows nothing of requests and adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from lorauter.cuda_graphs import landed
from lorauter.engine.blocks import blocks_of
from lorauter.engine.model import Decoder
from lorauter.engine.prompt_graphs import PromptGraphs, alike
from lorauter.engine.runner import step_class
from lorauter.engine.step import Memory, RmsNorm, Span, StepBatch
from lorauter.engine.torch_step import TorchStep

logger = logging.getLogger("lorauter.engine")


class Limits(NamedTuple):
    """What is read in a pass at most: prompts, and tokens of them all, but for one prompt that is longer."""

    rows: int
    tokens: int


ON_CPU = Limits(16, 256)  # of so few a prompt has the same states, with AMX to the last bit, whatever is read beside it
_GRAIN = 64  # on a CPU, what tokens of a pass are a multiple of: other products than before take long to work out
ON_GPU = Limits(64, 16384)  # a pass is some hundreds of launches, whatever it reads


class PromptReader:
    """Reads prompts with a model, one pass at a time.

    Args:
        decoder: the model.
        layers: after which of them states are wanted, from 1 on.
        length: tokens of a prompt at most.
        whole: whether prompts are read as `WholePrompts` does; None: on a GPU, whose own steps are of captured shapes.
    """

    def __init__(self, decoder: Decoder, layers: Sequence[int], *, length: int, whole: bool | None = None) -> None:
        whole = decoder.device.type == "cuda" if whole is None else whole
        self._decoder = decoder
        self._layers = list(layers)
        self._limits = ON_GPU if whole else ON_CPU
        self._step = WholePrompts if whole else step_class(decoder)
        rows, tokens = self._limits
        blocks = 1 if whole else blocks_of(max(length, tokens)) + rows
        self._memory = decoder.memory(blocks=blocks, rows=rows, length=min(length, decoder.max_positions))
        self._graphs: PromptGraphs | None = None
        if decoder.device.type == "cuda" and whole:
            self._graphs = self._by_graphs()

    def _by_graphs(self) -> PromptGraphs | None:
        """What reads by graphs, if it says what steps say."""
        probe = [(1, 2, 3), tuple(range(1, 41))]
        try:
            graphs = PromptGraphs(self._decoder, self._memory, WholePrompts, self._layers)
            shape = graphs.shape(probe)
            same = shape is not None and alike(graphs.states(probe, shape), landed(self._launched(probe)))
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
        if self._graphs is not None and (shape := self._graphs.shape(prompts)) is not None:
            try:
                return self._graphs.states(prompts, shape)
            except RuntimeError as error:
                logger.warning("prompts are read without CUDA graphs from now on: %s", error)
                self._graphs = None
        return landed(self._launched(prompts))

    @torch.inference_mode()
    def _launched(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        tokens: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        spans: list[Span] = []
        taken = 1  # block 0 is for padding
        for row, prompt in enumerate(prompts):
            blocks = blocks_of(len(prompt))
            self._memory.table[row, :blocks] = torch.arange(taken, taken + blocks, dtype=torch.int32)
            taken += blocks
            tokens += prompt
            rows += [row] * len(prompt)
            positions += range(len(prompt))
            ends.append(len(tokens) - 1)
            spans.append(Span(row, 0, len(prompt)))
        if self._step is not WholePrompts:
            padding = -len(tokens) % _GRAIN
            tokens += [0] * padding
            rows += [self._limits.rows] * padding  # of no prompt
            positions += [0] * padding

        def ids(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self._decoder.device)

        batch = StepBatch(ids(tokens), ids(rows), ids(positions), 0, spans, ids(ends))
        return self._decoder.states(self._step(self._memory, batch), batch, self._layers)


class WholePrompts(TorchStep):
    """Prompts from their first token to their last, side by side and padded: all are attended to at once, and nothing
    is kept of them."""

    def __init__(self, memory: Memory, batch: StepBatch) -> None:
        super().__init__(memory, batch)
        self._shape = len(batch.spans), max(span.length for span in batch.spans)
        self._places = batch.rows.long() * self._shape[1] + batch.positions

    def attention(
        self, layer: int, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None, window: int | None
    ) -> Tensor:
        """See `Step.attention`."""
        rows, length = self._shape
        q, k, v = map(self._padded, self._heads(qkv, q_norm, k_norm))
        near = None
        if window is not None and window < length:
            near = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=near, is_causal=near is None, enable_gqa=True)
        return out.transpose(1, 2).reshape(rows * length, -1)[self._places]

    def _padded(self, x: Tensor) -> Tensor:
        """(tokens, heads, head_dim) as (prompts, heads, length, head_dim)."""
        padded = x.new_zeros(self._shape[0] * self._shape[1], *x.shape[1:])
        padded[self._places] = x
        return padded.view(*self._shape, *x.shape[1:]).transpose(1, 2)
