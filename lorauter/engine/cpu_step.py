"""One forward pass with the CPU's kernels. Knows tensors; knows nothing of requests."""

from __future__ import annotations

import torch
from torch import Tensor

from lorauter.engine.cpu_kernels import CpuKernels, load_kernels
from lorauter.engine.mixtures import Mixtures
from lorauter.engine.step import Memory, RmsNorm, StepBatch
from lorauter.engine.torch_step import attend

_FEW, _SHORT = 64, 1 << 16  # tokens, and products of queries and keys, above which PyTorch's attention is faster


class CpuStep:
    """See `lorauter.engine.step.Step`. No token meets columns that it does not use."""

    def __init__(self, memory: Memory, batch: StepBatch) -> None:
        self._memory = memory
        self._batch = batch
        kernels = load_kernels(memory.cos.dtype)
        assert kernels is not None
        self._kernels: CpuKernels = kernels

    def add_norm(
        self, x: Tensor, delta: Tensor | None, norm: RmsNorm, reads: tuple[int, str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Step.add_norm`."""
        return self._kernels.add_norm(x, delta, norm.weight, norm.eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Step.silu_mul`."""
        return self._kernels.silu_mul(gate_up)

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """See `Step.begin_lora`."""

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `Step.add_lora`."""
        mixtures: Mixtures | None = self._batch.mixtures
        if mixtures is not None:
            self._kernels.lora_add(layer, x, y, self._batch.rows, mixtures.native(first))

    def attention(
        self, layer: int, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None, window: int | None
    ) -> Tensor:
        """See `Step.attention`."""
        memory, batch, kernels = self._memory, self._batch, self._kernels
        heads = qkv.view(qkv.shape[0], -1, memory.head_dim)
        if q_norm is not None and k_norm is not None:
            heads[:, : memory.heads] = q_norm(heads[:, : memory.heads])
            heads[:, memory.heads : -memory.kv_heads] = k_norm(heads[:, memory.heads : -memory.kv_heads])
        keys, values = memory.cache.keys[layer], memory.cache.values[layer]
        q = kernels.rotate_and_store(
            heads, memory.cos, memory.sin, batch.rows, batch.positions, memory.table, keys, values, memory.heads
        )
        out = torch.empty_like(q)
        offset = batch.decoding
        if offset:
            kernels.decode_attention(q[:offset], keys, values, memory.table, batch.rows, batch.positions, window, out)
        for span in batch.spans:
            here = slice(offset, offset + span.length)
            offset += span.length
            if q.dtype == torch.bfloat16 and span.length >= _FEW and span.length * (span.start + span.length) > _SHORT:
                out[here] = attend(q[here], keys, values, memory.table[span.row], span, window)
                continue
            kernels.prefill_attention(q[here], keys, values, memory.table, span.row, span.start, window, out[here])
        return out.view(out.shape[0], -1)
