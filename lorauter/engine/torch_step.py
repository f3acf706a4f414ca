"""One forward pass in plain PyTorch: what runs on CPU, and what the kernels are held against.

Knows tensors and layers; knows nothing of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from lorauter.engine.kv_cache import KVCache

if TYPE_CHECKING:
    from lorauter.engine.model import Decoder, Layer, Norm, PrefillSpan, StepBatch


class TorchStep:
    """The parts of a forward pass that are more than a matrix product."""

    def __init__(self, model: Decoder, batch: StepBatch, cache: KVCache) -> None:
        self._model = model
        self._batch = batch
        self._cache = cache
        cos, sin = model.rotary_table(cache.length)
        self._cos, self._sin = cos[batch.positions, None], sin[batch.positions, None]
        self._rows = batch.cache_rows()
        self._decode_masks: dict[int | None, Tensor] = {}
        self._prefill_masks: dict[tuple[PrefillSpan, int | None], Tensor] = {}

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """`x + delta` (x alone without it), and its norm."""
        x = x if delta is None else x + delta
        return x, norm(x)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up`, the halves of the last dimension."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """Called before the base product of the same input, for what can go on beside it."""

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """Add the mixture's change to `y` (tokens, out), in the targets of which `first` is the first."""
        for tokens, lora in self._batch.lora:
            group = lora.groups.get(first)
            if group is not None:
                group.add(layer, x[tokens], y[tokens])

    def attention(self, i: int, layer: Layer, qkv: Tensor) -> Tensor:
        """Rotate, write keys and values to the cache, attend: (tokens, q + k + v) to (tokens, heads * head_dim)."""
        model, batch = self._model, self._batch
        q, k, v = (t.view(t.shape[0], -1, model.head_dim) for t in torch.split(qkv, model.qkv_widths, dim=-1))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k = self._rotate(q), self._rotate(k)
        keys, values = self._cache.keys[i], self._cache.values[i]
        keys[self._rows, :, batch.positions] = k
        values[self._rows, :, batch.positions] = v
        out = torch.empty_like(q)
        decoding = batch.decoding
        if decoding:
            out[:decoding] = self._decode(q[:decoding], keys, values, layer.window)
        offset = decoding
        for span in batch.spans:
            here = slice(offset, offset + span.length)
            out[here] = self._prefill(q[here], keys[span.row], values[span.row], span, layer.window)
            offset += span.length
        return out.view(out.shape[0], -1)

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding (RoFormer, arXiv 2104.09864), halves as transformers lays them out."""
        first, second = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((-second, first), dim=-1) * self._sin

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        n = q.shape[0]
        if window not in self._decode_masks:
            positions = self._batch.positions[:n]
            allowed = _mask(positions, int(positions.max()) + 1, window)[:, None, None]
            # Added to the scores: PyTorch would make this of a boolean mask anew in every layer.
            self._decode_masks[window] = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
        mask = self._decode_masks[window]
        length = mask.shape[-1]
        # Grouped queries as extra query positions: exact, and no key is copied.
        grouped = q.view(n, self._model.kv_heads, -1, self._model.head_dim)
        attended = F.scaled_dot_product_attention(grouped, keys[:n, :, :length], values[:n, :, :length], attn_mask=mask)
        return attended.reshape(q.shape)

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, span: PrefillSpan, window: int | None) -> Tensor:
        group, end = self._model.heads // self._model.kv_heads, span.start + span.length
        if (span, window) not in self._prefill_masks:
            positions = torch.arange(span.start, end, device=q.device)
            allowed = _mask(positions, end, window).repeat(group, 1)
            mask = torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
            self._prefill_masks[span, window] = mask
        grouped = q.view(span.length, self._model.kv_heads, group, self._model.head_dim).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(
            grouped.reshape(1, self._model.kv_heads, group * span.length, self._model.head_dim),
            keys[None, :, :end],
            values[None, :, :end],
            attn_mask=self._prefill_masks[span, window],
        )
        attended = attended.view(self._model.kv_heads, group, span.length, self._model.head_dim).permute(2, 0, 1, 3)
        return attended.reshape(q.shape)


def _mask(positions: Tensor, length: int, window: int | None) -> Tensor:
    """(positions, length): which keys each position attends to."""
    keys = torch.arange(length, device=positions.device)
    mask = keys <= positions[:, None]
    return mask if window is None else mask & (keys > positions[:, None] - window)
