"""One forward pass in plain PyTorch: what runs where there are no kernels, and what kernels are held against.

Knows tensors; knows nothing of requests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from lorauter.engine.blocks import BLOCK
from lorauter.engine.mixtures import Mixtures, RowMixture
from lorauter.engine.step import Memory, RmsNorm, Span, StepBatch


class TorchStep:
    """See `lorauter.engine.step.Step`."""

    def __init__(self, memory: Memory, batch: StepBatch) -> None:
        self._memory = memory
        self._batch = batch
        self._cos, self._sin = memory.cos[batch.positions, None], memory.sin[batch.positions, None]
        table = memory.table[batch.rows]
        self._blocks = table.gather(1, (batch.positions // BLOCK)[:, None].long())[:, 0]
        self._spans = [
            *[Span(row, start, 1) for row, start in zip(
                batch.rows[: batch.decoding].tolist(), batch.positions[: batch.decoding].tolist(), strict=True
            )],
            *batch.spans,
        ]  # fmt: skip
        mixtures: Mixtures | None = batch.mixtures
        self._adapted = [] if mixtures is None else _tokens_of_rows(mixtures, batch.rows)

    def add_norm(
        self, x: Tensor, delta: Tensor | None, norm: RmsNorm, reads: tuple[int, str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Step.add_norm`."""
        x = x if delta is None else x + delta
        return x, norm(x)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Step.silu_mul`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """See `Step.begin_lora`."""

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `Step.add_lora`."""
        mixtures: Mixtures | None = self._batch.mixtures
        if mixtures is None:
            return
        group = next(group for group in mixtures.groups if group.first == first)
        for tokens, mixture in self._adapted:
            for placed, weight in mixture:
                offset = 0
                for target, width in zip(group.targets, group.widths, strict=True):
                    if target in placed.parts:
                        a, b = mixtures.pair(placed.parts[target], layer, group.inputs, width)
                        y[tokens, offset : offset + width] += weight * (x[tokens] @ a.T) @ b
                    offset += width

    def attention(
        self, layer: int, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None, window: int | None
    ) -> Tensor:
        """See `Step.attention`."""
        memory = self._memory
        q, k, v = self._heads(qkv, q_norm, k_norm)
        keys, values = memory.cache.keys[layer], memory.cache.values[layer]
        keys[self._blocks, :, self._batch.positions % BLOCK] = k
        values[self._blocks, :, self._batch.positions % BLOCK] = v
        out, offset = torch.empty_like(q), 0
        for span in self._spans:
            here = slice(offset, offset + span.length)
            out[here] = attend(q[here], keys, values, memory.table[span.row], span, window)
            offset += span.length
        return out.view(out.shape[0], -1)

    def _heads(self, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (tokens, heads, head_dim) each, normalised and rotated."""
        memory = self._memory
        heads = qkv.view(qkv.shape[0], -1, memory.head_dim)
        q, k, v = torch.split(heads, [memory.heads, memory.kv_heads, memory.kv_heads], dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        return self._rotate(q), self._rotate(k), v

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding (RoFormer, arXiv 2104.09864), halves as transformers lays them out."""
        first, second = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((-second, first), dim=-1) * self._sin


def attend(q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, span: Span, window: int | None) -> Tensor:
    """Causal attention of one piece: q and the result (tokens, heads, head_dim), blocks the row's."""
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    group, end = q.shape[1] // kv_heads, span.start + span.length
    first = 0 if window is None else max(0, span.start - window + 1) // BLOCK
    mine = blocks[first : -(-end // BLOCK)]
    lengths = (slice(None), slice(0, end - first * BLOCK))
    key = keys[mine].transpose(0, 1).reshape(kv_heads, -1, head_dim)[lengths]
    value = values[mine].transpose(0, 1).reshape(kv_heads, -1, head_dim)[lengths]
    # Grouped queries as extra query positions: exact, and no key is copied.
    grouped = q.view(span.length, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    mask = None
    if span.length > 1 or window is not None:
        positions = torch.arange(span.start, end, device=q.device)
        seen = torch.arange(first * BLOCK, end, device=q.device)
        allowed = seen <= positions[:, None]
        if window is not None:
            allowed &= seen > positions[:, None] - window
        mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -torch.inf).repeat(group, 1)
    attended = F.scaled_dot_product_attention(grouped[None], key[None], value[None], attn_mask=mask)[0]
    return attended.view(kv_heads, group, span.length, head_dim).permute(2, 0, 1, 3).reshape(q.shape)


def _tokens_of_rows(mixtures: Mixtures, rows: Tensor) -> list[tuple[Tensor, RowMixture]]:
    """The tokens of every row that has adapters, with its mixture."""
    adapted = [row for row in set(rows.tolist()) if mixtures.rows[row]]
    return [((rows == row).nonzero()[:, 0], mixtures.rows[row]) for row in adapted]
