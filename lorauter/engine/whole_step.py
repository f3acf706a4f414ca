"""One forward pass over whole rows, without a cache: what trains, and what scores many short texts at once.

Rows have one length and are filled up behind their tokens, where causal attention does not look. Gradients go through
it; each part has its own by hand, keeps no more than that needs, and makes no copy that PyTorch's own would. Knows
tensors; knows nothing of requests, examples or losses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.autograd import Function

from lorauter.engine.lora_stack import LoraStack
from lorauter.engine.model import Decoder
from lorauter.engine.step import RmsNorm


class WholeStep:
    """See `lorauter.engine.step.Step`, which it is but for `add_lora`.

    Args:
        decoder: a plain one, where gradients are wanted.
        length: of a row.
    """

    def __init__(self, decoder: Decoder, length: int) -> None:
        self._decoder = decoder
        self._length = length
        # Made without gradients, which autograd takes no copy of. Halves are alike, as transformers lays them out.
        self._cos, self._sin = (table.clone()[:, None] for table in decoder.rotary_table(length))

    def add_norm(
        self, x: Tensor, delta: Tensor | None, norm: RmsNorm, reads: tuple[int, str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Step.add_norm`."""
        total, normed = _AddNorm.apply(x, delta, norm.weight, norm.eps)  # type: ignore[no-untyped-call]
        return total, normed

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """See `Step.begin_lora`."""

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


class AdaptedStep(WholeStep):
    """Every row under an adapter of its own.

    Args:
        stack: the adapters.
        of_rows: (rows,) which of them each row has; None shares the rows out evenly, in the order of the adapters.
    """

    def __init__(self, decoder: Decoder, stack: LoraStack, of_rows: Tensor | None, length: int) -> None:
        super().__init__(decoder, length)
        self._a = {first: of.unbind(0) for first, of in stack.a.items()}
        self._b = {first: of.unbind(0) for first, of in stack.b.items()}
        self._of_rows = of_rows

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `Step.add_lora`."""
        if first not in self._a:
            return
        a, b = self._a[first][layer], self._b[first][layer]
        if self._of_rows is not None:
            a, b = a[self._of_rows], b[self._of_rows]
        inner = torch.bmm(x.view(a.shape[0], -1, a.shape[1]), a)
        y.view(a.shape[0], -1, b.shape[2]).baddbmm_(inner, b)


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


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
