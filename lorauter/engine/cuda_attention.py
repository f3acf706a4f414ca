"""Triton kernels of attention over the paged cache, online softmax in float32.

`keys` and `values` are one layer's (blocks, kv_heads, BLOCK, head_dim), contiguous. Position p of row r lies in block
`table[r, p // BLOCK]` at `p % BLOCK`; `table` is (rows, max_blocks) int32. What lies beyond a row's positions may be
anything, and has no influence. How much there is to do is read on the device, so that CUDA graphs can hold the kernels.

Needs a GPU (or TRITON_INTERPRET=1). Knows nothing of models or requests beyond tensors.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, valid-type, attr-defined"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorauter.engine.cuda_lora import MIN_DOT, dot, precision

_KEYS = 64  # keys of a tile
_QUERY_ROWS = 128  # rows (tokens x grouped heads) of a query block
_TARGET_PROGRAMS = 264  # two for each multiprocessor of an H100: fewer, and long rows are split
_FOREVER = 1 << 30  # a window that no position is out of


@triton.jit
def _attend_tiles(
    query, best, mass, mixed, keys, values, table, head, low, high, end, position, window, scale, kv_heads,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Let queries attend to tiles of N keys from `low` to `high` (online softmax, in powers of 2).

    Unless MASKED all queries see all these keys; else those before `end`, up to their own position, in the window.
    """
    dims = tl.arange(0, DP)
    for start in range(low, high, N):
        at = start + tl.arange(0, N)
        if MASKED:
            block = tl.load(table + at // BLOCK, mask=at < end, other=0)
            inside = (at[:, None] < end) & (dims[None, :] < D)
        else:
            block = tl.load(table + at // BLOCK)
            inside = (at[:, None] >= 0) & (dims[None, :] < D)
        place = ((block.to(tl.int64) * kv_heads + head) * BLOCK + at % BLOCK) * D
        if MASKED or D != DP:
            key = tl.load(keys + place[:, None] + dims[None, :], mask=inside, other=0.0)
        else:
            key = tl.load(keys + place[:, None] + dims[None, :])
        scores = dot(query, tl.trans(key), tl.zeros((query.shape[0], N), tl.float32), EXACT) * scale
        if MASKED:
            seen = (at[None, :] < end) & (at[None, :] <= position[:, None])
            scores = tl.where(seen & (at[None, :] > position[:, None] - window), scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, 1))
        level = tl.where(peak == float("-inf"), 0.0, peak) if MASKED else peak  # a query may have seen nothing so far
        fade = tl.exp2(best - level)
        chance = tl.exp2(scores - level[:, None])
        mass = mass * fade + tl.sum(chance, 1)
        if MASKED or D != DP:
            value = tl.load(values + place[:, None] + dims[None, :], mask=inside, other=0.0)
        else:
            value = tl.load(values + place[:, None] + dims[None, :])
        mixed = dot(chance.to(value.dtype), value, mixed * fade[:, None], EXACT)
        best = peak
    return best, mass, mixed


@triton.jit(do_not_specialize=["window", "max_blocks"])
def _decode_kernel(
    q, keys, values, table, rows, positions, counts, out, partial, lse, window, scale, kv_heads, max_blocks,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(counts):
        return
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(positions + token) + 1
    begin = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - begin, N), SPLITS) * N
    low = tl.minimum(begin + split * share, length)
    high = tl.minimum(low + share, length)
    group = tl.arange(0, GP)
    dims = tl.arange(0, DP)
    mine = (group[:, None] < G) & (dims[None, :] < D)
    member = group[:, None] * D + dims[None, :]
    place = (token * kv_heads + head) * G * D + member
    query = tl.load(q + place, mask=mine, other=0.0)
    best, mass, mixed = _attend_tiles(
        query, tl.full((GP,), float("-inf"), tl.float32), tl.zeros((GP,), tl.float32), tl.zeros((GP, DP), tl.float32),
        keys, values, table + tl.load(rows + token).to(tl.int64) * max_blocks, head, low, high, high,
        length - 1 + group * 0, window, scale, kv_heads, D, DP, N, BLOCK, True, EXACT,
    )  # fmt: skip
    if SPLITS == 1:
        tl.store(out + place, mixed / mass[:, None], mask=mine)
    else:
        piece = (token * kv_heads + head) * SPLITS + split
        if low < high:
            tl.store(partial + piece * G * D + member, mixed / mass[:, None], mask=mine)
            tl.store(lse + piece * G + group, best + tl.log2(mass), mask=group < G)
        else:
            tl.store(lse + piece * G + group, tl.full((GP,), float("-inf"), tl.float32), mask=group < G)


