"""LoRA token by token against plain PyTorch at odd shapes: on a GPU, or in Triton's interpreter."""

import struct

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from kernel_cases import DEVICE, FULL, HALF, KernelCases, assert_near, ints, pass_in_the_interpreter

LIMIT_S = 600  # the interpreter's


class Group:
    """A group's columns of rows 0 to 3, in an arena that is NaN elsewhere; row 2 has none, and 3 mixes two adapters.

    Args:
        ranks: of each adapter, its rank in each target; 0 where it lacks it.
    """

    layers, layer = 3, 1
    mixtures = ([(0, 0.5)], [(1, -2.0)], [], [(0, 1.5), (1, 0.25)])

    def __init__(self, kernels, ranks, inputs, widths, dtype, draw, n):
        self.widths, self.pairs = widths, {}
        pieces, offset, places = [], 0, {}
        for adapter, own in enumerate(ranks):
            for target, (rank, width) in enumerate(zip(own, widths, strict=True)):
                for which, wide in enumerate((inputs, width)):
                    matrix = (torch.randn(rank, self.layers, wide, generator=draw) / wide**0.5).to(dtype)
                    places[adapter, target, which] = offset
                    gap = -matrix.numel() % 8 + 8  # what is wide is read by eights
                    pieces += [matrix.flatten(), torch.full((gap,), torch.nan, dtype=dtype)]
                    offset += matrix.numel() + gap
                    self.pairs[adapter, target, which] = matrix[:, self.layer].float().to(DEVICE)
        self.arena = torch.cat(pieces).to(DEVICE)
        lists = torch.full((5, kernels.own_width), 7, dtype=torch.long)
        for row, mixture in enumerate((*self.mixtures, [])):
            entries, ends = [], [0]
            for target, width in enumerate(widths):
                for adapter, weight in mixture:
                    for first in range(0, ranks[adapter][target], 8):
                        a, b = (
                            places[adapter, target, which] + first * self.layers * wide
                            for which, wide in enumerate((inputs, width))
                        )
                        [bits] = struct.unpack("i", struct.pack("f", weight))
                        entries += [a, b, (bits << 32) | min(8, ranks[adapter][target] - first)]
                ends.append(len(entries) // 3)
            lists[row, : len(ends)] = torch.tensor(ends)
            lists[row, 4 : 4 + len(entries)] = torch.tensor(entries, dtype=torch.long)
        self.rows = ints(*torch.randint(0, 5, (n,), generator=draw).tolist())  # row 4 is for padding
        self.own = kernels.Own(self.rows, lists.to(DEVICE), self.arena, self.layer, self.layers, len(widths))

    def change(self, x, dtype):
        """What is added to the products of x."""
        added = torch.zeros(len(x), sum(self.widths), device=DEVICE)
        for token, row in enumerate(self.rows.tolist()):
            for adapter, weight in self.mixtures[row] if row < 4 else []:
                offset = 0
                for target, width in enumerate(self.widths):
                    a, b = self.pairs[adapter, target, 0], self.pairs[adapter, target, 1]
                    narrow = (weight * (a * x[token].float()).sum(-1)).to(dtype).float()
                    added[token, offset : offset + width] += (narrow[:, None] * b).sum(0)
                    offset += width
        return added


class Cases(KernelCases):
    RANKS = ([3, 0, 8], [17, 9, 0])

    @pytest.fixture
    def kernels(self):
        from lorauter.engine import cuda_kernels, cuda_own

        cuda_kernels.own_width = cuda_own.OWN_WIDTH
        return cuda_kernels

    def group(self, kernels, dtype, draw, inputs, widths, n=7):
        return Group(kernels, [rank[: len(widths)] for rank in self.RANKS], inputs, widths, dtype, draw, n)

    @pytest.mark.parametrize(("dtype", "hidden", "inputs"), [(FULL, 6, 11), (HALF, 576, 40), (FULL, 130, 1100)])
    def test_a_norm_adds_what_is_late(self, kernels, randn, draw, dtype, hidden, inputs):
        late = self.group(kernels, dtype, draw, inputs, [hidden])
        x, delta, weight, before = randn(7, hidden), randn(7, hidden), randn(hidden), randn(7, inputs)
        total, normed, u = kernels.own_norm(x, delta, weight, 1e-5, (before, late.own), None)
        expected = x.float() + delta.float() + late.change(before, dtype)
        assert u is None
        assert_near(total, expected)
        assert_near(normed, F.rms_norm(total.float(), (hidden,), weight.float(), 1e-5))

    @pytest.mark.parametrize(("dtype", "hidden"), [(FULL, 6), (HALF, 576)])
    def test_what_a_norm_shrinks_is_expanded_beside_an_activation(self, kernels, randn, draw, dtype, hidden):
        group = self.group(kernels, dtype, draw, hidden, [50, 50])
        x, weight, gate_up = randn(7, hidden), randn(hidden), randn(7, 100)
        total, normed, u = kernels.own_norm(x, None, weight, 1e-5, None, group.own)
        assert total is x
        assert_near(normed, F.rms_norm(x.float(), (hidden,), weight.float(), 1e-5))
        gate, up = (gate_up.float() + group.change(normed, dtype)).chunk(2, dim=-1)
        assert_near(kernels.silu_mul(gate_up, kernels.OwnExpand(u, group.own)), F.silu(gate) * up)

    @pytest.mark.parametrize(("dtype", "late", "reads"), [(FULL, 70, 30), (HALF, 30, 200)])
    def test_a_norm_adds_and_shrinks(self, kernels, randn, draw, dtype, late, reads):
        before, after = self.group(kernels, dtype, draw, late, [30]), self.group(kernels, dtype, draw, 30, [reads])
        shift, lists = before.arena.numel(), after.own.own.clone()
        lists[:, 4::3] += shift
        lists[:, 5::3] += shift
        arena = torch.cat([before.arena, after.arena])
        adds = kernels.Own(after.rows, before.own.own, arena, 1, 3, 1)
        before.rows = after.rows
        shrinks = kernels.Own(after.rows, lists, arena, 1, 3, 1)
        x, delta, weight, inputs, y = randn(7, 30), randn(7, 30), randn(30), randn(7, late), randn(7, 2 * reads)
        total, normed, u = kernels.own_norm(x, delta, weight, 1e-5, (inputs, adds), shrinks)
        assert_near(total, x.float() + delta.float() + before.change(inputs, dtype))
        changed = y[:, :reads].float() + after.change(normed, dtype)
        up = torch.cat([y[:, :reads], torch.ones_like(y[:, reads:])], 1)
        shrinks.own[:, 2] = shrinks.own[:, 1]  # none for what lies beside it
        assert_near(kernels.silu_mul(up, kernels.OwnExpand(u, shrinks)), F.silu(changed))

    @pytest.mark.parametrize(("dtype", "inputs", "width"), [(FULL, 9, 7), (HALF, 70, 33)])
    def test_add(self, kernels, randn, draw, dtype, inputs, width):
        group = self.group(kernels, dtype, draw, inputs, [width])
        x, y = randn(7, inputs), randn(7, width)
        expected = y.float() + group.change(x, dtype)
        kernels.own_add(y, x, group.own)
        assert_near(y, expected)

    def test_what_is_not_finite_stays_in_its_rows(self, kernels, randn, draw, dtype):
        group = self.group(kernels, dtype, draw, 9, [7])
        x, y = randn(7, 9), randn(7, 7)
        x[0] = torch.inf
        group.rows[:2] = ints(2, 0)
        expected = y.clone()
        expected += group.change(x, dtype)
        kernels.own_add(y, x, group.own)
        assert_near(y, expected)
        assert y[0].isfinite().all()


def test_in_the_interpreter():
    pass_in_the_interpreter(__file__)
