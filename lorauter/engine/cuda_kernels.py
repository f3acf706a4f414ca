"""Triton kernels of the decode step: fused norms, rotary embedding with the cache write, attention, LoRA.

Each wrapper documents the function that it computes; `lorauter.engine.torch_step` has the same in plain PyTorch.
Needs a GPU (or TRITON_INTERPRET=1). Knows nothing of models or batches beyond tensors.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, attr-defined"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_MIN_DOT = 16  # the smallest matrix side that tl.dot takes
_KEYS = 64  # keys a block of the attention kernel
_SHRINK_INPUTS = 1024  # inputs that a program of the shrinking kernel sums: wider layers are split, and joined
_EXPAND_COLUMNS = 32  # outputs of a program of the expanding kernel
_TARGET_PROGRAMS = 264  # two for each multiprocessor of an H100: fewer, and long rows are split


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


@triton.jit
def _silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, gate * tl.sigmoid(gate) * up, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of a contiguous (n, 2 * width), halves side by side."""
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(n, width)
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul_kernel[(n, triton.cdiv(width, block))](gate_up, out, width, block)
    return out


@triton.jit
def _rotate_store_kernel(
    qkv, cos, sin, rows, positions, q_out, keys, values, stride_row, stride_head, heads, kv_heads,
    D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    total = heads + 2 * kv_heads
    columns = tl.arange(0, HALF)
    inside = columns < D // 2
    base = qkv + (token * total + head) * D + columns
    first = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(base + D // 2, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions + token)
    if head < heads + kv_heads:
        c = tl.load(cos + position * D + columns, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + position * D + columns, mask=inside, other=0.0).to(tl.float32)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    if head < heads:
        place = q_out + (token * heads + head) * D + columns
        tl.store(place, first, mask=inside)
        tl.store(place + D // 2, second, mask=inside)
    else:
        row = tl.load(rows + token)
        if head < heads + kv_heads:
            place = keys + row * stride_row + (head - heads) * stride_head + position * D + columns
            tl.store(place, first, mask=inside)
            tl.store(place + D // 2, second, mask=inside)
        else:
            place = values + row * stride_row + (head - heads - kv_heads) * stride_head + position * D + columns
            tl.store(place, first, mask=inside)
            tl.store(place + D // 2, second, mask=inside)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor, heads: int
) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of queries and keys, and the cache write, in one pass.

    Args:
        qkv: (n, heads + 2 * kv_heads, head_dim), contiguous.
        cos, sin: (positions, head_dim) tables.
        rows, positions: (n,) int64, where each token goes.
        keys, values: (rows, kv_heads, length, head_dim), one layer's cache, written.
        heads: how many of qkv's heads are queries.

    Returns:
        (n, heads, head_dim) rotated queries.
    """
    n, total, d = qkv.shape
    q = qkv.new_empty(n, heads, d)
    _rotate_store_kernel[(n, total)](
        qkv, cos, sin, rows, positions, q, keys, values, keys.stride(0), keys.stride(1), heads, (total - heads) // 2,
        d, triton.next_power_of_2(d // 2), num_warps=1,
    )  # fmt: skip
    return q


@triton.jit
def _attend_kernel(
    q, keys, values, out, partial, lse, rows, positions, scale, window, stride_row, stride_head, kv_heads,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(positions + token) + 1
    begin = tl.maximum(length - window, 0)
    share = tl.cdiv(length - begin, SPLITS)
    low = begin + split * share
    high = tl.minimum(low + share, length)
    group = tl.arange(0, GP)
    dims = tl.arange(0, DP)
    mine = (group[:, None] < G) & (dims[None, :] < D)
    place = (token * kv_heads + head) * G * D + group[:, None] * D + dims[None, :]
    query = tl.load(q + place, mask=mine, other=0.0)
    cache = tl.load(rows + token) * stride_row + head * stride_head
    best = tl.full((GP,), float("-inf"), tl.float32)
    mass = tl.zeros((GP,), tl.float32)
    mixed = tl.zeros((GP, DP), tl.float32)
    for start in range(low, high, N):
        at = start + tl.arange(0, N)
        inside = (at[:, None] < high) & (dims[None, :] < D)
        offsets = cache + at[:, None] * D + dims[None, :]
        key = tl.load(keys + offsets, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=EXACT) * scale
        scores = tl.where(at[None, :] < high, scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, 1))
        fade = tl.exp(best - peak)
        chance = tl.exp(scores - peak[:, None])
        mass = mass * fade + tl.sum(chance, 1)
        value = tl.load(values + offsets, mask=inside, other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(chance.to(value.dtype), value, input_precision=EXACT)
        best = peak
    if SPLITS == 1:
        tl.store(out + place, mixed / mass[:, None], mask=mine)
    else:
        mixed = mixed / tl.where(mass > 0, mass, 1.0)[:, None]
        piece = (token * kv_heads + head) * SPLITS + split
        tl.store(partial + piece * G * D + group[:, None] * D + dims[None, :], mixed, mask=mine)
        weight = tl.where(mass > 0, best + tl.log(mass), float("-inf"))
        tl.store(lse + piece * G + group, weight, mask=group < G)


@triton.jit
def _join_kernel(partial, lse, out, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    member = tl.program_id(1)
    dims = tl.arange(0, DP)
    splits = tl.arange(0, SPLITS)
    weights = tl.load(lse + (piece * SPLITS + splits) * G + member)
    weights = tl.exp(weights - tl.max(weights))
    parts = tl.load(
        partial + ((piece * SPLITS + splits) * G + member)[:, None] * D + dims[None, :],
        mask=dims[None, :] < D, other=0.0,
    )  # fmt: skip
    joined = tl.sum(parts * weights[:, None], 0) / tl.sum(weights)
    tl.store(out + (piece * G + member) * D + dims, joined, mask=dims < D)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, window: int | None
) -> Tensor:
    """Attention of one query token a row over its own cache row, up to its own position.

    Grouped queries share each key that is read; rows of few heads are split over the keys and joined (flash
    decoding). Only live keys are read.

    Args:
        q: (n, heads, head_dim), contiguous.
        keys, values: (rows, kv_heads, length, head_dim), one layer's cache.
        rows, positions: (n,) int64.
        window: of sliding attention, in positions.

    Returns:
        (n, heads * head_dim).
    """
    n, heads, d = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    splits = 1
    while splits < 16 and n * kv_heads * splits < _TARGET_PROGRAMS and length > 2 * _KEYS * splits:
        splits *= 2
    out = torch.empty_like(q)
    pieces = n * kv_heads * splits
    partial = q.new_empty(pieces * group * d if splits > 1 else 1, dtype=torch.float32)
    lse = q.new_empty(pieces * group if splits > 1 else 1, dtype=torch.float32)
    padded = triton.next_power_of_2(d)
    _attend_kernel[(n, kv_heads, splits)](
        q, keys, values, out, partial, lse, rows, positions, d**-0.5, length if window is None else window,
        keys.stride(0), keys.stride(1), kv_heads, group, max(_MIN_DOT, triton.next_power_of_2(group)), d, padded, _KEYS,
        splits, _precision(q), num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(n * kv_heads, group)](partial, lse, out, group, d, padded, splits, num_warps=1)
    return out.view(n, heads * d)


@triton.jit
def _shrink_kernel(
    x, a, places, starts, m, u, partial, tokens, width, capacity, targets,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    used = tl.load(starts + targets)
    if tl.program_id(1) * N >= used:
        return
    columns = tl.program_id(1) * N + tl.arange(0, N)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    split = tl.program_id(2)
    place = tl.load(places + columns, mask=columns < used, other=0).to(tl.int64)
    share = tl.cdiv(tl.cdiv(width, K), SPLITS) * K
    total = tl.zeros((M, N), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, width), K):
        inputs = start + tl.arange(0, K)
        inside = inputs < width
        left = tl.load(
            x + rows[:, None].to(tl.int64) * width + inputs[None, :],
            mask=(rows[:, None] < tokens) & inside[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(a + place[:, None] * width + inputs[None, :], mask=inside[None, :], other=0.0)
        total += tl.dot(left, tl.trans(right), input_precision=EXACT)
    live = (rows[:, None] < tokens) & (columns[None, :] < used)
    into = rows[:, None] * capacity + columns[None, :]
    if SPLITS == 1:
        tl.store(u + into, total * tl.load(m + into, mask=live, other=0.0).to(tl.float32), mask=live)
    else:
        tl.store(partial + split * tokens * capacity + into, total, mask=live)


@triton.jit
def _shrunk_kernel(partial, starts, m, u, tokens, capacity, targets, N: tl.constexpr, SPLITS: tl.constexpr):
    columns = tl.program_id(1) * N + tl.arange(0, N)
    used = tl.load(starts + targets)
    if tl.program_id(1) * N >= used:
        return
    live = columns < used
    into = tl.program_id(0) * capacity + columns
    total = tl.zeros((N,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * tokens * capacity + into, mask=live, other=0.0)
    tl.store(u + into, total * tl.load(m + into, mask=live, other=0.0).to(tl.float32), mask=live)


def lora_shrink(x: Tensor, a: Tensor, places: Tensor, starts: Tensor, m: Tensor) -> Tensor:
    """`(x A^T) * m` for the columns in use.

    Args:
        x: (n, in), contiguous.
        a: (columns, in), contiguous.
        places: (C,) int32, which columns; the first starts[-1] of them count.
        starts: (targets + 1,) int32.
        m: (n, C), contiguous.

    Returns:
        (n, C) in x's dtype, with anything in columns that do not count.
    """
    n, width = x.shape
    capacity, targets = places.shape[0], starts.shape[0] - 1
    splits = min(16, triton.next_power_of_2(triton.cdiv(width, _SHRINK_INPUTS)))
    rows = min(64, max(_MIN_DOT, triton.next_power_of_2(n)))
    block = 16 if width <= _SHRINK_INPUTS else 32 if n <= 64 else 64
    u = x.new_empty(n, capacity)
    partial = x.new_empty(splits, n, capacity, dtype=torch.float32) if splits > 1 else u
    _shrink_kernel[(triton.cdiv(n, rows), triton.cdiv(capacity, block), splits)](
        x, a, places, starts, m, u, partial, n, width, capacity, targets, rows, block, 128, splits,
        _precision(x), num_warps=4, num_stages=5,
    )  # fmt: skip
    if splits > 1:
        _shrunk_kernel[(n, triton.cdiv(capacity, 256))](
            partial, starts, m, u, n, capacity, targets, 256, splits, num_warps=2
        )
    return u


@triton.jit
def _expand_part(
    y, u, starts, places, part, b, out_width, offset, block, tokens, capacity, width,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    first = tl.load(starts + part)
    last = tl.load(starts + part + 1)
    if first == last:
        return
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = block * N + tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in range(first, last, K):
        ranks = start + tl.arange(0, K)
        live = (rows[:, None] < tokens) & (ranks[None, :] < last)
        shrunk = tl.load(u + rows[:, None] * capacity + ranks[None, :], mask=live, other=0.0)
        inside = (ranks[:, None] < last) & (columns[None, :] < out_width)
        which = tl.load(places + ranks, mask=ranks < last, other=0).to(tl.int64)
        wide = tl.load(b + which[:, None] * out_width + columns[None, :], mask=inside, other=0.0)
        total += tl.dot(shrunk, wide, input_precision=EXACT)
    inside = (rows[:, None] < tokens) & (columns[None, :] < out_width)
    into = y + rows[:, None].to(tl.int64) * width + offset + columns[None, :]
    tl.store(into, tl.load(into, mask=inside, other=0.0).to(tl.float32) + total, mask=inside)


@triton.jit
def _expand_kernel(
    y, u, starts, places, b0, n0, b1, n1, b2, n2, tokens, capacity, width,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # n0, n1, n2 are the widths of the parts, side by side in y; each program has a block of columns of one of them.
    block = tl.program_id(1)
    blocks0 = tl.cdiv(n0, N)
    blocks1 = tl.cdiv(n1, N)
    if block < blocks0:
        _expand_part(y, u, starts, places, 0, b0, n0, 0, block, tokens, capacity, width, M, N, K, EXACT)
    elif block < blocks0 + blocks1:
        block -= blocks0
        _expand_part(y, u, starts, places, 1, b1, n1, n0, block, tokens, capacity, width, M, N, K, EXACT)
    else:
        block -= blocks0 + blocks1
        _expand_part(y, u, starts, places, 2, b2, n2, n0 + n1, block, tokens, capacity, width, M, N, K, EXACT)


def lora_expand(y: Tensor, u: Tensor, starts: Tensor, places: Tensor, bs: Sequence[Tensor]) -> None:
    """`y[:, part] += u[:, columns of the part] B` for up to three parts of y's columns, in one launch.

    Args:
        y: (n, width), contiguous, changed in place.
        u: (n, C), contiguous.
        starts: (targets + 1,) int32, where the columns of each begin.
        places: (C,) int32, which of its target's columns each is.
        bs: (columns, width) of each target, contiguous, as they lie in y from left to right.
    """
    n, width = y.shape
    arguments: list[object] = []
    for b in bs:
        arguments += [b, b.shape[1]]
    arguments += [bs[0], 0] * (3 - len(bs))
    blocks = sum(triton.cdiv(b.shape[1], _EXPAND_COLUMNS) for b in bs)
    rows = min(64, max(_MIN_DOT, triton.next_power_of_2(n)))
    _expand_kernel[(triton.cdiv(n, rows), blocks)](
        y, u, starts, places, *arguments, n, u.shape[1], width, rows, _EXPAND_COLUMNS, 64, _precision(y), num_warps=4
    )


def _precision(x: Tensor) -> str:
    """How tl.dot multiplies: float32 exactly, not as TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