@triton.jit
def _join_kernel(
    partial, lse, counts, out, kv_heads, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr
):
    if tl.program_id(0) // kv_heads >= tl.load(counts):
        return
    piece = tl.program_id(0).to(tl.int64)
    member = tl.program_id(1)
    dims = tl.arange(0, DP)
    splits = tl.arange(0, SPLITS)
    weights = tl.load(lse + (piece * SPLITS + splits) * G + member)
    weights = tl.exp2(weights - tl.max(weights))
    parts = tl.load(
        partial + ((piece * SPLITS + splits) * G + member)[:, None] * D + dims[None, :],
        mask=(weights != 0)[:, None] & (dims[None, :] < D), other=0.0,
    )  # fmt: skip
    joined = tl.sum(parts * weights[:, None], 0) / tl.sum(weights)
    tl.store(out + (piece * G + member) * D + dims, joined, mask=dims < D)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, rows: Tensor, positions: Tensor, counts: Tensor,
    window: int | None, max_len: int, out: Tensor,
) -> None:  # fmt: skip
    """Attention of one query token a row over its own row of the cache, up to its own position.

    Grouped queries share each key that is read; rows of few heads are split over the keys and joined (flash
    decoding). Only live keys are read.

    Args:
        q: (n, heads, head_dim), contiguous.
        keys, values, table: one layer's cache, see the module.
        rows, positions: (n or more,) int32, of every token.
        counts: (1 or more,) int32: only the first counts[0] <= n tokens attend.
        window: of sliding attention, in positions.
        max_len: how many positions a row has at most.
        out: (n or more, heads * head_dim), contiguous, written for the tokens that attend.
    """
    n, heads, d = q.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    splits = 1
    while splits < 32 and n * kv_heads * splits < _TARGET_PROGRAMS and max_len > 2 * _KEYS * splits:
        splits *= 2
    pieces = n * kv_heads * splits
    partial = q.new_empty(pieces * group * d if splits > 1 else 1, dtype=torch.float32)
    lse = q.new_empty(pieces * group if splits > 1 else 1, dtype=torch.float32)
    padded = triton.next_power_of_2(d)
    _decode_kernel[(n, kv_heads, splits)](
        q, keys, values, table, rows, positions, counts, out, partial, lse, window or _FOREVER, _scale(d), kv_heads,
        table.shape[1], group, max(MIN_DOT, triton.next_power_of_2(group)), d, max(MIN_DOT, padded), _KEYS,
        keys.shape[2], splits, precision(q), num_warps=4, num_stages=5 if q.itemsize * padded <= 256 else 2,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(n * kv_heads, group)](
            partial, lse, counts, out, kv_heads, group, d, padded, splits, num_warps=4 if splits > 4 else 1
        )


