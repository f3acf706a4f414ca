"""Triton kernels of LoRA: what the mixtures of adapters add to matrix products, sums in float32.

The columns of all adapters in use are cut into tiles of up to 16 columns of one adapter and one target. `tiles` is
(4, capacity) int64: where A begins in the arena, where B does, how many columns there are, and the adapter's slot.
`starts` (targets + 1,) int32 says where the tiles of each target begin, and at its end how many are in use: it is read
on the device. Column c of a tile has A at `a + (c * layers + layer) * inputs` and B at `b + (c * layers + layer) *
outputs` of the flat `arena`. Every a and b is a multiple of `ALIGNMENT` elements where the group's inputs and outputs
are.

Among few tokens all tiles in use are multiplied with all tokens. Where there are many, most of them of prompts, each
block of tokens has a list of the tiles that concern some of it: see `lora_live`.

Needs a GPU (or TRITON_INTERPRET=1). Knows nothing of models or requests beyond tensors.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, attr-defined"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 8  # elements: what the offsets in `tiles` are multiples of, so that loads can be wide
MIN_DOT = 16  # the smallest matrix side that tl.dot takes
FEW_TOKENS = 256  # up to here there are no lists

_TILE = tl.constexpr(16)  # columns of a tile
_BLOCK = tl.constexpr(64)  # tokens that have a list together
_HEAD = tl.constexpr(8)  # a list's first numbers: how many of its tiles come before each target's, and in all
_MOST_SPLITS = tl.constexpr(16)
_SPLIT_INPUTS = tl.constexpr(512)  # inputs that a program of the shrinking kernel sums, at least
_SHRINK_WHOLE = 2048  # up to this width it is not split
_SHRINK_PROGRAMS = tl.constexpr(264)  # of the shrinking kernel, which loops: two for each multiprocessor of an H100
_LOOP_PROGRAMS = 1056  # of small kernels that loop


@dataclass(frozen=True)
class Expand:
    """What `lora_expand` would add to y, for a kernel that adds it to the y that it reads. See there."""

    u: Tensor
    tiles: Tensor
    starts: Tensor
    arena: Tensor
    layer: int
    layers: int
    live: Tensor | None = None


@triton.jit
def dot(left, right, total, EXACT: tl.constexpr):
    """`total + left right`, see `precision`."""
    if EXACT == "ieee":
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=EXACT)


# --- which tiles concern which tokens


@triton.jit(do_not_specialize=["tokens"])
def _concerned_kernel(rows, weights, concerned, tokens, slots, N: tl.constexpr):
    block = tl.program_id(0)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    found = tl.zeros((N,), tl.int32)
    for start in tl.static_range(0, _BLOCK, 16):
        at = block * _BLOCK + start + tl.arange(0, 16)
        row = tl.load(rows + at, mask=at < tokens, other=-1)
        former = tl.load(rows + at - 1, mask=(at < tokens) & (at % _BLOCK > 0), other=-1)
        # Most tokens are of the row of the one before, whose weights are known.
        mine = (row != former)[:, None] & (columns < slots)[None, :]
        weight = tl.load(weights + row.to(tl.int64)[:, None] * slots + columns[None, :], mask=mine, other=0.0)
        found = tl.maximum(found, tl.max((weight != 0).to(tl.int32), 0))
    tl.store(concerned + block.to(tl.int64) * slots + columns, found.to(tl.int8), mask=columns < slots)


@triton.jit
def _live_kernel(concerned, tiles, starts, live, slots, capacity, targets, N: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    mine = live + block * (capacity + _HEAD)
    head = tl.arange(0, _HEAD)
    used = tl.load(starts + targets)
    bounds = tl.load(starts + head, mask=head <= targets, other=0)
    before = tl.zeros((_HEAD,), tl.int32)
    count = 0
    for start in range(0, used, N):
        tile = start + tl.arange(0, N)
        slot = tl.load(tiles + 3 * capacity + tile, mask=tile < used, other=0)
        found = tl.load(concerned + block * slots + slot, mask=tile < used, other=0).to(tl.int32)
        tl.store(mine + _HEAD + count + tl.cumsum(found, 0) - found, tile, mask=found > 0)
        count += tl.sum(found, 0)
        before += tl.sum(tl.where(tile[:, None] < bounds[None, :], found[:, None], 0), 0)
    tl.store(mine + head, before)


def lora_live(rows: Tensor, weights: Tensor, groups: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """Which tiles concern which tokens of a step; for the other functions, in all of the step's layers.

    Args:
        rows: (n,) int32, of all tokens that are multiplied together.
        weights: (rows, slots) float32, contiguous.
        groups: tiles and starts of each.

    Returns:
        For each group the lists of every 64 tokens, one after another in the first dimension, or None where there are
        so few tokens that it needs none.
    """
    n, slots = rows.shape[0], weights.shape[1]
    if n <= FEW_TOKENS:
        return [None] * len(groups)
    blocks = triton.cdiv(n, 64)
    concerned = torch.empty(blocks, slots, dtype=torch.int8, device=rows.device)
    _concerned_kernel[(blocks, triton.cdiv(slots, 256))](rows, weights, concerned, n, slots, 256)
    found: list[Tensor | None] = []
    for tiles, starts in groups:
        capacity = tiles.shape[1]
        live = torch.empty(blocks, capacity + 8, dtype=torch.int32, device=rows.device)
        _live_kernel[(blocks,)](concerned, tiles, starts, live, slots, capacity, starts.shape[0] - 1, 512)
        found.append(live)
    return found


# --- x A


@triton.jit
def _splits(items, width):
    """Into how many parts to cut the width: as many as give every program something to do."""
    splits = 1
    while (splits < _MOST_SPLITS) & (splits * _SPLIT_INPUTS < width) & (items * splits * 2 <= _SHRINK_PROGRAMS):
        splits *= 2
    return splits


@triton.jit
def _items(starts, live, tokens, capacity, targets, M: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr):
    """How much there is to do, an item being M tokens and N of the columns that concern them.

    With it, for `_item`: the tiles of each block of tokens and where its items end, or without lists those of all.
    """
    if BLOCKS > 0:
        index = tl.arange(0, BLOCKS)
        known = index < tl.cdiv(tokens, M)
        tiles = tl.load(live + index.to(tl.int64) * (capacity + _HEAD) + targets, mask=known, other=0)
        ends = tl.cumsum(tl.cdiv(tiles * _TILE, N), 0)
        items = tl.max(ends, 0)
    else:
        tiles = tl.load(starts + targets)
        ends = tl.cdiv(tiles * _TILE, N)
        items = ends * tl.cdiv(tokens, M)
    return items, tiles, ends


@triton.jit
def _item(number, tiles, ends, N: tl.constexpr, BLOCKS: tl.constexpr):
    """An item's block of tokens, the place of its first tile in u, and how many tiles that has."""
    if BLOCKS > 0:
        block = tl.sum((ends <= number).to(tl.int32), 0)
        first = (number - tl.max(tl.where(ends <= number, ends, 0), 0)) * (N // _TILE)
        count = tl.sum(tl.where(tl.arange(0, BLOCKS) == block, tiles, 0), 0)
    else:
        block = number // ends
        first = number % ends * (N // _TILE)
        count = tiles
    return block, first, count


@triton.jit
def _tile_at(place, known, live, block, capacity, LISTED: tl.constexpr):
    """Which tile is in a place of u."""
    tile = place
    if LISTED:
        tile = tl.load(live + block.to(tl.int64) * (capacity + _HEAD) + _HEAD + place, mask=known, other=0)
    return tile


@triton.jit
def _weighted(
    total, u, rows, tiles, weights, live, block, at, first, count, tokens, slots, capacity,
    M: tl.constexpr, N: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Store the sums of M tokens `at`, for the tiles from `first` on, times their weights."""
    place = first + tl.arange(0, N // _TILE)
    known = place < count
    tile = _tile_at(place, known, live, block, capacity, LISTED)
    columns = tl.load(tiles + 2 * capacity + tile, mask=known, other=0)
    slot = tl.load(tiles + 3 * capacity + tile, mask=known, other=0)
    mine = (at < tokens)[:, None] & known[None, :]
    row = tl.load(rows + at, mask=at < tokens, other=0).to(tl.int64) * slots
    weight = tl.load(weights + row[:, None] + slot[None, :], mask=mine, other=0.0)[:, :, None]
    weight = tl.where(tl.arange(0, _TILE)[None, None, :] < columns[None, :, None], weight, 0.0)
    total = tl.reshape(total, (M, N // _TILE, _TILE))
    # Not times 0: what is multiplied may be infinite.
    total = tl.reshape(tl.where(weight != 0, total * weight, 0.0), (M, N))
    column = first * _TILE + tl.arange(0, N)
    mine = (at < tokens)[:, None] & (column < count * _TILE)[None, :]
    tl.store(u + at.to(tl.int64)[:, None] * (capacity * _TILE) + column[None, :], total, mask=mine)


@triton.jit(do_not_specialize=["tokens", "slots", "layer", "layers"])
def _shrink_kernel(
    x, rows, tiles, starts, arena, weights, live, u, partial, tokens, width, slots, capacity, targets, layer, layers,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    items, counts, ends = _items(starts, live, tokens, capacity, targets, M, N, BLOCKS)
    splits = 1
    if SPLIT:
        splits = _splits(items, width)
    share = tl.cdiv(tl.cdiv(width, K), splits) * K
    for job in range(tl.program_id(0), items * splits, tl.num_programs(0)):
        block, first, count = _item(job // splits, counts, ends, N, BLOCKS)
        at = block * M + tl.arange(0, M)
        member = tl.arange(0, N) % _TILE
        tile = first + tl.arange(0, N) // _TILE
        known = tile < count
        tile = _tile_at(tile, known, live, block, capacity, BLOCKS > 0)
        real = member < tl.load(tiles + 2 * capacity + tile, mask=known, other=0)
        offset = tl.multiple_of(tl.load(tiles + tile, mask=known, other=0), ALIGN)
        a = arena + offset + (member.to(tl.int64) * layers + layer) * width
        into = x + at.to(tl.int64) * width
        total = tl.zeros((M, N), tl.float32)
        begin = job % splits * share
        for start in range(begin, tl.minimum(begin + share, width), K):
            inputs = start + tl.arange(0, K)
            inside = inputs < width
            left = tl.load(into[:, None] + inputs[None, :], mask=(at < tokens)[:, None] & inside[None, :], other=0.0)
            right = tl.load(a[:, None] + inputs[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            total = dot(left, tl.trans(right), total, EXACT)
        if splits == 1:
            _weighted(
                total, u, rows, tiles, weights, live, block, at, first, count, tokens, slots, capacity, M, N, BLOCKS > 0
            )
        else:
            inner = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
            tl.store(partial + job * M * N + inner, total)


@triton.jit(do_not_specialize=["tokens", "slots"])
def _join_kernel(
    rows, tiles, starts, weights, live, u, partial, tokens, width, slots, capacity, targets,
    M: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    items, counts, ends = _items(starts, live, tokens, capacity, targets, M, N, BLOCKS)
    splits = _splits(items, width)
    if splits == 1:
        return
    part = tl.arange(0, _MOST_SPLITS)[:, None, None]
    for job in range(tl.program_id(0), items * (M // T), tl.num_programs(0)):
        item = job // (M // T)
        block, first, count = _item(item, counts, ends, N, BLOCKS)
        inner = job % (M // T) * T + tl.arange(0, T)
        if block * M + job % (M // T) * T < tokens:
            place = (item * splits + part) * M * N + inner[None, :, None] * N + tl.arange(0, N)[None, None, :]
            total = tl.sum(tl.load(partial + place, mask=part < splits, other=0.0), 0)
            _weighted(
                total, u, rows, tiles, weights, live, block, block * M + inner, first, count, tokens, slots, capacity,
                T, N, BLOCKS > 0,
            )  # fmt: skip


def lora_shrink(
    x: Tensor, rows: Tensor, tiles: Tensor, starts: Tensor, arena: Tensor, layer: int, layers: int, weights: Tensor,
    live: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`weight * (x . A)` for columns in use; exactly 0 where the token's weight is 0 or a tile has no such column.

    Args:
        x: (n, in), contiguous.
        rows: (n,) int32, whose weights each token has.
        tiles, starts, arena: see the module.
        layer, layers: which of how many.
        weights: (rows, slots) float32, contiguous.
        live: of `lora_live` for these rows.

    Returns:
        u: (n, capacity * 16) in x's dtype. Column 16 i + c is column c of tile i, with `live` of tile i in the list of
        the token's block; beyond the tiles in use, or in the list, there is anything.
    """
    n, width = x.shape
    capacity, targets, slots = tiles.shape[1], starts.shape[0] - 1, weights.shape[1]
    split = width > _SHRINK_WHOLE
    # Unless it is cut, a sum takes as long as its inputs, and small blocks take more of them at once.
    large = live is not None or n > (32 if split else 128)
    block, columns = (64, 64) if large else (32, 32) if n > 16 else (16, 32)
    lists = 0 if live is None else max(128, triton.next_power_of_2(triton.cdiv(n, block)))
    u = x.new_empty(n, capacity * 16)
    partial = x.new_empty(_SHRINK_PROGRAMS.value * block * columns, dtype=torch.float32) if split else u
    most = triton.cdiv(n, block) * triton.cdiv(capacity * 16, columns)
    programs = _SHRINK_PROGRAMS.value if split else min(most, _SHRINK_PROGRAMS.value)
    _shrink_kernel[(programs,)](
        x, rows, tiles, starts, arena, weights, live, u, partial, n, width, slots, capacity, targets, layer, layers,
        block, columns, 64 if block == 64 else 128, lists, split, alignment([width]), precision(x),
        num_warps=4, num_stages=2 if x.itemsize == 4 else 4,
    )  # fmt: skip
    if split:
        _join_kernel[(min(most * block // 4, _LOOP_PROGRAMS),)](
            rows, tiles, starts, weights, live, u, partial, n, width, slots, capacity, targets,
            block, columns, 4, lists, num_warps=4,
        )  # fmt: skip
    return u


# --- u B


@triton.jit
def _some_tiles(
    u, tiles, arena, live, start, last, at, outputs, inside, width, tokens, capacity, layer, layers,
    TILES: tl.constexpr, LISTED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(M, 16 TILES) of u and (16 TILES, N) of B for the tiles from `start` on."""
    ranks = tl.arange(0, _TILE * TILES)
    tile = start + ranks // _TILE
    known = tile < last
    narrow = tl.load(
        u + at.to(tl.int64)[:, None] * (capacity * _TILE) + start * _TILE + ranks[None, :],
        mask=(at[:, None] < tokens) & known[None, :], other=0.0,
    )  # fmt: skip
    if LISTED:
        tile = tl.load(live + _HEAD + tile, mask=known, other=0)
    member = ranks % _TILE
    real = member < tl.load(tiles + 2 * capacity + tile, mask=known, other=0)
    offset = tl.multiple_of(tl.load(tiles + capacity + tile, mask=known, other=0), ALIGN)
    b = arena + offset + (member.to(tl.int64) * layers + layer) * width
    wide = tl.load(b[:, None] + outputs[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    return narrow, wide


@triton.jit
def expansion(
    u, tiles, starts, arena, live, part, at, outputs, inside, width, tokens, capacity, layer, layers,
    M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, LISTED: tl.constexpr, ALIGN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """What target `part`, which is `width` wide, adds to the program's M tokens `at` in its columns `outputs`.

    Returns:
        (M, N) float32.
    """
    bounds = starts
    if LISTED:
        live += tl.program_id(0).to(tl.int64) * M // _BLOCK * (capacity + _HEAD)
        bounds = live
    first = tl.load(bounds + part)
    last = tl.load(bounds + part + 1)
    total = tl.zeros((M, N), tl.float32)
    for start in range(first, last, TILES):
        narrow, wide = _some_tiles(
            u, tiles, arena, live, start, last, at, outputs, inside, width, tokens, capacity, layer, layers,
            TILES, LISTED, ALIGN,
        )  # fmt: skip
        total = dot(narrow, wide, total, EXACT)
    if tl.min((tl.abs(total) < float("inf")).to(tl.int32)) == 0:
        # Rare. 0 times what is not finite in B must be nothing, and all else of it is NaN.
        total = tl.zeros((M, N), tl.float32)
        for start in range(first, last, TILES):
            narrow, wide = _some_tiles(
                u, tiles, arena, live, start, last, at, outputs, inside, width, tokens, capacity, layer, layers,
                TILES, LISTED, ALIGN,
            )  # fmt: skip
            finite = tl.abs(wide.to(tl.float32)) < float("inf")
            total = dot(narrow, tl.where(finite, wide, 0.0).to(wide.dtype), total, EXACT)
            touched = tl.dot((narrow != 0).to(tl.float16), (finite == 0).to(tl.float16))
            total = tl.where(touched > 0, float("nan"), total)
    return total


@triton.jit(do_not_specialize=["tokens", "layer", "layers"])
def _expand_kernel(
    y, u, tiles, starts, arena, live, capacity, layer, layers, n0, n1, n2, tokens,
    M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, LISTED: tl.constexpr, ALIGN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    # n0, n1, n2 are the widths of the targets, side by side in y; each program has a block of columns of one of them.
    block = tl.program_id(1)
    part = 0
    offset = 0
    width = n0
    if block >= tl.cdiv(n0, N):
        block -= tl.cdiv(n0, N)
        part = 1
        offset = n0
        width = n1
        if block >= tl.cdiv(n1, N):
            block -= tl.cdiv(n1, N)
            part = 2
            offset = n0 + n1
            width = n2
    at = tl.program_id(0) * M + tl.arange(0, M)
    outputs = block * N + tl.arange(0, N)
    inside = outputs < width
    live_y = (at[:, None] < tokens) & inside[None, :]
    place = y + at.to(tl.int64)[:, None] * (n0 + n1 + n2) + offset + outputs[None, :]
    before = tl.load(place, mask=live_y, other=0.0).to(tl.float32)
    total = expansion(
        u, tiles, starts, arena, live, part, at, outputs, inside, width, tokens, capacity, layer, layers,
        M, N, TILES, LISTED, ALIGN, EXACT,
    )  # fmt: skip
    tl.store(place, before + total, mask=live_y)


def lora_expand(
    y: Tensor, u: Tensor, tiles: Tensor, starts: Tensor, arena: Tensor, layer: int, layers: int, widths: Sequence[int],
    live: Tensor | None = None,
) -> None:  # fmt: skip
    """`y[:, target] += u[:, columns of the target] B` for up to three targets, in one launch.

    Where u is exactly 0, nothing is added, whatever B is.

    Args:
        y: (n, sum of widths), contiguous, changed in place.
        u: of `lora_shrink` for these tokens.
        tiles, starts, arena: see the module.
        layer, layers: which of how many.
        widths: of the targets, as they lie in y from left to right.
        live: as `lora_shrink` had it.
    """
    n = y.shape[0]
    shape = expand_shape(n)
    blocks = sum(triton.cdiv(width, shape.columns) for width in widths)
    arguments = expand_arguments(Expand(u, tiles, starts, arena, layer, layers, live))
    _expand_kernel[(triton.cdiv(n, shape.tokens), blocks)](
        y, *arguments, *[*widths, 0, 0][:3], n, shape.tokens, shape.columns, shape.tiles, live is not None,
        alignment(widths), precision(y), num_warps=4, num_stages=shape.stages,
    )  # fmt: skip


class ExpandShape(NamedTuple):
    """How a program expands: how many tokens and outputs it has, how many tiles it takes at once, in which stages."""

    tokens: int
    columns: int
    tiles: int
    stages: int


def expand_shape(n: int) -> ExpandShape:
    """Of n tokens. Few tokens' programs take as long as what they read comes one after the other, so they read all at
    once."""
    return ExpandShape(16, 32, 16, 1) if n <= FEW_TOKENS else ExpandShape(64, 64, 4, 5)


def expand_arguments(lora: Expand | None) -> tuple[object, ...]:
    """The arguments u to layers of a kernel that adds an expansion."""
    if lora is None:
        return None, None, None, None, None, 0, 0, 0
    return lora.u, lora.tiles, lora.starts, lora.arena, lora.live, lora.tiles.shape[1], lora.layer, lora.layers


def alignment(widths: Sequence[int]) -> int:
    """What multiples offsets can be taken for, where targets are so wide."""
    return ALIGNMENT if all(width % ALIGNMENT == 0 for width in widths) else 1


def precision(x: Tensor) -> str:
    """How `dot` multiplies: float32 exactly, not as TF32. Triton's interpreter cannot multiply bfloat16."""
    return "ieee" if x.dtype == torch.float32 or not x.is_cuda else "tf32"
