"""One forward pass as all devices see it: its tokens, and the parts that are more than a matrix product.

Knows nothing of requests, and of models their shape alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lorauter.engine.paged_cache import PagedCache


class Span(NamedTuple):
    """A piece of a prompt: its row, the position of its first token, and how many there are."""

    row: int
    start: int
    length: int


@dataclass(frozen=True)
class StepBatch:
    """The packed tokens: one for each of `decoding` rows, then those of each span in turn.

    Attributes:
        tokens: (T,) ids.
        rows, positions: (T,) int32, whose they are, and where in its sequence.
        decoding: how many decode; where `queries` is given, at most.
        spans: prompt pieces; empty where `queries` is given.
        outputs: (m,) which tokens' logits are wanted, as indices into the T; None is all of them.
        mixtures: of all rows, as the device's step takes them; None where no token has adapters.
        adapted: the groups of targets, by their first, that these change at most; None is any.
        own: on a GPU, whether each token multiplies its own columns alone, as `lorauter.engine.cuda_own` does.
        counts, queries: on a GPU, see `lorauter.engine.cuda_kernels.prefill_attention`.
    """

    tokens: Tensor
    rows: Tensor
    positions: Tensor
    decoding: int
    spans: Sequence[Span]
    outputs: Tensor | None
    mixtures: Any = None
    adapted: Collection[str] | None = None
    own: bool = False
    counts: Tensor | None = None
    queries: Tensor | None = None


@dataclass(frozen=True)
class Memory:
    """What all steps on one cache share.

    Attributes:
        cache: keys and values.
        table: (rows + 1, most blocks of a row) int32, the blocks of every row; the last row is for padding.
        cos, sin: (positions, head_dim) of the rotary embedding.
        heads, kv_heads, head_dim: of the model.
    """

    cache: PagedCache
    table: Tensor
    cos: Tensor
    sin: Tensor
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def length(self) -> int:
        """Positions that a row may have."""
        return self.cos.shape[0]


class RmsNorm(Protocol):
    """An RMS norm (arXiv 1910.07467)."""

    @property
    def weight(self) -> Tensor:
        """(width,)."""

    @property
    def eps(self) -> float:
        """Added to the mean square."""

    def __call__(self, x: Tensor) -> Tensor:
        """Of the last dimension."""


class Step(Protocol):
    """The parts of one forward pass that are more than a matrix product."""

    def add_norm(
        self, x: Tensor, delta: Tensor | None, norm: RmsNorm, reads: tuple[int, str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`x + delta` (x alone without it), and its norm.

        Args:
            reads: the layer, and the first of its targets, whose input the norm is.
        """

    def begin_lora(self, layer: int, first: str, x: Tensor) -> None:
        """Called before the base product of the same input, for what can go on beside it."""

    def add_lora(self, layer: int, first: str, x: Tensor, y: Tensor) -> None:
        """Add the mixtures' change to `y` (tokens, out), in the targets of which `first` is the first.

        At the latest when `attention`, `silu_mul` or `add_norm` reads y, which others do of the last layer alone.
        """

    def attention(
        self, layer: int, qkv: Tensor, q_norm: RmsNorm | None, k_norm: RmsNorm | None, window: int | None
    ) -> Tensor:
        """Rotate, write keys and values to the cache, attend: (tokens, q + k + v) to (tokens, heads * head_dim)."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up`, the halves of the last dimension."""


StepClass = Callable[[Memory, StepBatch], Step]
"""Begins a step on a device."""
