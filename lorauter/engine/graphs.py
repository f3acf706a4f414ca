"""Decode steps captured as CUDA graphs, one for each batch size bucket, with and without adapters.

A graph reads its tokens, positions and mixtures from fixed buffers, writes the likeliest next tokens back into
them, and so can be replayed again before the host has seen what came out. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorauter.engine.kv_cache import KVCache
from lorauter.engine.lora import LoraBatch
from lorauter.engine.model import Decoder, StepBatch

NOT_FINITE = -1
"""In place of a token, where the logits are not finite."""
_LEAST_COLUMNS = 256


@dataclass(frozen=True)
class Flight:
    """A step on its way: its tokens are in `tokens` (n,), on the host, once `done` has happened."""

    tokens: Tensor
    logits: Tensor
    done: torch.cuda.Event

    def wait(self) -> list[int]:
        """The likeliest tokens."""
        self.done.synchronize()
        result: list[int] = self.tokens.tolist()
        return result


def buckets(max_batch: int) -> list[int]:
    """Batch sizes that have graphs of their own, the last at least `max_batch`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_batch + 32, 32)]
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < max_batch]


class DecodeGraphs:
    """Graphs over one model and cache, whose last row is for the padding.

    Args:
        model: on a GPU.
        cache: with one row more than `max_batch`.
        max_batch: rows that decode at once at most.
    """

    def __init__(self, model: Decoder, cache: KVCache, max_batch: int) -> None:
        self._model = model
        self._cache = cache
        self._buckets = buckets(max_batch)
        size, device = self._buckets[-1], model.device
        self._tokens = torch.zeros(size, dtype=torch.long, device=device)
        self._positions = torch.zeros(size, dtype=torch.long, device=device)
        self._rows = torch.full((size,), max_batch, dtype=torch.long, device=device)
        self._outputs = torch.arange(size, device=device)
        self._chosen = torch.zeros(size, dtype=torch.long, device=device)
        self._buffers = LoraBatch({}, generation=-1)
        self._lora: LoraBatch | None = None
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None

    def set_rows(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Where rows 0, 1, ... go on: the token of each and its position."""
        padding = self._tokens.shape[0] - len(tokens)
        scratch = self._cache.keys.shape[1] - 1
        rows = [*range(len(tokens)), *[scratch] * padding]
        values = torch.tensor([[*tokens, *[0] * padding], [*positions, *[0] * padding], rows]).pin_memory()
        block = values.to(self._tokens.device, non_blocking=True)
        for buffer, row in zip((self._tokens, self._positions, self._rows), block, strict=True):
            buffer.copy_(row)

    def set_mixtures(self, lora: LoraBatch | None) -> None:
        """The mixtures of rows 0, 1, ..., or None for the base model alone."""
        if lora is None:
            self._lora = None
            return
        known = self._buffers.groups
        if lora.generation != self._buffers.generation or any(
            key not in known or known[key].mask.shape[1] < group.mask.shape[1] for key, group in lora.groups.items()
        ):
            self._graphs = {key: graph for key, graph in self._graphs.items() if not key[1]}
            self._buffers = self._make_buffers(lora)
        for key, buffer in self._buffers.groups.items():
            buffer.starts.zero_()
            if key in lora.groups:
                group = lora.groups[key]
                rows, columns = group.mask.shape
                buffer.starts.copy_(group.starts)
                buffer.a_places[:columns].copy_(group.a_places)
                buffer.b_places[:columns].copy_(group.b_places)
                buffer.mask[:, :columns].zero_()
                buffer.mask[:rows, :columns].copy_(group.mask)
        self._lora = self._buffers

    def _make_buffers(self, lora: LoraBatch) -> LoraBatch:
        """What adapter graphs read, for these groups and those that were there before, if the stacks are the same.

        Powers of two, so that few changes of the batch need new graphs; only the columns in use cost time.
        """
        groups = dict(self._buffers.groups) if lora.generation == self._buffers.generation else {}
        for key, group in lora.groups.items():
            capacity = max(_LEAST_COLUMNS, 1 << (group.mask.shape[1] - 1).bit_length())
            if key not in groups or groups[key].mask.shape[1] < capacity:
                groups[key] = replace(
                    group,
                    starts=torch.zeros_like(group.starts),
                    a_places=group.a_places.new_zeros(capacity),
                    b_places=group.b_places.new_zeros(capacity),
                    mask=group.mask.new_zeros(self._tokens.shape[0], capacity),
                )
        return LoraBatch(groups, lora.generation)

    def replay(self, n: int) -> Flight:
        """Run a step of rows 0..n-1. The buffers then hold the next step's tokens and positions."""
        size = next(bucket for bucket in self._buckets if bucket >= n)
        graph, logits = self._graph(size, self._lora)
        graph.replay()
        tokens = torch.empty(n, dtype=torch.long, pin_memory=True)
        tokens.copy_(self._chosen[:n], non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Flight(tokens, logits[:n], done)

    def _graph(self, size: int, lora: LoraBatch | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        key = size, lora is not None
        if key not in self._graphs:
            tokens, positions = self._tokens.clone(), self._positions.clone()
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compile and warm up what may not happen in a capture
                self._step(size, lora)
            torch.cuda.current_stream().wait_stream(side)
            self._tokens.copy_(tokens)
            self._positions.copy_(positions)
            graph = torch.cuda.CUDAGraph()
            pool = self._pool if self._graphs else None  # it went with the last graph that used it
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self._step(size, lora)
            self._pool = graph.pool()
            self._graphs[key] = graph, logits
        return self._graphs[key]

    @torch.inference_mode()
    def _step(self, size: int, lora: LoraBatch | None) -> Tensor:
        batch = StepBatch(
            self._tokens[:size],
            self._positions[:size],
            size,
            (),
            self._outputs[:size],
            [(slice(size), lora.select(slice(size)))] if lora is not None else [],
            self._rows[:size],
        )
        logits = self._model.forward(batch, self._cache)
        best, chosen = logits.max(dim=-1)
        self._chosen[:size] = torch.where(best.isfinite(), chosen, NOT_FINITE)
        self._tokens[:size] = chosen
        self._positions[:size] += 1
        return logits
