"""Prompts that are read on a GPU, by a captured graph for each shape that they are padded to.

A pass is some thousand launches, each of which waits its turn where another process keeps the GPU busy; a graph is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorauter.cuda_graphs import GraphRecorder, Recorded, landed, uploaded
from lorauter.engine.model import Decoder
from lorauter.engine.step import Memory, Span, StepBatch, StepClass

_LEAST_LENGTH = 32
_MOST_TOKENS = 8192  # of a shape: of more, launches are not what takes time
_ALIKE = 0.99


class PromptGraphs:
    """Reads prompts side by side, each padded behind its end, where nothing that is read looks.

    Args:
        decoder: the model, on a GPU.
        memory: of its steps.
        step: reads whole prompts, without a cache.
        layers: after which of them states are wanted, from 1 on.
    """

    def __init__(self, decoder: Decoder, memory: Memory, step: StepClass, layers: Sequence[int]) -> None:
        self._decoder = decoder
        self._memory = memory
        self._step = step
        self._layers = layers
        self._graphs: dict[tuple[int, int], tuple[Recorded, Tensor, Tensor]] = {}
        self._recorder = GraphRecorder(decoder.device)

    def shape(self, prompts: Sequence[Sequence[int]]) -> tuple[int, int] | None:
        """What prompts are padded to: powers of two; None where they are too many tokens."""
        longest = max(map(len, prompts))
        length = min(self._memory.length, max(_LEAST_LENGTH, 1 << (longest - 1).bit_length()))
        rows = 1 << (len(prompts) - 1).bit_length()
        return (rows, length) if rows * length <= _MOST_TOKENS else None

    @torch.inference_mode()
    def states(self, prompts: Sequence[Sequence[int]], shape: tuple[int, int]) -> Tensor:
        """(n, layers, hidden) of n prompts, on the CPU."""
        tokens, ends = filled(prompts, shape)
        with self._recorder.alone():
            recorded, all_tokens, all_ends = self._graphs.get(shape) or self._record(shape)
            uploaded(tokens, all_tokens)
            uploaded(ends, all_ends)
            recorded.graph.replay()
            return landed(recorded.found[: len(prompts)])

    def _record(self, shape: tuple[int, int]) -> tuple[Recorded, Tensor, Tensor]:
        batch = grid(shape, self._decoder.device)
        step = self._step(self._memory, batch)
        recorded = self._recorder.record(lambda: self._decoder.states(step, batch, self._layers))
        assert batch.outputs is not None
        self._graphs[shape] = recorded, batch.tokens, batch.outputs
        return self._graphs[shape]


def grid(shape: tuple[int, int], device: torch.device) -> StepBatch:
    """A batch of so many prompts of so many tokens each, of which all are the first token of the vocabulary."""
    rows, length = shape
    place = torch.arange(rows * length, dtype=torch.int32, device=device)
    spans = [Span(row, 0, length) for row in range(rows)]
    ends = torch.arange(rows, dtype=torch.int32, device=device) * length
    return StepBatch(torch.zeros_like(place), place // length, place % length, 0, spans, ends)


def filled(prompts: Sequence[Sequence[int]], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The tokens of a grid that has these prompts, and where each row's last one is."""
    rows, length = shape
    tokens = torch.zeros(shape, dtype=torch.int32)
    ends = torch.arange(rows, dtype=torch.int32) * length
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        ends[row] += len(prompt) - 1
    return tokens.view(-1), ends


def alike(states: Tensor, others: Tensor) -> bool:
    """Whether states are the same but for the last bits of other kernels."""
    return bool((torch.cosine_similarity(states.float(), others.float(), dim=-1) > _ALIKE).all())
