"""Reads prompts, and answers none: the hidden states at their ends. Knows nothing of requests and adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorauter.engine.blocks import blocks_of
from lorauter.engine.model import Decoder
from lorauter.engine.runner import step_class
from lorauter.engine.step import Span, StepBatch
from lorauter.engine.torch_step import TorchStep

_ROWS = 16  # prompts in a pass at most


class PromptReader:
    """Reads prompts with a model, one pass at a time.

    Args:
        decoder: the model.
        layers: after which of them states are wanted, from 1 on.
        length: tokens of a prompt at most.
        tokens: of the prompts of a pass at most, but for one that is longer.
    """

    def __init__(self, decoder: Decoder, layers: Sequence[int], *, length: int, tokens: int) -> None:
        self._decoder = decoder
        self._layers = list(layers)
        self._tokens = tokens
        # The steps of a GPU are of captured shapes; prompts that nobody answers are few, and of any.
        self._step = TorchStep if decoder.device.type == "cuda" else step_class(decoder)
        blocks = blocks_of(max(length, tokens)) + _ROWS
        self._memory = decoder.memory(blocks=blocks, rows=_ROWS, length=min(length, decoder.max_positions))

    def states(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(n, layers, hidden), in the model's dtype, of n prompts of a token or more."""
        found = [self._read(batch) for batch in self._batches(prompts)]
        return torch.cat(found) if found else torch.zeros(0, len(self._layers), self._decoder.hidden)

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        batch: list[Sequence[int]] = []
        for prompt in prompts:
            if batch and (len(batch) == _ROWS or sum(map(len, batch)) + len(prompt) > self._tokens):
                yield batch
                batch = []
            batch.append(prompt)
        if batch:
            yield batch

    @torch.inference_mode()
    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
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

        def ids(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self._decoder.device)

        batch = StepBatch(ids(tokens), ids(rows), ids(positions), 0, spans, ids(ends))
        return self._decoder.states(self._step(self._memory, batch), batch, self._layers)
