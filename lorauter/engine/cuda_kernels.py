"""Triton kernels of a step: norms, rotary embedding with the cache write, activations, and what moves tokens.

Those of attention and LoRA are modules of their own, and can be had from here. Each wrapper documents the function that
it computes; `lorauter.engine.torch_step` has most of them in plain PyTorch. All can be captured in CUDA graphs. Needs a
GPU (or TRITON_INTERPRET=1). Knows nothing of models or requests beyond tensors.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, attr-defined"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorauter.engine.cuda_attention import decode_attention, prefill_attention, query_tokens
from lorauter.engine.cuda_lora import (
    FEW_TOKENS,
    MIN_DOT,
    Expand,
    ExpandShape,
    alignment,
    expand_arguments,
    expand_shape,
    expansion,
    lora_expand,
    lora_live,
    lora_shrink,
    precision,
)
from lorauter.engine.cuda_own import Own, OwnExpand, own_add, own_expansion, own_norm

__all__ = [
    "Expand",
    "Own",
    "OwnExpand",
    "Posted",
    "add_norm",
    "decode_attention",
    "greedy",
    "lora_expand",
    "lora_live",
    "lora_shrink",
    "own_add",
    "own_norm",
    "prefill_attention",
    "query_tokens",
    "rotate_and_store",
    "silu_mul",
    "take_tokens",
    "write_changes",
]


@triton.jit
def _add_norm_kernel(x, delta, weight, total, out, hidden, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * hidden
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + row + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row + columns, value, mask=inside)
        value = value.to(total.dtype.element_ty).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / hidden + eps)
    normed = value * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + columns, normed, mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + delta` and its RMS norm; x and delta (n, hidden), contiguous. Without delta, x itself and its norm."""
    n, hidden = x.shape
    out = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    warps = 4 if block <= 2048 else 8
    _add_norm_kernel[(n,)](
        x, x if delta is None else delta, weight, total, out, hidden, eps, delta is not None, block, num_warps=warps
    )
    return total, out


@triton.jit(do_not_specialize=["tokens", "capacity", "layer", "layers"])
def _silu_mul_kernel(
    gate_up, out, rows, own, u, tiles, starts, arena, live, capacity, layer, layers, width, tokens,
    M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, LORA: tl.constexpr, OWN: tl.constexpr,
    LISTED: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    inside = columns < width
    mine = (at[:, None] < tokens) & inside[None, :]
    place = at.to(tl.int64)[:, None] * width + columns[None, :]
    half = gate_up + place + (at.to(tl.int64) * width)[:, None]
    gate = tl.load(half, mask=mine, other=0.0).to(tl.float32)
    up = tl.load(half + width, mask=mine, other=0.0).to(tl.float32)
    if LORA:
        gate += expansion(
            u, tiles, starts, arena, live, 0, at, columns, inside, width, tokens, capacity, layer, layers,
            M, N, TILES, LISTED, ALIGN, EXACT,
        )  # fmt: skip
        up += expansion(
            u, tiles, starts, arena, live, 1, at, columns, inside, width, tokens, capacity, layer, layers,
            M, N, TILES, LISTED, ALIGN, EXACT,
        )  # fmt: skip
    if OWN:
        gate += own_expansion(u, own, arena, rows, 0, at, columns, inside, width, tokens, layer, layers, M, N, ALIGN)
        up += own_expansion(u, own, arena, rows, 1, at, columns, inside, width, tokens, layer, layers, M, N, ALIGN)
    tl.store(out + place, gate * tl.sigmoid(gate) * up, mask=mine)


def silu_mul(gate_up: Tensor, lora: Expand | OwnExpand | None = None) -> Tensor:
    """`silu(gate) * up` of a contiguous (n, 2 * width), halves side by side.

    With `lora`, whose targets are gate and up, after its expansion is added to gate_up.
    """
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n, width)
    tiles = lora if isinstance(lora, Expand) else None
    shape = expand_shape(n) if tiles else ExpandShape(1, min(1024, triton.next_power_of_2(width)), 1, 1)
    warps = 2 if tiles and n <= FEW_TOKENS else 4
    listed = tiles is not None and tiles.live is not None
    _silu_mul_kernel[(triton.cdiv(n, shape.tokens), triton.cdiv(width, shape.columns))](
        gate_up, out, *_own_arguments(lora), width, n, shape.tokens, shape.columns, shape.tiles,
        tiles is not None, isinstance(lora, OwnExpand), listed, alignment([width]), precision(gate_up),
        num_warps=warps, num_stages=shape.stages,
    )  # fmt: skip
    return out


