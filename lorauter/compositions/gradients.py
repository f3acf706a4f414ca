"""A forward pass through which gradients go to weights of adapters, and to nothing else, in few passes over memory.

Base weights and adapters are fixed: each part has its gradient by hand, keeps no more than that needs, and makes no
copy that PyTorch's own would. Knows tensors; knows nothing of examples or losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.autograd import Function

from lorauter.compositions.stack import AdapterStack
from lorauter.engine.model import Decoder
from lorauter.engine.step import RmsNorm


class GradientStep:
    """See `lorauter.engine.step.Step`: rows of one length, whole, without a cache.

    Args:
        decoder: a plain one.
        weights: of each row: by the first target of a group (rows, layers, R), as `AdapterStack.columns` has them.
        length: of a row.
    """

    def __init__(self, decoder: Decoder, stack: AdapterStack, weights: Mapping[str, Tensor], length: int) -> None:
        self._decoder = decoder
        self._stack = stack
        self._weights = {first: of.unbind(1) for first, of in weights.items()}
        self._length = length
        # Made without gradients, which autograd takes no copy of. Halves are alike, as transformers lays them out.
        self._cos, self._sin = (table.clone()[:, None] for table in decoder.rotary_table(length))

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: RmsNorm) -> tuple[Tensor, Tensor]:
        """See `Step.add_norm`."""
        total, normed = _AddNorm.apply(x, delta, norm.weight, norm.eps)  # type: ignore[no-untyped-call]
        return total, normed

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """See `Step.begin_lora`."""

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `Step.add_lora`."""
        if first in self._weights:
            a, b = self._stack.a[first][layer], self._stack.b[first][layer]
            _AddLora.apply(y, x, self._weights[first][layer], a, b)  # type: ignore[no-untyped-call]

    def attention(
        self, layer: int, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None, window: int | None
    ) -> Tensor:
        """See `Step.attention`."""
        decoder = self._decoder
        heads = qkv.view(-1, self._length, decoder.heads + 2 * decoder.kv_heads, decoder.head_dim)
        qk, v = torch.split(heads, [decoder.heads + decoder.kv_heads, decoder.kv_heads], 2)
        if q_norm is not None and k_norm is not None:
            q, k = torch.split(qk, [decoder.heads, decoder.kv_heads], 2)
            qk = torch.cat((q_norm(q), k_norm(k)), 2)
        turned = _Rotate.apply(qk, self._cos, self._sin)  # type: ignore[no-untyped-call]
        q, k = torch.split(turned.transpose(1, 2), [decoder.heads, decoder.kv_heads], 1)
        group = decoder.heads // decoder.kv_heads
        k, v = k.repeat_interleave(group, 1), v.transpose(1, 2).repeat_interleave(group, 1)
        near = None
        if window is not None and window < self._length:
            places = torch.arange(self._length, device=q.device)
            apart = places[:, None] - places
            near = (apart >= 0) & (apart < window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=near, is_causal=near is None)
        return out.transpose(1, 2).reshape(qkv.shape[0], -1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Step.silu_mul`."""
        out: Tensor = _SiluMul.apply(gate_up)  # type: ignore[no-untyped-call]
        return out


class _AddLora(Function):
    """`y += ((x A^T) * w) B`, with a row's weights (rows, R) for all of its tokens."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weights: Tensor, a: Tensor, b: Tensor) -> Tensor:
        inner = x @ a.T
        y.addmm_(_by_row(inner, weights), b)
        ctx.mark_dirty(y)
        ctx.save_for_backward(inner, weights, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_y,) = gradients
        inner, weights, a, b = ctx.saved_tensors
        back = of_y @ b.T
        of_weights = (back * inner).view(weights.shape[0], -1, weights.shape[1]).sum(1)
        of_x = _by_row(back, weights) @ a if ctx.needs_input_grad[1] else None
        return of_y, of_x, of_weights, None, None


class _AddNorm(Function):
    """`x + delta` and its RMS norm (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x.view_as(x) if delta is None else x + delta
        wide = torch.promote_types(total.dtype, torch.float32)
        norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=wide)
        scale = (norm.square() / total.shape[-1] + eps).rsqrt()
        normed = torch.mul(total, scale, out=torch.empty_like(total)).mul_(weight)
        ctx.save_for_backward(total, scale, weight)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_total, of_normed = gradients
        total, scale, weight = ctx.saved_tensors
        g = of_normed * weight
        along = (g * total).sum(-1, keepdim=True, dtype=scale.dtype)
        out = torch.mul(g, scale, out=g)
        out.addcmul_(total, (along * scale.pow(3) / -total.shape[-1]).to(total.dtype)).add_(of_total)
        return out, out if ctx.needs_input_grad[1] else None, None, None


class _Rotate(Function):
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of (rows, length, heads, head_dim)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_out,) = gradients
        cos, sin = ctx.saved_tensors
        return _turned(of_out, cos, -sin), None, None


class _SiluMul(Function):
    """`silu(gate) * up`, the halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_out,) = gradients
        (gate_up,) = ctx.saved_tensors
        (gate, up), out = gate_up.chunk(2, -1), torch.empty_like(gate_up)
        of_gate, of_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), of_out, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_out * up, gate, grad_input=of_gate)
        return (out,)


def _by_row(inner: Tensor, weights: Tensor) -> Tensor:
    """Tokens (rows * length, R) times their row's weights (rows, R)."""
    return (inner.view(weights.shape[0], -1, weights.shape[1]) * weights[:, None]).view_as(inner)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
