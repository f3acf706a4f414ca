"""The GPU's LoRA kernels against plain PyTorch at odd shapes: on a GPU, or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from kernel_cases import DEVICE, FULL, HALF, Cache, KernelCases, assert_near, ints, pass_in_the_interpreter

LIMIT_S = 600  # the interpreter's


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


class Cases(KernelCases):
    RANKS = ([1, 0, 7], [16, 17, 0], [40, 3, 5])

    def lora(self, dtype, draw, n, inputs, widths, **options):
        """Adapters 0 to 2; rows 0 to 3 of which the last has none, as padding, and 0 mixes two."""
        weights = [[0.5, 0.0, 1.5], [0.0, 1.0, 0.0], [0.0, 0.0, -2.0], [0.0, 0.0, 0.0]]
        ranks = [rank[: len(widths)] for rank in self.RANKS]
        lora = Lora(ranks, inputs, widths, weights, dtype, draw, **options)
        # Row after row, as in prompts, and mixed, as decoding rows are.
        rows = torch.arange(n) * 4 // n if n > 70 else torch.randint(0, 4, (n,), generator=draw)
        return lora, rows.int().to(DEVICE)

    @pytest.fixture
    def split(self, monkeypatch):
        """Sums of more than 64 inputs are cut; in the interpreter by a quarter of the programs: it computes all of them
        one after the other, also those that have nothing to do.
        """
        monkeypatch.setattr("lorauter.engine.cuda_lora._SHRINK_WHOLE", 64)
        if DEVICE == "cpu":  # what a compiled kernel has read may not change
            from triton.language import constexpr

            monkeypatch.setattr("lorauter.engine.cuda_lora._SHRINK_PROGRAMS", constexpr(60))

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
    def test_lora_shrink(self, kernels, randn, dtype, draw, split, n, inputs, listed):
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
    def test_what_is_not_finite_in_a_token_stays_with_it(self, kernels, randn, dtype, draw, split, n, inputs):
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

    def test_the_same_again(self, kernels, randn, dtype, draw, split):
        lora, rows = self.lora(dtype, draw, 9, 600, [16, 20, 8])
        x = randn(9, 600)
        first, second = (self.shrink(kernels, lora, x, rows, None)[:, : lora.used * 16] for _ in range(2))
        assert torch.equal(first, second)


if DEVICE == "cuda":

    class TestOnGpu(Cases):
        pass

else:

    def test_in_the_interpreter():
        pass_in_the_interpreter(__file__)