def _own_arguments(lora: Expand | OwnExpand | None) -> tuple[object, ...]:
    """The arguments rows to layers of a kernel that adds an expansion of either kind."""
    if isinstance(lora, OwnExpand):
        of = lora.of
        return of.rows, of.own, lora.u, None, None, of.arena, None, 0, of.layer, of.layers
    return None, None, *expand_arguments(lora)


@triton.jit(do_not_specialize=["tokens", "capacity", "layer", "layers", "max_blocks"])
def _rotate_store_kernel(
    qkv, cos, sin, rows, positions, table, q_out, keys, values, u, tiles, starts, arena, live, capacity, layer,
    layers, tokens, heads, kv_heads, max_blocks,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, LORA: tl.constexpr,
    LISTED: tl.constexpr, ALIGN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # Each program has N columns of both halves of one head, for M tokens.
    head = tl.program_id(1)
    total = heads + 2 * kv_heads
    at = tl.program_id(0) * M + tl.arange(0, M)
    known = at < tokens
    both = tl.arange(0, 2 * N)
    columns = tl.program_id(2) * N + both % N
    inside = columns < D // 2
    columns += both // N * (D // 2)
    mine = known[:, None] & inside[None, :]
    token = at.to(tl.int64)[:, None]
    value = tl.load(qkv + (token * total + head) * D + columns[None, :], mask=mine, other=0.0).to(tl.float32)
    part = 0
    before = 0
    width = heads * D
    if head >= heads:
        part = 1
        before = heads
        width = kv_heads * D
        if head >= heads + kv_heads:
            part = 2
            before = heads + kv_heads
    if LORA:
        value += expansion(
            u, tiles, starts, arena, live, part, at, (head - before) * D + columns, inside, width, tokens, capacity,
            layer, layers, M, 2 * N, TILES, LISTED, ALIGN, EXACT,
        )  # fmt: skip
    position = tl.load(positions + at, mask=known, other=0)
    if part < 2:
        first, second = tl.split(tl.permute(tl.reshape(value, (M, 2, N)), (0, 2, 1)))
        half = tl.program_id(2) * N + tl.arange(0, N)
        angle = position.to(tl.int64)[:, None] * D + half[None, :]
        here = known[:, None] & (half < D // 2)[None, :]
        c = tl.load(cos + angle, mask=here, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=here, other=0.0).to(tl.float32)
        turned = tl.join(first * c - second * s, second * c + first * s)
        value = tl.reshape(tl.permute(turned, (0, 2, 1)), (M, 2 * N))
    if part == 0:
        tl.store(q_out + (token * heads + head) * D + columns[None, :], value, mask=mine)
    else:
        row = tl.load(rows + at, mask=known, other=0).to(tl.int64)
        block = tl.load(table + row * max_blocks + position // BLOCK, mask=known, other=0).to(tl.int64)
        place = ((block * kv_heads + head - before) * BLOCK + position % BLOCK) * D
        if part == 1:
            tl.store(keys + place[:, None] + columns[None, :], value, mask=mine)
        else:
            tl.store(values + place[:, None] + columns[None, :], value, mask=mine)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, positions: Tensor, table: Tensor, keys: Tensor, values: Tensor,
    heads: int, lora: Expand | None = None,
) -> Tensor:  # fmt: skip
    """Rotary embedding (arXiv 2104.09864) of queries and keys, and the cache write, in one pass.

    Args:
        qkv: (n, heads + 2 * kv_heads, head_dim), contiguous.
        cos, sin: (positions, head_dim) tables.
        rows, positions: (n,) int32, where each token goes.
        table, keys, values: one layer's cache, written; see `lorauter.engine.cuda_attention`.
        heads: how many of qkv's heads are queries.
        lora: with targets q, k and v, is added to qkv first.

    Returns:
        (n, heads, head_dim) rotated queries.
    """
    n, total, d = qkv.shape
    kv_heads = (total - heads) // 2
    q = qkv.new_empty(n, heads, d)
    half = triton.next_power_of_2(d // 2)
    if lora:
        shape, warps = expand_shape(n)._replace(columns=max(MIN_DOT // 2, min(32, half))), 4
    else:
        shape, warps = (ExpandShape(2, half, 1, 1), 1) if n <= FEW_TOKENS else (ExpandShape(16, half, 1, 1), 4)
    _rotate_store_kernel[(triton.cdiv(n, shape.tokens), total, triton.cdiv(d // 2, shape.columns))](
        qkv, cos, sin, rows, positions, table, q, keys, values, *expand_arguments(lora), n, heads, kv_heads,
        table.shape[1], d, shape.tokens, shape.columns, shape.tiles, keys.shape[2], lora is not None,
        lora is not None and lora.live is not None, alignment([d]), precision(qkv), num_warps=warps,
        num_stages=shape.stages,
    )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["n"])
def _take_kernel(tokens, rows, last, ids, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = at < n
    token = tl.load(tokens + at, mask=known, other=0)
    row = tl.load(rows + at, mask=known & (token < 0), other=0)
    former = tl.load(last + row, mask=known & (token < 0), other=0)
    tl.store(ids + at, tl.where(token < 0, former, token), mask=known)


def take_tokens(tokens: Tensor, rows: Tensor, last: Tensor) -> Tensor:
    """The ids of a step's tokens: a negative one stands for the last token of its row.

    Args:
        tokens, rows: (n,) int32.
        last: (rows,) int32.

    Returns:
        (n,) int32.
    """
    ids = torch.empty_like(tokens)
    n = tokens.shape[0]
    _take_kernel[(triton.cdiv(n, 128),)](tokens, rows, last, ids, n, 128, num_warps=1)
    return ids


@triton.jit(do_not_specialize=["n", "n0", "n1"])
def _write_kernel(first, second, third, n0, n1, where, values, count, n, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if COUNTED:
        n = tl.load(count)
    known = at < n
    place = tl.load(where + at, mask=known, other=0)
    value = tl.load(values + at, mask=known, other=0)
    tl.store(first + place, value, mask=known & (place < n0))
    tl.store(second + (place - n0), value, mask=known & (place >= n0) & (place < n0 + n1))
    tl.store(third + (place - n0 - n1), value, mask=known & (place >= n0 + n1))


def write_changes(flats: tuple[Tensor, Tensor, Tensor], where: Tensor, values: Tensor, count: Tensor | None) -> None:
    """Write values to places of three tensors, which are counted as if one followed the other.

    Args:
        flats: (any,) int32 each, contiguous, changed in place.
        where, values: (n,) int32, no place twice.
        count: (1,) int32 on the device, how many of them to write; None is all.
    """
    n = where.shape[0]
    first, second, third = flats
    _write_kernel[(triton.cdiv(n, 128),)](
        first, second, third, len(first), len(second), where, values, count, n, count is not None, 128, num_warps=1
    )


@triton.jit(do_not_specialize=["words"])
def _posted_kernel(board, held, outputs, positions, known, allowed, words, BLOCK: tl.constexpr):
    # The host writes to the board meanwhile, the index of the token last. All threads have to go by one answer to
    # whether it is there, so they are of one warp, whose threads' answers are joined.
    place = tl.program_id(0)
    row = tl.load(held + place)
    there = tl.full((), 0, tl.int32)
    if row >= 0:
        mine = board + row.to(tl.int64) * (words + 1)
        index = tl.load(positions + tl.load(outputs + place)) + 1
        there = tl.min((tl.load(mine + tl.zeros([32], tl.int32), volatile=True) == index).to(tl.int32))
        if there != 0:
            for start in range(0, words, BLOCK):
                at = start + tl.arange(0, BLOCK)
                word = tl.load(mine + 1 + at, mask=at < words, other=0, volatile=True)
                tl.store(allowed + place.to(tl.int64) * words + at, word, mask=at < words)
    tl.store(known + place, there)


@triton.jit(do_not_specialize=["words"])
def _peaks_kernel(logits, known, allowed, tops, places, vocabulary, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    masked = tl.load(known + row) != 0
    word = tl.load(allowed + row * words + columns // 32, mask=inside & masked, other=-1)
    value = tl.load(logits + row * vocabulary + columns, mask=inside, other=0.0).to(tl.float32)
    finite = tl.min((tl.abs(value) < float("inf")).to(tl.int32))
    value = tl.where(inside & (((word >> (columns % 32)) & 1) != 0), value, float("-inf"))
    top = tl.max(value)
    place = tl.min(tl.where(value == top, columns, vocabulary))
    piece = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops + piece, top)
    tl.store(places + piece, tl.where(finite == 1, place, -1))


@triton.jit
def _greedy_kernel(tops, places, rows, last, chosen, pieces, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    top = tl.load(tops + row * pieces + at, mask=at < pieces, other=float("-inf"))
    place = tl.load(places + row * pieces + at, mask=at < pieces, other=2147483647)
    token = tl.min(tl.where((top == tl.max(top)) | (place < 0), place, 2147483647))
    tl.store(chosen + row, token)
    tl.store(last + tl.load(rows + row), tl.maximum(token, 0))


@dataclass(frozen=True)
class Posted:
    """Where `greedy` finds which tokens may come.

    Attributes:
        board: (any, 1 + words) int32, in the host's pinned memory, which may change meanwhile: the index of the token
            that it is for, and 32 tokens that may come in each number, the first its least bit.
        held: (m,) int32, the row of the board; negative where any token may come.
        outputs: (m,) int32, which tokens the logits are of.
        positions: (n,) int32, where in their sequences the tokens are.
    """

    board: Tensor
    held: Tensor
    outputs: Tensor
    positions: Tensor


def greedy(logits: Tensor, rows: Tensor, last: Tensor, posted: Posted) -> Tensor:
    """The most likely token of each row, the first of equals; -1 where any logit is not finite.

    Args:
        logits: (m, vocabulary), contiguous.
        rows: (m,) int32.
        last: (rows,) int32; last[rows] becomes what was chosen, 0 for -1.
        posted: any token may come where nothing is there for the one after the row's output.

    Returns:
        (m,) int32.
    """
    m, vocabulary = logits.shape
    block = min(4096, triton.next_power_of_2(vocabulary))
    pieces = triton.cdiv(vocabulary, block)
    words = posted.board.shape[1] - 1
    known = logits.new_empty(m, dtype=torch.int32)
    allowed = logits.new_empty(m, words, dtype=torch.int32)
    tops = logits.new_empty(m, pieces, dtype=torch.float32)
    places = logits.new_empty(m, pieces, dtype=torch.int32)
    chosen = logits.new_empty(m, dtype=torch.int32)
    _posted_kernel[(m,)](
        posted.board, posted.held, posted.outputs, posted.positions, known, allowed, words, 1024, num_warps=1
    )
    _peaks_kernel[(m, pieces)](logits, known, allowed, tops, places, vocabulary, words, block, num_warps=4)
    _greedy_kernel[(m,)](tops, places, rows, last, chosen, pieces, triton.next_power_of_2(pieces), num_warps=1)
    return chosen


@triton.jit
def _keep_kernel(source, to, pairs, vocabulary, BLOCK: tl.constexpr):
    pair = pairs + 2 * tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + tl.load(pair).to(tl.int64) * vocabulary + columns, mask=columns < vocabulary)
    tl.store(to + tl.load(pair + 1).to(tl.int64) * vocabulary + columns, value, mask=columns < vocabulary)


def keep_rows(source: Tensor, to: Tensor, pairs: Tensor) -> None:
    """`to[b] = source[a]` for each (a, b) of pairs.

    Args:
        source, to: (any, vocabulary), contiguous, of one dtype.
        pairs: (n, 2) int32, no b twice.
    """
    vocabulary = source.shape[1]
    block = min(4096, triton.next_power_of_2(vocabulary))
    _keep_kernel[(len(pairs), triton.cdiv(vocabulary, block))](source, to, pairs, vocabulary, block, num_warps=4)
