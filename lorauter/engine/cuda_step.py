"""One forward pass with the GPU's kernels. Knows tensors; knows nothing of requests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorauter.engine import cuda_kernels as kernels
from lorauter.engine.cuda_mixtures import CudaMixtures
from lorauter.engine.cuda_own import OWN_GROUPS
from lorauter.engine.plan import Ints
from lorauter.engine.sampling import to_device
from lorauter.engine.step import Memory, RmsNorm, Span, StepBatch

_TOGETHER = 2048  # tokens whose shrunk inputs are held at once: 128 MiB in bf16
_LISTED = 64  # tokens that have a list of tiles together
_NO_QUERIES = np.zeros((0, 4), np.int32)


class CudaStep:
    """See `lorauter.engine.step.Step`."""

    def __init__(self, memory: Memory, batch: StepBatch) -> None:
        self._memory = memory
        self._batch = batch
        self._tokens = len(batch.tokens)
        if batch.counts is not None and batch.queries is not None:
            self._counts, self._queries = batch.counts, batch.queries
        else:
            device = batch.tokens.device
            queries = query_blocks(batch.spans, batch.decoding, memory.heads // memory.kv_heads)
            self._queries = to_device(torch.from_numpy(queries), device)
            self._counts = to_device(torch.tensor([batch.decoding, len(queries)], dtype=torch.int32), device)
        self._mixtures: CudaMixtures | None = batch.mixtures
        self._own = OWN_GROUPS if self._mixtures is not None and batch.own else frozenset()
        self._live: dict[str, Tensor | None] = {}  # by group, which tiles concern which tokens
        if self._mixtures is not None:
            groups = {
                first: group
                for first, group in self._mixtures.of_group.items()
                if first not in self._own and (batch.adapted is None or first in batch.adapted)
            }
            lists = kernels.lora_live(
                batch.rows, self._mixtures.weights, [(group.tiles, group.starts) for group in groups.values()]
            )
            self._live = dict(zip(groups, lists, strict=True))
        self._shrunk: kernels.Expand | None = None
        self._late: kernels.Expand | kernels.OwnExpand | None = None  # what `attention` or `silu_mul` adds
        self._narrow: Tensor | None = None  # what the last norm was shrunk to
        self._behind: tuple[Tensor, kernels.Own] | None = None  # what `add_norm` adds

    def add_norm(
        self, x: Tensor, delta: Tensor | None, norm: RmsNorm, reads: tuple[int, str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Step.add_norm`."""
        own = self._own_of(*reads) if reads is not None and reads[1] in self._own else None
        behind, self._behind = self._behind, None
        if own is None and behind is None:
            return kernels.add_norm(x, delta, norm.weight, norm.eps)
        total, normed, self._narrow = kernels.own_norm(x, delta, norm.weight, norm.eps, behind, own)
        return total, normed

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Step.silu_mul`."""
        return kernels.silu_mul(gate_up, self._take_late())

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """Shrink the input on a second stream, beside the base product: alone, neither fills the GPU."""
        if self._mixtures is not None and first in self._live and self._tokens <= _TOGETHER:
            stream = _second_stream(x.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._shrunk = self._shrink(self._mixtures, layer, first, x, 0)

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `Step.add_lora`."""
        if self._mixtures is None:
            return
        if first in self._own:
            self._add_own(self._mixtures, layer, first, x, y)
            return
        if first not in self._live:
            return
        if self._shrunk is None:
            for start in range(0, self._tokens, _TOGETHER):
                part = self._shrink(self._mixtures, layer, first, x, start)
                self._expand(y[start : start + _TOGETHER], part, first)
            return
        torch.cuda.current_stream().wait_stream(_second_stream(x.device))
        shrunk, self._shrunk = self._shrunk, None
        if self._mixtures.of_group[first].fused:
            self._late = shrunk
        else:
            self._expand(y, shrunk, first)

    def _add_own(self, mixtures: CudaMixtures, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """Leave it to whoever reads the product, if that is a kernel that can."""
        group, own = mixtures.of_group[first], self._own_of(layer, first)
        if group.fused:
            assert self._narrow is not None
            self._late = kernels.OwnExpand(self._narrow, own)
        elif first == "o_proj" or layer < mixtures.layers - 1:
            self._behind = x, own
        else:
            kernels.own_add(y, x, own)

    def _own_of(self, layer: int, first: str) -> kernels.Own:
        assert self._mixtures is not None
        group = self._mixtures.of_group[first]
        targets = len(group.group.targets)
        return kernels.Own(self._batch.rows, group.own, self._mixtures.arena, layer, self._mixtures.layers, targets)

    def _shrink(self, mixtures: CudaMixtures, layer: int, first: str, x: Tensor, start: int) -> kernels.Expand:
        """What the mixtures make of the inputs from token `start` on, to be expanded."""
        group, live = mixtures.of_group[first], self._live[first]
        here = slice(start, start + _TOGETHER)
        live = live[start // _LISTED :] if live is not None else None
        where = (group.tiles, group.starts, mixtures.arena, layer, mixtures.layers)
        u = kernels.lora_shrink(x[here], self._batch.rows[here], *where, mixtures.weights, live)
        return kernels.Expand(u, *where, live)

    def _expand(self, y: Tensor, lora: kernels.Expand, first: str) -> None:
        where = (lora.tiles, lora.starts, lora.arena, lora.layer, lora.layers)
        kernels.lora_expand(y, lora.u, *where, self._widths(first), lora.live)

    def _widths(self, first: str) -> Sequence[int]:
        assert self._mixtures is not None
        return self._mixtures.of_group[first].group.widths

    def _take_late(self) -> kernels.Expand | kernels.OwnExpand | None:
        late, self._late = self._late, None
        return late

    def attention(
        self, layer: int, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None, window: int | None
    ) -> Tensor:
        """See `Step.attention`."""
        memory, batch = self._memory, self._batch
        heads = qkv.view(self._tokens, -1, memory.head_dim)
        late = self._take_late()
        assert not isinstance(late, kernels.OwnExpand)
        if q_norm is not None and k_norm is not None:
            if late is not None:
                self._expand(qkv, late, "q_proj")
            late = None
            heads = heads.clone()
            heads[:, : memory.heads] = q_norm(heads[:, : memory.heads])
            heads[:, memory.heads : -memory.kv_heads] = k_norm(heads[:, memory.heads : -memory.kv_heads])
        keys, values = memory.cache.keys[layer], memory.cache.values[layer]
        q = kernels.rotate_and_store(
            heads, memory.cos, memory.sin, batch.rows, batch.positions, memory.table, keys, values, memory.heads, late
        )
        out = q.new_empty(self._tokens, memory.heads * memory.head_dim)
        if batch.decoding:
            kernels.decode_attention(
                q[: batch.decoding], keys, values, memory.table, batch.rows, batch.positions, self._counts, window,
                memory.length, out,
            )  # fmt: skip
        if len(self._queries):
            kernels.prefill_attention(q, keys, values, memory.table, self._queries, self._counts, window, out)
        return out


def query_blocks(spans: Sequence[Span] | Ints, first: int, group: int) -> Ints:
    """The query blocks of prompt pieces whose tokens follow one another from `first` on.

    Args:
        spans: n of them, or the same as (n, 3).

    Returns:
        (n, 4): of each its first token, how many it has, its row, and its first position.
    """
    if not len(spans):
        return _NO_QUERIES
    size = kernels.query_tokens(group)
    rows, starts, lengths = np.asarray(spans, np.int32).T
    counts = -(-lengths // size)
    span = np.repeat(np.arange(len(spans)), counts)  # of each block
    before = (np.arange(len(span)) - np.repeat(counts.cumsum() - counts, counts)) * size  # tokens of its span
    firsts = first + lengths.cumsum() - lengths
    blocks = firsts[span] + before, np.minimum(size, lengths[span] - before), rows[span], starts[span] + before
    return np.stack(blocks, axis=1).astype(np.int32)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
