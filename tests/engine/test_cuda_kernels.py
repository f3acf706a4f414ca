"""The GPU's kernels against plain PyTorch at odd shapes: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so it has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

FULL, HALF = torch.float32, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16


def assert_near(got, expected, *, steps=2):
    """As near as `steps` roundings to the dtype leave it. The interpreter cuts off where a GPU rounds."""
    step = 4e-6 if got.dtype == FULL else 2**-8 if DEVICE == "cuda" else 2**-7
    tolerance = steps * step
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=tolerance, equal_nan=True)


def ints(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


@pytest.fixture
def dtype():
    return FULL


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def randn(dtype, draw):
    return lambda *shape: torch.randn(*shape, generator=draw).to(DEVICE, dtype)


@pytest.fixture
def kernels():
    from lorauter.engine import cuda_kernels

    return cuda_kernels


class Cache:
    """Rows of the given lengths, in blocks in random order; whatever no row has is NaN."""

    def __init__(self, lengths, kv_heads, dim, dtype, draw):
        self.lengths = lengths
        widest = -(-max(lengths) // BLOCK) + 1
        blocks = sum(-(-length // BLOCK) for length in lengths) + 2
        order = (torch.randperm(blocks - 1, generator=draw) + 1).tolist()
        self.table = torch.zeros(len(lengths) + 1, widest, dtype=torch.int32, device=DEVICE)
        self.keys = torch.full((blocks, kv_heads, BLOCK, dim), torch.nan, dtype=dtype, device=DEVICE)
        self.values = self.keys.clone()
        for row, length in enumerate(lengths):
            for i in range(-(-length // BLOCK)):
                self.table[row, i] = order.pop()

    def fill(self, draw):
        """Random keys and values up to the rows' lengths."""
        for cache in (self.keys, self.values):
            for row, length in enumerate(self.lengths):
                for position in range(length):
                    block = self.table[row, position // BLOCK]
                    cache[block, :, position % BLOCK] = torch.randn(cache.shape[1], cache.shape[3], generator=draw)

    def row(self, cache, row, length):
        """(kv_heads, length, dim), in order."""
        blocks = cache[self.table[row, : -(-length // BLOCK)].long()]
        return blocks.transpose(0, 1).flatten(1, 2)[:, :length]

    def attend(self, q, row, position, window):
        """One token's attention: (heads, dim) to (heads, dim), in float32."""
        first = 0 if window is None else max(0, position + 1 - window)
        group = q.shape[0] // self.keys.shape[1]
        keys, values = (
            self.row(cache, row, position + 1)[:, first:].float().repeat_interleave(group, dim=0)
            for cache in (self.keys, self.values)
        )
        scores = (q.float()[:, None] @ keys.transpose(1, 2)) * q.shape[1] ** -0.5
        return (scores.softmax(-1) @ values)[:, 0]


class Lora:
    """A group's adapters, in an arena that is NaN elsewhere, and the weights of rows.

    Args:
        ranks: of each adapter, its rank in each target; 0 where it lacks it.
        weights: (rows, adapters).
    """

    layers, layer = 3, 1

    def __init__(self, ranks, inputs, widths, weights, dtype, draw, *, spare=5):
        self.inputs, self.widths, self.ranks = inputs, widths, ranks
        self.slots = [2 * i + 1 for i in range(len(ranks))]
        self.weights = torch.zeros(len(weights), 2 * len(ranks) + 1, device=DEVICE)
        self.weights[:, self.slots] = torch.tensor(weights, device=DEVICE)
        self.pairs, pieces, tiles, starts, offset = {}, [], [], [0], 0

        def place(matrix):
            nonlocal offset
            began = offset
            gap = -matrix.numel() % 8 + 8
            pieces.extend([matrix.flatten(), torch.full((gap,), torch.nan)])
            offset += matrix.numel() + gap
            return began

        for target, width in enumerate(widths):
            for adapter in range(len(ranks)):
                if rank := ranks[adapter][target]:
                    a = torch.randn(rank, self.layers, inputs, generator=draw) / inputs**0.5
                    b = torch.randn(rank, self.layers, width, generator=draw) / rank**0.5
                    self.pairs[adapter, target] = a, b
                    at_a, at_b = place(a), place(b)
                    for first in range(0, rank, 16):
                        a_offset = at_a + first * self.layers * inputs
                        b_offset = at_b + first * self.layers * width
                        tiles.append((a_offset, b_offset, min(16, rank - first), self.slots[adapter]))
            starts.append(len(tiles))
        garbage = [(1 << 40, 1 << 40, 16, 1 << 20)] * spare
        self.tiles = torch.tensor([*tiles, *garbage], device=DEVICE).T.contiguous()
        self.used = len(tiles)
        self.starts = ints(*starts)
        self.arena = torch.cat([torch.empty(0), *pieces]).to(DEVICE, dtype)

    def spoil(self, adapter, number):
        """Let an adapter's A and B have a number that is not finite."""
        for target in range(len(self.widths)):
            for index, t in enumerate(self.tiles[:, : self.used].T.tolist()):
                if t[3] == self.slots[adapter] and self.starts[target] <= index < self.starts[target + 1]:
                    self.arena[t[0] + self.layer * self.inputs] = number
                    self.arena[t[1] + self.layer * self.widths[target] + 1] = number

    def columns(self, tile):
        """A tile's A and B, (columns, in) and (columns, out) in float32."""
        a, b, columns, _ = self.tiles[:, tile].tolist()
        width = next(w for i, w in enumerate(self.widths) if tile < self.starts[i + 1])
        members = torch.arange(columns, device=DEVICE)[:, None] * self.layers + self.layer
        return tuple(
            self.arena[begin + members * wide + torch.arange(wide, device=DEVICE)].float()
            for begin, wide in ((a, self.inputs), (b, width))
        )

    def shrunk(self, x, rows):
        """What lora_shrink gives, up to the tiles in use."""
        u = torch.zeros(len(x), self.used * 16, device=DEVICE)
        for tile in range(self.used):
            a, _ = self.columns(tile)
            weight = self.weights[rows.long(), self.tiles[3, tile]][:, None]
            products = torch.stack([(x.float() * column).sum(-1) for column in a], dim=1)
            u[:, tile * 16 : tile * 16 + len(a)] = torch.where(weight != 0, weight * products, 0.0)
        return u.to(x.dtype)

    def expanded(self, u):
        """What lora_expand adds."""
        added, offset = [], 0
        for target, width in enumerate(self.widths):
            part = torch.zeros(len(u), width, device=DEVICE)
            for tile in range(self.starts[target], self.starts[target + 1]):
                _, b = self.columns(tile)
                for i, column in enumerate(b):
                    scale = u[:, tile * 16 + i, None].float()
                    part += torch.where(scale != 0, scale * column, 0.0)
            added.append(part)
            offset += width
        return torch.cat(added, dim=1)


class Cases:
    @pytest.mark.parametrize("dtype", [FULL, HALF])
    @pytest.mark.parametrize("width", [6, 576])
    def test_add_norm(self, kernels, randn, width):
        x, delta, weight = randn(5, width), randn(5, width), randn(width)
        for more in (None, delta):
            total, normed = kernels.add_norm(x, more, weight, 1e-5)
            expected = x if more is None else x + delta
            assert_near(total, expected, steps=1)
            assert_near(normed, F.rms_norm(expected.float(), (width,), weight.float(), 1e-5))

    @pytest.mark.parametrize("dtype", [FULL, HALF])
    @pytest.mark.parametrize("width", [6, 50, 1100])
    def test_silu_mul(self, kernels, randn, width):
        gate_up = randn(3, 2 * width) * 10
        gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = -500, 500, torch.nan
        gate, up = gate_up.float().chunk(2, dim=-1)
        assert_near(kernels.silu_mul(gate_up), F.silu(gate) * up)

    @pytest.mark.parametrize(
        ("dtype", "n", "heads", "kv_heads", "dim"),
        [(FULL, 1, 4, 2, 16), (HALF, 9, 4, 2, 80), (FULL, 35, 3, 1, 20), (FULL, 260, 1, 1, 80), (HALF, 260, 1, 1, 16)],
    )
    def test_rotate_and_store(self, kernels, randn, dtype, draw, n, heads, kv_heads, dim):
        lengths = [n, 3, 40]
        cache = Cache(lengths, kv_heads, dim, dtype, draw)
        rows = ints(*torch.randint(0, 3, (n,), generator=draw).tolist())
        rows[-1] = 3  # padding
        positions = torch.zeros_like(rows)
        for row, length in enumerate(lengths):
            mine = (rows == row).nonzero()[:length, 0]
            rows[(rows == row).nonzero()[length:, 0]] = 3
            positions[mine] = ints(*torch.randperm(length, generator=draw)[: len(mine)].tolist())
        qkv = randn(n, heads + 2 * kv_heads, dim)
        cos, sin = (randn(n + 40, dim // 2).repeat(1, 2) for _ in range(2))
        keys, values = cache.keys.clone(), cache.values.clone()
        q = kernels.rotate_and_store(qkv, cos, sin, rows, positions, cache.table, keys, values, heads)
        self.check_rotated(q, keys, values, qkv.float(), cos, sin, rows, positions, cache, heads)

    def check_rotated(self, q, keys, values, qkv, cos, sin, rows, positions, cache, heads, steps=2):
        kv_heads = cache.keys.shape[1]
        first, second = qkv.chunk(2, dim=-1)
        at = positions.long()[:, None]
        rotated = qkv * cos[at].float() + torch.cat((-second, first), dim=-1) * sin[at].float()
        assert_near(q, rotated[:, :heads], steps=steps)
        blocks, inside = cache.table[rows.long(), at[:, 0] // BLOCK].long(), at[:, 0] % BLOCK
        expected_keys, expected_values = cache.keys.clone(), cache.values.clone()
        expected_keys[blocks, :, inside] = rotated[:, heads:-kv_heads].to(keys.dtype)
        expected_values[blocks, :, inside] = qkv[:, -kv_heads:].to(keys.dtype)
        assert_near(keys[1:], expected_keys[1:], steps=steps)
        assert_near(values[1:], expected_values[1:], steps=steps)

    @pytest.mark.parametrize(
        ("dtype", "heads", "kv_heads", "dim", "max_len", "window"),
        [
            (FULL, 6, 2, 64, 100, None),
            (HALF, 6, 2, 64, 100, 70),
            (HALF, 4, 1, 80, 300, None),
            (FULL, 4, 1, 80, 300, 1),
            (FULL, 2, 2, 16, 300, 70),
            (FULL, 7, 1, 20, 2000, None),
            (HALF, 7, 1, 20, 2000, 70),
        ],
    )
    def test_decode_attention(self, kernels, randn, dtype, draw, heads, kv_heads, dim, max_len, window):
        lengths = [1, 64, 65, 150]
        cache = Cache(lengths, kv_heads, dim, dtype, draw)
        cache.fill(draw)
        rows, positions = ints(3, 1, 0, 2, 4), ints(*[lengths[row] - 1 for row in (3, 1, 0, 2)], 0)
        q = randn(5, heads, dim)
        for decoding in (3, 4):
            out = torch.full((6, heads * dim), 7.0, dtype=dtype, device=DEVICE)
            counts = ints(decoding, 0)
            kernels.decode_attention(
                q, cache.keys, cache.values, cache.table, rows, positions, counts, window, max_len, out
            )
            assert (out[decoding:] == 7).all()
            for i in range(decoding):
                expected = cache.attend(q[i], int(rows[i]), int(positions[i]), window)
                assert_near(out[i].view(heads, dim), expected)

    @pytest.mark.parametrize(
        ("dtype", "heads", "kv_heads", "dim", "window"),
        [
            (FULL, 3, 1, 64, None),
            (HALF, 3, 1, 64, 70),
            (HALF, 4, 1, 16, None),
            (FULL, 4, 1, 16, 1),
            (FULL, 14, 2, 20, 70),
            (HALF, 14, 2, 20, None),
            (FULL, 1, 1, 80, 70),
            (HALF, 1, 1, 80, None),
            (FULL, 2, 1, 136, 70),
        ],
    )
    def test_prefill_attention(self, kernels, randn, dtype, draw, heads, kv_heads, dim, window):
        pieces = [(2, 0, 1), (0, 0, 50), (3, 130, 20), (1, 15, 70)]  # row, position, tokens
        cache = Cache([50, 85, 1, 150], kv_heads, dim, dtype, draw)
        cache.fill(draw)
        offset, queries, owner = 2, [], []
        for row, start, length in pieces:
            for first in range(0, length, kernels.query_tokens(heads // kv_heads)):
                count = min(kernels.query_tokens(heads // kv_heads), length - first)
                queries.append((offset + first, count, row, start + first))
                owner += [(offset + first + i, row, start + first + i) for i in range(count)]
            offset += length
        missing = queries.pop(0)
        assert missing[1] == 1
        q = randn(offset + 1, heads, dim)
        out = torch.full((offset + 1, heads * dim), 7.0, dtype=dtype, device=DEVICE)
        queries += [(1 << 20, 1 << 20, 1 << 20, 1 << 20)]
        kernels.prefill_attention(
            q, cache.keys, cache.values, cache.table, ints(*queries), ints(0, len(queries) - 1), window, out
        )
        for i in (0, 1, missing[0], offset):
            assert (out[i] == 7).all()
        for i, row, position in owner[1:]:
            assert_near(out[i].view(heads, dim), cache.attend(q[i], row, position, window))

    RANKS = ([1, 0, 7], [16, 17, 0], [40, 3, 5])

    def lora(self, dtype, draw, n, inputs, widths, **options):
        """Adapters 0 to 2; rows 0 to 3 of which the last has none, as padding, and 0 mixes two."""
        weights = [[0.5, 0.0, 1.5], [0.0, 1.0, 0.0], [0.0, 0.0, -2.0], [0.0, 0.0, 0.0]]
        ranks = [rank[: len(widths)] for rank in self.RANKS]
        lora = Lora(ranks, inputs, widths, weights, dtype, draw, **options)
        # Row after row, as in prompts, and mixed, as decoding rows are.
        rows = torch.arange(n) * 4 // n if n > 70 else torch.randint(0, 4, (n,), generator=draw)
        return lora, rows.int().to(DEVICE)

    def live(self, kernels, lora, rows):
        return kernels.lora_live(rows, lora.weights, [(lora.tiles, lora.starts)])[0]

    def shrink(self, kernels, lora, x, rows, live):
        return kernels.lora_shrink(
            x, rows, lora.tiles, lora.starts, lora.arena, lora.layer, lora.layers, lora.weights, live
        )

    def expand(self, kernels, lora, y, u, live):
        kernels.lora_expand(y, u, lora.tiles, lora.starts, lora.arena, lora.layer, lora.layers, lora.widths, live)

    def by_tile(self, lora, u, live):
        """u with the columns of tile t at 16 t, 0 where lists lack it."""
        if live is None:
            return u[:, : lora.used * 16]
        sorted_ = torch.zeros(len(u), lora.used * 16, dtype=u.dtype, device=DEVICE)
        for token in range(len(u)):
            mine = live[token // 64]
            for i, tile in enumerate(mine[8 : 8 + mine[len(lora.widths)]].tolist()):
                sorted_[token, tile * 16 : tile * 16 + 16] = u[token, i * 16 : i * 16 + 16]
        return sorted_

    def test_lora_live(self, kernels, draw):
        lora, rows = self.lora(torch.float32, draw, 300, 16, [16, 20, 8])
        assert self.live(kernels, lora, rows[:256]) is None
        live = self.live(kernels, lora, rows)
        assert len(live) == 5
        for block, mine in zip(rows.split(64), live, strict=True):
            weight = lora.weights[block.long()][:, lora.tiles[3, : lora.used]]
            expected = (weight != 0).any(0).nonzero()[:, 0].tolist()
            bounds = mine[:4].tolist()
            assert mine[8 : 8 + bounds[3]].tolist() == expected
            assert bounds == [sum(tile < start for tile in expected) for start in lora.starts.tolist()]

    @pytest.mark.parametrize(
        ("dtype", "n", "inputs", "listed"),
        [
            (FULL, 1, 50, True),
            (HALF, 35, 6, True),
            (FULL, 20, 600, True),
            (HALF, 5, 1100, True),
            (FULL, 70, 64, True),
            (HALF, 70, 600, True),
            (FULL, 300, 64, True),
            (HALF, 300, 64, False),
            (FULL, 257, 600, True),
        ],
    )
    def test_lora_shrink(self, kernels, randn, dtype, draw, monkeypatch, n, inputs, listed):
        monkeypatch.setattr("lorauter.engine.cuda_lora._SHRINK_WHOLE", 64)
        lora, rows = self.lora(dtype, draw, n, inputs, [16, 20, 8])
        x = randn(n, inputs)
        live = self.live(kernels, lora, rows) if listed else None
        u = self.shrink(kernels, lora, x, rows, live)
        assert u.shape == (n, lora.tiles.shape[1] * 16) and u.dtype == dtype
        expected = lora.shrunk(x, rows)
        assert_near(self.by_tile(lora, u, live), expected)
        assert torch.equal(self.by_tile(lora, u, live) == 0, expected == 0)

    def test_some_of_the_tokens_have_their_part_of_the_lists(self, kernels, randn, dtype, draw):
        lora, rows = self.lora(dtype, draw, 275, 16, [16, 20, 8])
        x, y, live = randn(275, 16), randn(275, 44), self.live(kernels, lora, rows)
        expected = y.float() + lora.expanded(lora.shrunk(x, rows))
        self.expand(kernels, lora, y[256:], self.shrink(kernels, lora, x[256:], rows[256:], live[4:]), live[4:])
        assert_near(y[256:], expected[256:], steps=4)

    @pytest.mark.parametrize(
        ("dtype", "n", "widths"),
        [(FULL, 1, [50]), (HALF, 35, [40, 6, 17]), (FULL, 70, [33, 80]), (FULL, 300, [64, 16, 90]), (HALF, 300, [16])],
    )
    def test_lora_expand(self, kernels, randn, dtype, draw, n, widths):
        lora, rows = self.lora(dtype, draw, n, 16, widths)
        x, y = randn(n, 16), randn(n, sum(widths))
        live = self.live(kernels, lora, rows)
        u = self.shrink(kernels, lora, x, rows, live)
        expected = y.float() + lora.expanded(self.by_tile(lora, u, live))
        self.expand(kernels, lora, y, u, live)
        assert_near(y, expected, steps=4)

    def late(self, kernels, lora, x, rows):
        """For a kernel that expands what it reads; and what that adds."""
        live = self.live(kernels, lora, rows)
        u = self.shrink(kernels, lora, x, rows, live)
        expand = kernels.Expand(u, lora.tiles, lora.starts, lora.arena, lora.layer, lora.layers, live)
        return expand, lora.expanded(self.by_tile(lora, u, live))

    @pytest.mark.parametrize(("dtype", "n"), [(FULL, 1), (HALF, 35), (FULL, 70), (FULL, 300)])
    def test_lora_in_silu_mul(self, kernels, randn, dtype, draw, n):
        width = 40
        lora, rows = self.lora(dtype, draw, n, 16, [width, width])
        expand, added = self.late(kernels, lora, randn(n, 16), rows)
        gate_up = randn(n, 2 * width)
        got = kernels.silu_mul(gate_up, expand)
        gate, up = (gate_up.float() + added).chunk(2, dim=-1)
        assert_near(got, F.silu(gate) * up, steps=4)

    @pytest.mark.parametrize(("dtype", "n", "dim"), [(FULL, 1, 16), (HALF, 35, 80), (FULL, 70, 16), (FULL, 300, 20)])
    def test_lora_in_rotate_and_store(self, kernels, randn, dtype, draw, n, dim):
        heads, kv_heads = 2, 1
        lora, rows = self.lora(dtype, draw, n, 16, [heads * dim, dim, dim])
        cache = Cache([n] * 3, kv_heads, dim, dtype, draw)
        expand, added = self.late(kernels, lora, randn(n, 16), rows)
        positions = torch.arange(n, device=DEVICE).int()
        positions[rows == 3] = 0
        qkv = randn(n, heads + 2 * kv_heads, dim)
        cos, sin = (randn(n, dim // 2).repeat(1, 2) for _ in range(2))
        keys, values = cache.keys.clone(), cache.values.clone()
        q = kernels.rotate_and_store(qkv, cos, sin, rows, positions, cache.table, keys, values, heads, expand)
        changed = qkv.float() + added.view(qkv.shape)
        self.check_rotated(q, keys, values, changed, cos, sin, rows, positions, cache, heads, steps=8)

    @pytest.mark.parametrize(
        ("dtype", "n", "number"), [(FULL, 35, torch.inf), (HALF, 35, -torch.inf), (FULL, 300, torch.nan)]
    )
    def test_what_is_not_finite_in_an_adapter_stays_with_its_rows(self, kernels, randn, dtype, draw, n, number):
        lora, rows = self.lora(dtype, draw, n, 16, [16, 20, 8])
        x, y = randn(n, 16), randn(n, 44)
        lora.spoil(1, number)
        live = self.live(kernels, lora, rows)
        u = self.shrink(kernels, lora, x, rows, live)
        expected = y.float() + lora.expanded(lora.shrunk(x, rows))
        self.expand(kernels, lora, y, u, live)
        concerned = rows == 1
        assert concerned.any() and not y[concerned, 17].isfinite().any()
        assert_near(y[~concerned], expected[~concerned], steps=4)

    @pytest.mark.parametrize(("dtype", "n", "inputs"), [(FULL, 20, 600), (HALF, 300, 16)])
    def test_what_is_not_finite_in_a_token_stays_with_it(self, kernels, randn, dtype, draw, monkeypatch, n, inputs):
        monkeypatch.setattr("lorauter.engine.cuda_lora._SHRINK_WHOLE", 64)
        lora, rows = self.lora(dtype, draw, n, inputs, [16, 20, 8])
        x, y = randn(n, lora.inputs), randn(n, 44)
        spoiled = [int((rows == row).nonzero()[0]) for row in range(4)]
        x[spoiled, 5] = torch.inf
        live = self.live(kernels, lora, rows)
        u = self.shrink(kernels, lora, x, rows, live)
        expected = y.float() + lora.expanded(lora.shrunk(x, rows))
        before = y.clone()
        self.expand(kernels, lora, y, u, live)
        others = torch.ones(n, dtype=torch.bool)
        others[spoiled[:3]] = False
        assert_near(y[others], expected[others], steps=4)
        assert torch.equal(y[spoiled[3]], before[spoiled[3]])  # no adapter, no change
        assert not y[spoiled[:3]].isfinite().all(1).any()

    def test_no_tiles_in_use(self, kernels, randn, dtype, draw):
        lora, rows = self.lora(dtype, draw, 9, 16, [16, 20, 8])
        lora.starts.zero_()
        y = randn(9, 44)
        expected = y.clone()
        self.expand(kernels, lora, y, self.shrink(kernels, lora, randn(9, 16), rows, None), None)
        assert torch.equal(y, expected)

    def test_the_same_again(self, kernels, randn, dtype, draw, monkeypatch):
        monkeypatch.setattr("lorauter.engine.cuda_lora._SHRINK_WHOLE", 64)
        lora, rows = self.lora(dtype, draw, 9, 600, [16, 20, 8])
        x = randn(9, 600)
        first, second = (self.shrink(kernels, lora, x, rows, None)[:, : lora.used * 16] for _ in range(2))
        assert torch.equal(first, second)

    def test_take_tokens(self, kernels, draw):
        n = 150
        tokens = torch.randint(-1, 5, (n,), generator=draw).int().to(DEVICE)
        rows, last = (
            torch.randint(0, 9, (n,), generator=draw).int().to(DEVICE),
            ints(*range(100, 109)),
        )
        expected = torch.where(tokens < 0, last[rows.long()], tokens)
        assert torch.equal(kernels.take_tokens(tokens, rows, last), expected)

    @pytest.mark.parametrize("kind", [torch.int32, torch.float32])
    def test_write_pairs(self, kernels, draw, kind):
        flat = torch.arange(400, device=DEVICE).to(kind)
        where = torch.randperm(400, generator=draw)[:150].int().to(DEVICE)
        values = torch.randint(-9, 0, (150,), generator=draw).to(DEVICE, kind)
        where[::3] = -1
        expected = flat.clone()
        expected[where[where >= 0].long()] = values[where >= 0]
        kernels.write_pairs(flat, where, values)
        assert torch.equal(flat, expected)

    @pytest.mark.parametrize(("dtype", "vocabulary"), [(FULL, 7), (HALF, 4096), (FULL, 9000)])
    def test_greedy(self, kernels, randn, vocabulary):
        logits = randn(8, vocabulary).clamp(-3, 3)
        logits[0, [2, 5, -1]] = 9
        logits[1, -1] = 9
        logits[2] = -4
        logits[3, 6], logits[4, 0], logits[5, -1] = torch.nan, torch.inf, -torch.inf
        rows, last = ints(8, 7, 6, 5, 4, 3, 2, 1), torch.full((9,), 77, dtype=torch.int32, device=DEVICE)
        chosen = kernels.greedy(logits, rows, last)
        expected = logits.float().argmax(-1).int()
        expected[3:6] = -1
        assert chosen.tolist()[:3] == [2, vocabulary - 1, 0]
        assert chosen.dtype == torch.int32 and torch.equal(chosen, expected)
        assert last.tolist() == [77, *chosen.clamp(min=0).tolist()[::-1]]

    @pytest.mark.parametrize(("dtype", "vocabulary"), [(FULL, 7), (HALF, 4096), (FULL, 9000)])
    def test_greedy_held(self, kernels, randn, draw, vocabulary):
        logits = randn(9, vocabulary)
        logits[3, 0] = torch.nan  # also where it may not come
        words = -(-vocabulary // 32)
        rows = [8, 3, 0, 5, 6]
        masks = torch.randint(-(2**31), 2**31, (len(rows), words), generator=draw).int()
        masks[2] = 0
        masks[2, -1] = torch.tensor(1 << ((vocabulary - 1) % 32)).int()
        masks[3] = 0
        masks[1, 0] &= ~1
        held = torch.cat((torch.tensor(rows)[:, None].int(), masks), dim=1).to(DEVICE)
        last = torch.full((9,), 77, dtype=torch.int32, device=DEVICE)
        chosen = kernels.greedy_held(logits, held, last)
        may = torch.stack([(masks[:, i // 32] >> (i % 32)) & 1 for i in range(vocabulary)], dim=1).bool().to(DEVICE)
        expected = logits[rows].float().masked_fill(~may, -torch.inf).argmax(-1).int()
        assert expected[2] == vocabulary - 1
        expected[1] = -1
        assert chosen.tolist() == [*expected.tolist()[:3], 0, expected[4]]
        assert [last[row] for row in rows] == chosen.clamp(min=0).tolist()
        assert [last[row] for row in (1, 2, 4, 7)] == [77] * 4

    @pytest.mark.parametrize("vocabulary", [7, 9000])
    def test_keep_rows(self, kernels, randn, vocabulary):
        source, to = randn(4, vocabulary), randn(6, vocabulary)
        expected = to.clone()
        expected[[5, 0]] = source[[1, 3]]
        kernels.keep_rows(source, to, ints([1, 5], [3, 0]))
        assert torch.equal(to, expected)


if DEVICE == "cuda":

    class TestOnGpu(Cases):
        pass

else:

    def test_in_the_interpreter():
        ran = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "--noconftest",
                "-W",
                "ignore::RuntimeWarning",
                "-o",
                "python_classes=Cases",
                f"{__file__}::Cases",
            ],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout[-10_000:] + ran.stderr[-2000:]
