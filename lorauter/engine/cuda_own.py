"""LoRA token by token: each multiplies its row's own columns alone, inside the kernels before and after the product.

A launch costs more than what it computes for a few columns. So nothing is launched for adapters here: the norm that
makes a product's input shrinks it too, and what reads the product expands; where the input comes from elsewhere, the
norm that reads the product does both. What nearly all adapters change (queries, keys and values) is not for this: it is
shrunk beside the product.

A group of targets has a list of each row's columns, `own` (rows, OWN_WIDTH) int64. Its first `OWN_HEAD` numbers are
where each target's entries begin, and after the last one how many there are; then come the entries: where A and B of an
entry's first column begin in the arena, and the bits of its weight above how many columns it has, `OWN_COLUMNS` at
most. See `lorauter.engine.cuda_lora` for where columns lie. Sums are in float32; what is shrunk is rounded to the
model's dtype, as there.

Needs a GPU (or TRITON_INTERPRET=1). Knows nothing of models or requests beyond tensors.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, attr-defined"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorauter.engine.cuda_lora import alignment

OWN_GROUPS = frozenset({"o_proj", "gate_proj", "down_proj"})  # those that can be so multiplied, by their first target
OWN_COLUMNS = 8
OWN_MOST = 32  # entries of a row in a group
OWN_HEAD = 4
OWN_WIDTH = OWN_HEAD + 3 * OWN_MOST

_COLUMNS = tl.constexpr(OWN_COLUMNS)
_MOST = tl.constexpr(OWN_MOST)
_HEAD = tl.constexpr(OWN_HEAD)
_WIDTH = tl.constexpr(OWN_WIDTH)


@dataclass(frozen=True)
class Own:
    """A group of targets' columns of all rows, and whose they are in a step.

    Attributes:
        rows: (n,) int32, of each token.
        own: the group's lists.
        arena: flat.
        layer, layers: which of how many.
        targets: of the group.
    """

    rows: Tensor
    own: Tensor
    arena: Tensor
    layer: int
    layers: int
    targets: int


@dataclass(frozen=True)
class OwnExpand:
    """What a group's columns make of inputs, for a kernel that adds it to the products that it reads: u of `own_norm`,
    and whose it is."""

    u: Tensor
    of: Own


@triton.jit
def _products(x, arena, entry, columns, inside, layer, layers, width, ALIGN: tl.constexpr):
    """The products of x (BLOCK,), which are inputs `columns`, with an entry's columns of A: (OWN_COLUMNS,)."""
    member = tl.arange(0, _COLUMNS)
    real = member < (tl.load(entry + 2) & 0xFF).to(tl.int32)
    a = arena + tl.multiple_of(tl.load(entry), ALIGN) + (member.to(tl.int64) * layers + layer) * width
    tall = tl.load(a[:, None] + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return tl.where(real, tl.sum(tall * x[None, :], 1), 0.0)


@triton.jit
def _weighted(products, arena, entry):
    """What an entry shrinks inputs to, rounded: 0 where it has no column."""
    weight = (tl.load(entry + 2) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return (products * weight).to(arena.dtype.element_ty)


@triton.jit
def _change(
    total, x, mine, count, arena, columns, inside, layer, layers, inputs, outputs,
    CHUNK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """`total` and what the first `count` entries of a list add to it in `columns`, of the token's inputs at x."""
    member = tl.arange(0, _COLUMNS)
    for i in range(count):
        entry = mine + _HEAD + 3 * i
        products = tl.zeros((_COLUMNS,), tl.float32)
        for start in range(0, inputs, CHUNK):
            taken = start + tl.arange(0, CHUNK)
            value = tl.load(x + taken, mask=taken < inputs, other=0.0).to(tl.float32)
            products += _products(value, arena, entry, taken, taken < inputs, layer, layers, inputs, ALIGN)
        narrow = _weighted(products, arena, entry).to(tl.float32)
        real = member < (tl.load(entry + 2) & 0xFF).to(tl.int32)
        b = arena + tl.multiple_of(tl.load(entry + 1), ALIGN) + (member.to(tl.int64) * layers + layer) * outputs
        wide = tl.load(b[:, None] + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tl.where(narrow[:, None] != 0, narrow[:, None] * wide, 0.0), 0)
    return total


@triton.jit(do_not_specialize=["late_layer", "layer", "layers"])
def _own_norm_kernel(
    x, delta, weight, total, out, rows, arena, late_x, late_own, late_layer, own, layer, layers, u, hidden, late_inputs,
    eps, LATE: tl.constexpr, DELTA: tl.constexpr, TARGETS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    mine = tl.load(rows + token).to(tl.int64) * _WIDTH
    late_count = 0
    if LATE:
        late_count = tl.load(late_own + mine + 1).to(tl.int32)
    count = 0
    if TARGETS > 0:
        count = tl.load(own + mine + TARGETS).to(tl.int32)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + token * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    if DELTA:
        change = tl.load(delta + token * hidden + columns, mask=inside, other=0.0).to(tl.float32)
        if LATE and late_count > 0:
            change = _change(
                change, late_x + token * late_inputs, late_own + mine, late_count, arena, columns, inside,
                late_layer, layers, late_inputs, hidden, CHUNK, ALIGN,
            )  # fmt: skip
        value += change
        tl.store(total + token * hidden + columns, value, mask=inside)
        value = value.to(total.dtype.element_ty).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / hidden + eps)
    normed = value * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(out.dtype.element_ty)
    tl.store(out + token * hidden + columns, normed, mask=inside)
    if TARGETS > 0:
        member = tl.arange(0, _COLUMNS)
        for i in range(count):
            entry = own + mine + _HEAD + 3 * i
            products = _products(normed.to(tl.float32), arena, entry, columns, inside, layer, layers, hidden, ALIGN)
            tl.store(u + (token * _MOST + i) * _COLUMNS + member, _weighted(products, arena, entry))


def own_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, late: tuple[Tensor, Own] | None, reads: Own | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x + delta`, its RMS norm, and what that is shrunk to.

    Args:
        x, delta: (n, hidden), contiguous.
        late: the input of the product that delta is, contiguous, and the columns that are to be added to it.
        reads: the columns that read the norm.

    Returns:
        The sum and the norm, and u (n, OWN_MOST, OWN_COLUMNS) in their dtype: of a token's entry the inputs' products
        with A times the weight, 0 where it has no column; beyond a token's entries there is anything.
    """
    n, hidden = x.shape
    out = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    u = None if reads is None else x.new_empty(n, OWN_MOST, OWN_COLUMNS)
    some = reads or (late[1] if late else None)
    assert some is not None  # else it is no norm of this kind
    late_x, late_own = (None, None) if late is None else late
    inputs = 1 if late_x is None else late_x.shape[1]
    block = triton.next_power_of_2(hidden)
    _own_norm_kernel[(n,)](
        x, delta, weight, total, out, some.rows, some.arena,
        late_x, late_own and late_own.own, late_own.layer if late_own else 0,
        reads and reads.own, reads.layer if reads else 0, some.layers, u, hidden, inputs, eps,
        late is not None, delta is not None, reads.targets if reads else 0, block, _chunk(inputs, block),
        alignment([hidden, hidden if late is None else inputs]), num_warps=_warps(block),
    )  # fmt: skip
    return total, out, u


@triton.jit
def own_expansion(
    u, own, arena, rows, part, at, outputs, inside, width, tokens, layer, layers, M: tl.constexpr, N: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """What target `part`, which is `width` wide, adds to M tokens `at` in N columns `outputs`: (M, N) float32."""
    known = at < tokens
    mine = own + tl.load(rows + at, mask=known, other=0).to(tl.int64) * _WIDTH
    first = tl.load(mine + part, mask=known, other=0)
    last = tl.load(mine + part + 1, mask=known, other=0)
    member = tl.arange(0, _COLUMNS)
    total = tl.zeros((M, N), tl.float32)
    for i in range(tl.max(last - first, 0).to(tl.int32)):
        place = first + i
        here = known & (place < last)
        entry = mine + _HEAD + 3 * place
        columns = (tl.load(entry + 2, mask=here, other=0) & 0xFF).to(tl.int32)
        real = here[:, None] & (member[None, :] < columns[:, None])
        narrow = tl.load(
            u + (at.to(tl.int64) * _MOST + place)[:, None] * _COLUMNS + member[None, :], mask=real, other=0.0
        ).to(tl.float32)
        offset = tl.multiple_of(tl.load(entry + 1, mask=here, other=0), ALIGN)
        b = arena + offset[:, None] + (member[None, :].to(tl.int64) * layers + layer) * width
        wide = tl.load(
            b[:, :, None] + outputs[None, None, :], mask=real[:, :, None] & inside[None, None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(tl.where(narrow[:, :, None] != 0, narrow[:, :, None] * wide, 0.0), 1)
    return total


@triton.jit(do_not_specialize=["layer", "layers"])
def _own_add_kernel(
    y, x, rows, own, arena, layer, layers, inputs, width, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    mine = own + tl.load(rows + token).to(tl.int64) * _WIDTH
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    count = tl.load(mine + 1).to(tl.int32)
    if count > 0:
        total = tl.load(y + token * width + columns, mask=inside, other=0.0).to(tl.float32)
        total = _change(
            total, x + token * inputs, mine, count, arena, columns, inside, layer, layers, inputs, width, CHUNK, ALIGN
        )
        tl.store(y + token * width + columns, total, mask=inside)


def own_add(y: Tensor, x: Tensor, own: Own) -> None:
    """Add to products what their tokens' columns make of the inputs, where no norm reads them.

    Args:
        y: (n, out), contiguous, changed in place.
        x: (n, in), contiguous.
        own: of one target.
    """
    n, inputs = x.shape
    width = y.shape[1]
    block = triton.next_power_of_2(width)
    _own_add_kernel[(n,)](
        y, x, own.rows, own.own, own.arena, own.layer, own.layers, inputs, width, block, _chunk(inputs, block),
        alignment([inputs, width]), num_warps=_warps(block),
    )  # fmt: skip


def _chunk(inputs: int, block: int) -> int:
    """Inputs that are multiplied at once: what a program's threads have room for."""
    return min(int(triton.next_power_of_2(inputs)), max(1024, block))


def _warps(block: int) -> int:
    """So many that a thread has 64 numbers of an entry, or a little more."""
    return max(4, min(16, block * OWN_COLUMNS // 2048))
