"""Prompts that are read on a GPU: a pass is a captured graph of the engine's own step.

Prompts lie one after the other, as many tokens of them as there are; there is a graph for each of some numbers of
tokens, up to which they are padded. A pass is some hundreds of launches, each of which waits its turn where another
process keeps the GPU busy; a graph is one. Knows tokens; knows nothing of what the states are for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorauter.cuda_graphs import GraphRecorder, Landing, Recorded
from lorauter.engine import cuda_kernels as kernels
from lorauter.engine.cuda_runner import mixed_sizes
from lorauter.engine.cuda_step import CudaStep, query_blocks
from lorauter.engine.model import Decoder
from lorauter.engine.prompts import Packed
from lorauter.engine.step import Memory, StepBatch

_LEAST_TOKENS = 128  # of fewer a pass takes as long


def graph_sizes(most: int) -> list[int]:
    """Numbers of tokens that have graphs of their own, the last at least `most`."""
    sizes = mixed_sizes(most)
    return [size for size in sizes if size >= _LEAST_TOKENS] or sizes[-1:]


class PromptGraphs:
    """Reads prompts, one pass at a time.

    Args:
        decoder: the model, on a GPU.
        memory: of its steps, every row with its own blocks (`lorauter.engine.prompts.prompt_memory`).
        layers: after which of them states are wanted, from 1 on.
        sizes: numbers of tokens, ascending. All graphs are captured here.
    """

    def __init__(self, decoder: Decoder, memory: Memory, layers: Sequence[int], sizes: Sequence[int]) -> None:
        self._decoder = decoder
        self._memory = memory
        self._layers = layers
        self._rows = len(memory.table) - 1
        self._group = memory.heads // memory.kv_heads
        most = sum(self._lengths(sizes[-1]))
        self._here = torch.zeros(most, dtype=torch.int32, pin_memory=decoder.device.type == "cuda")
        self._there = torch.zeros(most, dtype=torch.int32, device=decoder.device)
        self._recorder = GraphRecorder(decoder.device)
        with self._recorder.alone():  # the largest first: the others use its memory
            self._graphs = {size: self._record(size) for size in sorted(sizes, reverse=True)}
        self._landing = Landing(self._graphs[max(sizes)].found)

    def _lengths(self, size: int) -> list[int]:
        queries = -(-size // kernels.query_tokens(self._group)) + min(size, self._rows)
        return [size, size, size, self._rows, 4 * queries, 2]

    def _parts(self, numbers: Tensor, size: int) -> Sequence[Tensor]:
        """Of the numbers of a pass its tokens, rows, positions, outputs, queries and counts: kernels read what lies at
        multiples of 16 bytes, as all but the last ones do."""
        lengths = self._lengths(size)
        return torch.split(numbers[: sum(lengths)], lengths)

    @torch.inference_mode()
    def _record(self, size: int) -> Recorded:
        tokens, rows, positions, outputs, queries, counts = self._parts(self._there, size)
        batch = StepBatch(tokens, rows, positions, 0, (), outputs, counts=counts, queries=queries.view(-1, 4))
        return self._recorder.record(lambda: self._decoder.states(CudaStep(self._memory, batch), batch, self._layers))

    @torch.inference_mode()
    def states(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(n, layers, hidden), on the CPU, of prompts that a pass has room for."""
        total = sum(map(len, prompts))
        size = min(size for size in self._graphs if size >= total)
        packed = Packed.of(prompts, size, self._rows)
        queries = query_blocks(packed.spans, 0, self._group)
        with self._recorder.alone():
            tokens, rows, positions, outputs, numbers, counts = (part.numpy() for part in self._parts(self._here, size))
            tokens[:], rows[:], positions[:] = packed.tokens, packed.rows, packed.positions
            outputs[: len(prompts)], outputs[len(prompts) :] = packed.ends, 0
            numbers[: queries.size] = queries.reshape(-1)
            counts[:] = 0, len(queries)
            end = sum(self._lengths(size))
            self._there[:end].copy_(self._here[:end], non_blocking=True)
            recorded = self._graphs[size]
            recorded.graph.replay()
            return self._landing.landed(recorded.found[: len(prompts)])
