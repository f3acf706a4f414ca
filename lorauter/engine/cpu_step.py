"""One forward pass with the CPU's kernels. Knows tensors and layers; knows nothing of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorauter.engine.cpu_kernels import CpuKernels, load_kernels
from lorauter.engine.kv_cache import KVCache
from lorauter.engine.torch_step import TorchStep

if TYPE_CHECKING:
    from lorauter.engine.model import Decoder, Layer, Norm, StepBatch


class CpuStep(TorchStep):
    """What a forward pass is beside the base's products, fused; no token meets columns that it does not use."""

    def __init__(self, model: Decoder, batch: StepBatch, cache: KVCache) -> None:
        self._model = model
        self._batch = batch
        self._cache = cache
        kernels = load_kernels(model.dtype)
        assert kernels is not None
        self._kernels: CpuKernels = kernels
        self._cos_table, self._sin_table = model.rotary_table(cache.length)
        self._positions = batch.positions.contiguous()
        self._rows = batch.cache_rows().contiguous()
        self._prefill_masks = {}

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """See `TorchStep.add_norm`."""
        return self._kernels.add_norm(x, delta, norm.weight, norm.eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `TorchStep.silu_mul`."""
        return self._kernels.silu_mul(gate_up)

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `TorchStep.add_lora`."""
        for tokens, lora in self._batch.lora:
            group = lora.groups.get(first)
            if group is not None:
                self._kernels.lora_add(layer, x, y, tokens, group.sparse)

    def attention(self, i: int, layer: Layer, qkv: Tensor) -> Tensor:
        """See `TorchStep.attention`."""
        model, batch = self._model, self._batch
        heads = qkv.view(qkv.shape[0], -1, model.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            heads[:, : model.heads] = layer.q_norm(heads[:, : model.heads])
            heads[:, model.heads : -model.kv_heads] = layer.k_norm(heads[:, model.heads : -model.kv_heads])
        keys, values = self._cache.keys[i], self._cache.values[i]
        q = self._kernels.rotate_and_store(
            heads, self._cos_table, self._sin_table, self._rows, self._positions, keys, values, model.heads
        )
        out = torch.empty_like(q)
        decoding = batch.decoding
        if decoding:
            self._kernels.decode_attention(q[:decoding], keys, values, self._positions, layer.window, out)
        offset = decoding
        for span in batch.spans:
            here = slice(offset, offset + span.length)
            out[here] = self._prefill(q[here], keys[span.row], values[span.row], span, layer.window)
            offset += span.length
        return out.view(out.shape[0], -1)
