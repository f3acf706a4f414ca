"""A forward pass through which gradients go to weights of adapters, and to nothing else, in few passes over memory.

Base weights and adapters are fixed. Knows tensors; knows nothing of examples or losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.autograd import Function

from lorauter.compositions.stack import AdapterStack
from lorauter.engine.model import Decoder
from lorauter.engine.whole_step import WholeStep


class GradientStep(WholeStep):
    """See `WholeStep`.

    Args:
        decoder: a plain one.
        weights: of each row: by the first target of a group (rows, layers, R), as `AdapterStack.columns` has them.
        length: of a row.
    """

    def __init__(self, decoder: Decoder, stack: AdapterStack, weights: Mapping[str, Tensor], length: int) -> None:
        super().__init__(decoder, length)
        self._stack = stack
        self._weights = {first: of.unbind(1) for first, of in weights.items()}

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """See `Step.add_lora`."""
        if first in self._weights:
            a, b = self._stack.a[first][layer], self._stack.b[first][layer]
            _AddLora.apply(y, x, self._weights[first][layer], a, b)  # type: ignore[no-untyped-call]


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


def _by_row(inner: Tensor, weights: Tensor) -> Tensor:
    """Tokens (rows * length, R) times their row's weights (rows, R)."""
    return (inner.view(weights.shape[0], -1, weights.shape[1]) * weights[:, None]).view_as(inner)
