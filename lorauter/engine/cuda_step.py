"""One forward pass with the kernels: no synchronisation with the host while rows decode, so a graph can hold it.

Knows tensors and layers; knows nothing of requests.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from lorauter.engine import cuda_kernels as kernels
from lorauter.engine.kv_cache import KVCache
from lorauter.engine.torch_step import TorchStep

if TYPE_CHECKING:
    from lorauter.engine.model import Decoder, Layer, Norm, StepBatch

_FUSED_TOKENS = 256  # up to here the fused kernels, beyond it matrix products


class CudaStep(TorchStep):
    """The parts of a forward pass that are more than a matrix product, fused."""

    def __init__(self, model: Decoder, batch: StepBatch, cache: KVCache) -> None:
        self._model = model
        self._batch = batch
        self._cache = cache
        self._cos_table, self._sin_table = model.rotary_table(cache.length)
        self._rows = batch.cache_rows()
        self._prefill_masks = {}
        self._shrunk: list[Tensor] = []
        self._fresh = [span for span in batch.spans if span.start == 0]
        if self._fresh:
            self._lay_out_fresh_spans()

    def _lay_out_fresh_spans(self) -> None:
        """Make indices from a (spans, longest) rectangle, padded to the right, to packed tokens and back."""
        offset, longest = self._batch.decoding, max(span.length for span in self._fresh)
        packed: list[int] = []
        unpacked: list[int] = []
        for span in self._batch.spans:
            if span.start == 0:
                first = len(packed)
                packed += [*range(offset, offset + span.length), *[offset] * (longest - span.length)]
                unpacked += range(first, first + span.length)
            offset += span.length
        device = self._batch.positions.device
        self._rectangle = torch.tensor(packed, device=device).view(len(self._fresh), longest)
        self._inside = torch.tensor(unpacked, device=device)
        self._fresh_rows = torch.tensor([span.row for span in self._fresh], device=device)

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """See `TorchStep.add_norm`."""
        return kernels.add_norm(x, delta, norm.weight, norm.eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `TorchStep.silu_mul`."""
        return kernels.silu_mul(gate_up)

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """Shrink the input on a second stream, beside the base product: alone, neither fills the GPU."""
        for tokens, lora in self._batch.lora:
            group = lora.groups.get(first)
            if group is not None and x[tokens].shape[0] <= _FUSED_TOKENS:
                stream = _second_stream(x.device)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    shrunk = kernels.lora_shrink(x[tokens], group.a[layer], group.a_places, group.starts, group.mask)
                self._shrunk.append(shrunk)

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `TorchStep.add_lora`."""
        if self._shrunk:
            torch.cuda.current_stream().wait_stream(_second_stream(x.device))
        for tokens, lora in self._batch.lora:
            group = lora.groups.get(first)
            if group is None:
                continue
            if x[tokens].shape[0] > _FUSED_TOKENS:
                group.add(layer, x[tokens], y[tokens])
            else:
                bs = [b[layer] for b in group.bs]
                kernels.lora_expand(y[tokens], self._shrunk.pop(0), group.starts, group.b_places, bs)

    def attention(self, i: int, layer: Layer, qkv: Tensor) -> Tensor:
        """See `TorchStep.attention`."""
        model, batch = self._model, self._batch
        n, decoding = qkv.shape[0], batch.decoding
        keys, values = self._cache.keys[i], self._cache.values[i]
        heads = qkv.view(n, -1, model.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            heads = heads.clone()
            heads[:, : model.heads] = layer.q_norm(heads[:, : model.heads])
            heads[:, model.heads : -model.kv_heads] = layer.k_norm(heads[:, model.heads : -model.kv_heads])
        q = kernels.rotate_and_store(
            heads, self._cos_table, self._sin_table, self._rows, batch.positions, keys, values, model.heads
        )
        if decoding == n:
            return kernels.decode_attention(q, keys, values, self._rows, batch.positions, layer.window)
        out = torch.empty_like(q)
        if decoding:
            out[:decoding] = kernels.decode_attention(
                q[:decoding], keys, values, self._rows[:decoding], batch.positions[:decoding], layer.window
            ).view(decoding, model.heads, model.head_dim)
        offset = decoding
        if self._fresh and layer.window is None:
            self._attend_fresh(q, keys, values, out)
        for span in batch.spans:
            here = slice(offset, offset + span.length)
            if span.start or layer.window is not None:
                out[here] = self._prefill(q[here], keys[span.row], values[span.row], span, layer.window)
            offset += span.length
        return out.view(n, -1)

    def _attend_fresh(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Whole prompts, padded to the right: causal attention never looks there, so no mask is needed.

        Keys and values are read back from where they were just written.
        """
        model, fresh = self._model, self._fresh
        rows, longest = [span.row for span in fresh], self._rectangle.shape[1]
        even = len(self._inside) == self._rectangle.numel() and len(fresh) == len(self._batch.spans)
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        where: slice | Tensor = slice(rows[0], rows[0] + len(rows)) if adjacent else self._fresh_rows
        first = self._batch.decoding
        queries = q[first:].view(len(fresh), longest, *q.shape[1:]) if even else q[self._rectangle]
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys[where, :, :longest],
            values[where, :, :longest],
            is_causal=True,
            enable_gqa=model.heads != model.kv_heads,
        )
        flat = attended.transpose(1, 2).reshape(-1, model.heads, model.head_dim)
        if even:
            out[first:] = flat
        else:
            out[self._rectangle.view(-1)[self._inside]] = flat[self._inside]


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
