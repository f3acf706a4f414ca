"""The GPU's kernels of plain steps against plain PyTorch at odd shapes: on a GPU, or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from kernel_cases import DEVICE, FULL, HALF, Cache, KernelCases, assert_near, ints, pass_in_the_interpreter

from lorauter.engine.board import MaskBoard, Seat

LIMIT_S = 600  # the interpreter's


class Cases(KernelCases):
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

    def test_take_tokens(self, kernels, draw):
        n = 150
        tokens = torch.randint(-1, 5, (n,), generator=draw).int().to(DEVICE)
        rows, last = (
            torch.randint(0, 9, (n,), generator=draw).int().to(DEVICE),
            ints(*range(100, 109)),
        )
        expected = torch.where(tokens < 0, last[rows.long()], tokens)
        assert torch.equal(kernels.take_tokens(tokens, rows, last), expected)

    @pytest.mark.parametrize(("count", "counted"), [(150, False), (150, True), (0, True), (7, True)])
    def test_write_changes(self, kernels, draw, count, counted):
        flats = tuple(torch.arange(n, device=DEVICE, dtype=torch.int32) for n in (200, 50, 150))
        where = torch.randperm(400, generator=draw)[:150].int().to(DEVICE)
        values = torch.randint(-9, 0, (150,), generator=draw).int().to(DEVICE)
        expected = torch.cat(flats)
        expected[where[:count].long()] = values[:count]
        kernels.write_changes(flats, where, values, ints(count) if counted else None)
        assert torch.equal(torch.cat(flats), expected)

    @pytest.mark.parametrize(("dtype", "vocabulary"), [(FULL, 7), (HALF, 4096), (FULL, 9000)])
    def test_greedy(self, kernels, randn, vocabulary):
        logits = randn(8, vocabulary).clamp(-3, 3)
        logits[0, [2, 5, -1]] = 9
        logits[1, -1] = 9
        logits[2] = -4
        logits[3, 6], logits[4, 0], logits[5, -1] = torch.nan, torch.inf, -torch.inf
        rows, last = ints(8, 7, 6, 5, 4, 3, 2, 1), torch.full((9,), 77, dtype=torch.int32, device=DEVICE)
        board = MaskBoard(9, vocabulary, pin=DEVICE == "cuda").numbers
        posted = kernels.Posted(board, ints(*[-1] * 8), ints(*range(8)), ints(*range(8)))
        chosen = kernels.greedy(logits, rows, last, posted)
        expected = logits.float().argmax(-1).int()
        expected[3:6] = -1
        assert chosen[:3].tolist() == [2, vocabulary - 1, 0]
        assert chosen.dtype == torch.int32 and torch.equal(chosen, expected)
        assert last.tolist() == [77, *chosen.clamp(min=0).tolist()[::-1]]

    @pytest.mark.parametrize(("dtype", "vocabulary"), [(FULL, 7), (HALF, 4096), (FULL, 9000)])
    def test_greedy_among_what_may_come(self, kernels, randn, draw, vocabulary):
        """Where it is there for the token after the row's output, and only in rows that look there."""
        logits = randn(7, vocabulary)
        logits[1, 0] = torch.nan  # also where it may not come
        rows, outputs, positions = [8, 3, 0, 5, 6, 2, 7], [2, 1, 0, 5, 6, 4, 3], [7, 9, 11, 0, 4, 6, 2]
        board = MaskBoard(9, vocabulary, pin=DEVICE == "cuda")
        masks = torch.randint(-(2**31), 2**31, (7, -(-vocabulary // 32)), generator=draw).int()
        masks[2] = 0
        masks[2, -1] = torch.tensor(1 << ((vocabulary - 1) % 32)).int()
        masks[1, 0] &= ~1
        masks[:, 0] |= 2
        for i, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            index = positions[output] + 1
            seat = Seat(index + {3: 1, 4: -1}.get(i, 0))  # those of the next and of the last token are of no use
            seat.found = seat.index, masks[i].numpy()
            board.post([seat])
            board.give(row, seat)
        last = torch.full((9,), 77, dtype=torch.int32, device=DEVICE)
        posted = kernels.Posted(board.numbers, ints(*rows[:6], -1), ints(*outputs), ints(*positions))
        chosen = kernels.greedy(logits, ints(*rows), last, posted)
        may = torch.stack([(masks[:, i // 32] >> (i % 32)) & 1 for i in range(vocabulary)], dim=1).bool().to(DEVICE)
        may[[3, 4, 6]] = True
        expected = logits.float().masked_fill(~may, -torch.inf).argmax(-1).int()
        expected[1] = -1
        assert chosen.tolist() == expected.tolist()
        assert [last[row] for row in rows] == chosen.clamp(min=0).tolist()
        assert [last[row] for row in (1, 4)] == [77] * 2

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
        pass_in_the_interpreter(__file__)