@triton.jit(do_not_specialize=["window", "max_blocks"])
def _prefill_kernel(
    q, keys, values, table, queries, counts, out, window, scale, kv_heads, max_blocks,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # The last blocks of a prompt have most to do, and begin first.
    block = tl.load(counts + 1) - 1 - tl.program_id(1)
    if block < 0:
        return
    head = tl.program_id(0)
    first_token = tl.load(queries + block * 4).to(tl.int64)
    tokens = tl.load(queries + block * 4 + 1)
    row = tl.load(queries + block * 4 + 2).to(tl.int64)
    first_row = tl.program_id(2) * M
    if first_row >= tokens * G:
        return
    member = first_row + tl.arange(0, M)
    known = member < tokens * G
    start = tl.load(queries + block * 4 + 3)
    position = start + member // G
    dims = tl.arange(0, DP)
    mine = known[:, None] & (dims[None, :] < D)
    place = (first_token + member // G) * kv_heads * G + head * G + member % G
    place = place[:, None] * D + dims[None, :]
    query = tl.load(q + place, mask=mine, other=0.0)
    # From the first query's position to the last one's; all see the keys from `clear` to `open`.
    open_ = start + first_row // G + 1
    end = tl.minimum(start + (first_row + M - 1) // G + 1, start + tokens)
    state_best = tl.full((M,), float("-inf"), tl.float32)
    state_mass = tl.zeros((M,), tl.float32)
    state = tl.zeros((M, DP), tl.float32)
    mine_table = table + row * max_blocks
    low = 0
    if WINDOWED:
        low = tl.maximum(open_ - window, 0) // N * N
        clear = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), N) * N, tl.cdiv(end, N) * N)
        state_best, state_mass, state = _attend_tiles(
            query, state_best, state_mass, state, keys, values, mine_table, head, low, clear, end, position, window,
            scale, kv_heads, D, DP, N, BLOCK, True, EXACT,
        )  # fmt: skip
        low = clear
    open_ = tl.maximum(open_ // N * N, low)
    state_best, state_mass, state = _attend_tiles(
        query, state_best, state_mass, state, keys, values, mine_table, head, low, open_, end, position, window,
        scale, kv_heads, D, DP, N, BLOCK, False, EXACT,
    )  # fmt: skip
    state_best, state_mass, state = _attend_tiles(
        query, state_best, state_mass, state, keys, values, mine_table, head, open_, end, end, position, window,
        scale, kv_heads, D, DP, N, BLOCK, True, EXACT,
    )  # fmt: skip
    tl.store(out + place, state / state_mass[:, None], mask=mine)


def query_tokens(group: int) -> int:
    """How many tokens a query block of `prefill_attention` has at most, for so many query heads a key head."""
    return max(1, _QUERY_ROWS // group)


def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, queries: Tensor, counts: Tensor, window: int | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Causal attention of prompt pieces over their rows of the cache, a block of queries at a time.

    Args:
        q: (tokens, heads, head_dim), contiguous.
        keys, values, table: one layer's cache, see the module.
        queries: (Q, 4) int32, contiguous, the query blocks: the index of the first token among all, how many there are
            (1 to `query_tokens(heads // kv_heads)`, successive tokens of one piece), their row, the first's position.
        counts: (2,) int32: counts[1] <= Q is how many query blocks there are.
        window: of sliding attention, in positions.
        out: (tokens, heads * head_dim), contiguous, written for these tokens.
    """
    heads, d = q.shape[1:]
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    padded = max(MIN_DOT, triton.next_power_of_2(d))
    block, warps, stages = _query_tile(q.itemsize * padded)
    most = query_tokens(group) * group
    block = min(block, max(MIN_DOT, triton.next_power_of_2(most)))
    _prefill_kernel[(kv_heads, queries.shape[0], triton.cdiv(most, block))](
        q, keys, values, table, queries, counts, out, window or _FOREVER, _scale(d), kv_heads, table.shape[1],
        group, d, padded, block, _KEYS, keys.shape[2], window is not None, precision(q),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _query_tile(width: int) -> tuple[int, int, int]:
    """Rows of a program, its warps and the stages of its loops, for heads of so many bytes."""
    return (128, 8, 3) if width <= 256 else (64, 4, 2) if width <= 512 else (32, 4, 1)


def _scale(head_dim: int) -> float:
    """Of scores, for a softmax in powers of 2."""
    return float(head_dim**-0.5 * 1.4426950408889634)
