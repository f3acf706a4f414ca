"""The CPU's kernels against plain PyTorch, at sizes that are no multiples of a vector's."""

import logging
import subprocess

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lorauter.engine import cpu_kernels
from lorauter.engine.blocks import BLOCK
from lorauter.engine.cpu_kernels import RowMixtures, TargetMixtures, load_kernels

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [6, 16, 50, 576]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def kernels(dtype):
    found = load_kernels(dtype)
    assert found is not None, "no C++ compiler: tests need one"
    return found


@pytest.fixture
def randn(dtype):
    draw = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=draw).to(dtype)


def assert_near(got, expected, *, steps=1):
    """As near as `steps` roundings to the dtype leave it."""
    tolerance = steps * (2**-8 if got.dtype == torch.bfloat16 else 2e-6)
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("width", WIDTHS)
def test_add_norm(kernels, randn, width):
    x, delta, weight = randn(5, width), randn(5, width), randn(width)
    for more in (None, delta):
        total, normed = kernels.add_norm(x, more, weight, 1e-5)
        expected = x if more is None else x + delta
        assert torch.equal(total, expected)
        assert_near(normed, F.rms_norm(expected.float(), (width,), weight.float(), 1e-5))


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(kernels, randn, width):
    gate_up = randn(3, 2 * width) * 10
    gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = -500, 500, torch.nan
    gate, up = gate_up.float().chunk(2, dim=-1)
    got = kernels.silu_mul(gate_up)
    assert_near(got[:2], (F.silu(gate) * up)[:2])
    assert got[2].isnan().tolist() == [True] + [False] * (width - 1)


# --- the paged cache


def paged(kv_heads, dim, dtype, lengths):
    """Keys and values that are NaN everywhere, and a table of the rows' blocks in no order; the last row is padding."""
    draw = torch.Generator().manual_seed(0)
    counts = [-(-length // BLOCK) for length in lengths]
    table = torch.zeros(len(lengths) + 1, max(counts) + 3, dtype=torch.int32)
    order = 1 + torch.randperm(sum(counts) + 5, generator=draw).int()
    for row, places in enumerate(order[: sum(counts)].split(counts)):
        table[row, : len(places)] = places
    keys, values = torch.full((2, len(order) + 1, kv_heads, BLOCK, dim), torch.nan, dtype=dtype)
    return keys, values, table


def positions_of(cache, table, row, span):
    """What is cached of a row's positions: (kv_heads, positions, dim)."""
    at = torch.arange(span.start, span.stop)
    return cache[table[row, at // BLOCK].long(), :, at % BLOCK].transpose(0, 1)


def fill(cache, table, row, content):
    """Write a row's first positions: content (positions, kv_heads, dim)."""
    at = torch.arange(len(content))
    cache[table[row, at // BLOCK].long(), :, at % BLOCK] = content


@pytest.mark.parametrize("dim", [4, 20, 64])
def test_rotate_and_store(kernels, randn, dtype, dim):
    heads, kv_heads = 6, 2
    keys, values, table = paged(kv_heads, dim, dtype, [40, 17, 33])
    padding = len(table) - 1
    qkv, cos, sin = randn(8, heads + 2 * kv_heads, dim), randn(40, dim), randn(40, dim)
    rows = torch.tensor([1, 0, 2, 2, 2, 2, padding, padding], dtype=torch.int32)
    positions = torch.tensor([16, 39, 14, 15, 16, 17, 0, 0], dtype=torch.int32)
    before = keys.clone()
    q = kernels.rotate_and_store(qkv, cos, sin, rows, positions, table, keys, values, heads)
    first, second = qkv.float().chunk(2, dim=-1)
    at = positions[:, None].long()
    rotated = qkv.float() * cos[at].float() + torch.cat((-second, first), dim=-1) * sin[at].float()
    assert_near(q, rotated[:, :heads], steps=2)
    for token, (row, position) in enumerate(zip(rows[:6].tolist(), positions.tolist(), strict=False)):
        place = slice(position, position + 1)
        assert_near(positions_of(keys, table, row, place)[:, 0], rotated[token, heads:-kv_heads], steps=2)
        assert torch.equal(positions_of(values, table, row, place)[:, 0], qkv[token, -kv_heads:])
    changed = (keys.isnan() != before.isnan()).any(dim=-1).all(dim=1)  # (blocks, BLOCK)
    assert changed[1:].sum() == 6
    assert changed[0].tolist() == [True] + [False] * 15


SHAPES = [(9, 3, 64), (5, 5, 20), (7, 1, 6), (12, 2, 33), (4, 1, 128)]
LENGTHS = [1, 15, 16, 17, 40, 256, 257, 300, 530]


def fill_seen(cache, table, row, randn, begin, end):
    """Random numbers at the positions from `begin` to `end` of a row; NaN stays at all others."""
    content = randn(end, *cache.shape[1::2])
    content[:begin] = torch.nan
    fill(cache, table, row, content)


def attended(q, keys, values, table, row, start, window):
    """Causal attention of q (n, heads, dim), at successive positions of a row."""
    begin, end = max(0, start + 1 - window) if window else 0, start + len(q)
    k, v = (positions_of(cache, table, row, range(begin, end)).float() for cache in (keys, values))
    at, position = torch.arange(begin, end), torch.arange(start, end)[:, None]
    mask = at <= position if window is None else (at <= position) & (at > position - window)
    q = q.float().transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 270])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_decode_attention(kernels, randn, dtype, heads, kv_heads, dim, window):
    keys, values, table = paged(kv_heads, dim, dtype, LENGTHS)
    for row, length in enumerate(LENGTHS):
        for cache in (keys, values):
            fill_seen(cache, table, row, randn, max(0, length - window) if window else 0, length)
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1))
    rows, positions = order.int(), torch.tensor(LENGTHS)[order].int() - 1
    q = randn(len(rows), heads, dim)
    y = torch.full_like(q, torch.nan)
    kernels.decode_attention(q[:-1], keys, values, table, rows, positions, window, y)
    assert y[-1].isnan().all()
    for token, (row, position) in enumerate(zip(rows[:-1].tolist(), positions.tolist(), strict=False)):
        one = q[token:][:1]
        assert_near(y[token], attended(one, keys, values, table, row, position, window)[0], steps=2)
        alone = torch.empty_like(one)  # the same numbers whoever else is there
        kernels.decode_attention(one, keys, values, table, rows[token:], positions[token:], window, alone)
        assert torch.equal(alone[0], y[token])


@pytest.mark.parametrize("window", [None, 7, 270])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 37), (3, 30), (250, 12), (500, 70)])
def test_prefill_attention(kernels, randn, dtype, heads, kv_heads, dim, window, start, count):
    row, end = 1, start + count
    keys, values, table = paged(kv_heads, dim, dtype, [20, end, 40])
    for cache in (keys, values):
        fill_seen(cache, table, row, randn, max(0, start + 1 - window) if window else 0, end)
    q = randn(count, heads, dim)
    y = torch.full_like(q, torch.nan)
    kernels.prefill_attention(q, keys, values, table, row, start, window, y)
    assert_near(y, attended(q, keys, values, table, row, start, window), steps=2)
    half = torch.empty_like(q[count // 2 :])  # the same numbers in whatever pieces
    kernels.prefill_attention(q[count // 2 :], keys, values, table, row, start + count // 2, window, half)
    assert torch.equal(half, y[count // 2 :])


def test_attention_lets_nan_through_and_only_to_those_who_see_it(kernels, randn, dtype):
    keys, values, table = paged(2, 16, dtype, [20, 20])
    for cache in (keys, values):
        for row in range(2):
            fill(cache, table, row, randn(20, 2, 16))
    keys[table[0, 0], 1, 3], values[table[0, 1], 0, 1, 5] = torch.nan, torch.inf
    q = randn(20, 4, 16)
    y = torch.empty_like(q)
    rows, positions = torch.tensor([0, 1, 0]).int(), torch.tensor([19, 19, 2]).int()
    kernels.decode_attention(q[:3], keys, values, table, rows, positions, None, y)
    assert y[:3].isnan().all(dim=-1).tolist() == [[False, False, True, True], [False] * 4, [False] * 4]
    assert (~y[:3].isfinite()).any(dim=-1).tolist() == [[True] * 4, [False] * 4, [False] * 4]
    kernels.prefill_attention(q, keys, values, table, 0, 0, None, y)
    broken = (~y.isfinite()).any(dim=-1)
    assert broken.nonzero().tolist() == [[t, h] for t in range(20) for h in range(4) if t >= (17 if h < 2 else 3)]


# --- mixtures

RANKS = {"a": 1, "b": 13, "c": 40, "base": 0}
ROWS: list[dict[str, float]] = [{"a": 0.5, "b": -2.0}, {}, {"c": 1.0}, {"b": 0.25, "c": 0.5, "a": 1.0}, {}]


def arena_of(randn, adapters, layers, width, outs):
    """An arena with some adapters' A (rank, layers, in) and B (rank, layers, out) for each target, and where."""
    parts, offset, places = [], 5, {}
    parts.append(torch.full((offset,), torch.nan))
    for name, rank in adapters.items():
        for target, out in enumerate(outs):
            sizes = []
            for size in (width, out):
                sizes.append(offset)
                parts.append(randn(rank, layers, size).flatten() / (size**0.5))
                offset += rank * layers * size
            places[name, target] = (rank, *sizes)
    return torch.cat([part.to(parts[1].dtype) for part in parts]), places


def mixtures_of(arena, places, rows, layers, width, outs, lacking=()):
    targets = []
    for target, out in enumerate(outs):
        starts, a, b, weights = [0], [], [], []
        for row in rows:
            for name, weight in row.items():
                rank, a_offset, b_offset = places[name, target]
                if weight and (name, target) not in lacking:
                    a += [a_offset + c * layers * width for c in range(rank)]
                    b += [b_offset + c * layers * out for c in range(rank)]
                    weights += [weight] * rank
            starts.append(len(a))
        targets.append(
            TargetMixtures(
                out, torch.tensor(starts).int(), torch.tensor(a, dtype=torch.int64),
                torch.tensor(b, dtype=torch.int64), torch.tensor(weights, dtype=torch.float32),
            )
        )  # fmt: skip
    return RowMixtures(arena, targets)


@pytest.mark.parametrize(
    "tokens", [[0], [2], [4, 1], [3, 0, 2, 1, 4], [0] * 9, [0, 3, *[2] * 7, 1, 1, 1, 1, *[3] * 4, 4, 4]]
)
@pytest.mark.parametrize(("width", "out"), [(6, 10), (50, 70), (576, 192)])
def test_lora_add(kernels, randn, tokens, width, out):
    layers, outs, lacking = 2, [out, 3, 2 * out], [("b", 0), ("a", 2), ("b", 1), ("a", 1), ("c", 1)]
    arena, places = arena_of(randn, RANKS, layers, width, outs)
    mixtures = mixtures_of(arena, places, ROWS, layers, width, outs, lacking)
    x, y = randn(len(tokens), width), randn(len(tokens), sum(outs))
    expected, before = y.double(), y.clone()
    for layer in range(layers):
        for t, row in enumerate(tokens):
            for name, weight in ROWS[row].items():
                for target, into in enumerate(expected[t].split(outs)):
                    rank, *offsets = places[name, target]
                    a, b = (
                        arena[offset:][: rank * layers * size].view(rank, layers, size)[:, layer].double()
                        for offset, size in zip(offsets, (width, outs[target]), strict=True)
                    )
                    if (name, target) not in lacking:
                        into += weight * (a @ x[t].double()) @ b
        kernels.lora_add(layer, x, y, torch.tensor(tokens).int(), mixtures)
    assert_near(y, expected, steps=6)
    base = torch.tensor([not ROWS[row] for row in tokens])
    assert torch.equal(y[base], before[base])


def test_adapters_that_a_row_does_not_use_are_not_read(kernels, randn):
    arena, places = arena_of(randn, {"fine": 3, "infinite": 3}, 1, 8, [8])
    _, a, b = places["infinite", 0]
    arena[a : a + 24], arena[b : b + 24] = torch.inf, torch.nan
    rows = [{"fine": 1.0, "infinite": 0.0}, {"infinite": 1.0, "fine": 1.0}]
    mixtures = mixtures_of(arena, places, [*rows, {}], 1, 8, [8])
    for tokens in ([0, 1], [0] * 5 + [1] * 5):
        y, of = randn(len(tokens), 8), torch.tensor(tokens)
        kernels.lora_add(0, randn(len(tokens), 8), y, of.int(), mixtures)
        assert y[of == 0].isfinite().all()
        assert not y[of == 1].isfinite().any()


def test_a_token_gets_the_same_in_any_company(kernels, randn):
    arena, places = arena_of(randn, RANKS, 1, 50, [70, 200])
    mixtures = mixtures_of(arena, places, ROWS, 1, 50, [70, 200])
    rows = torch.tensor([0, 3, *[2] * 7, 1, *[3] * 4, 4, 4]).int()
    x, y = randn(len(rows), 50), randn(len(rows), 270)
    alone = y.clone()
    kernels.lora_add(0, x, y, rows, mixtures)
    for token in range(len(rows)):
        kernels.lora_add(0, x[token:][:1], alone[token:][:1], rows[token:][:1], mixtures)
    assert torch.equal(alone, y)


# --- the rest


@pytest.mark.parametrize("width", [1, 15, 16, 50, 8192, 8193, 30000])
def test_greedy(kernels, randn, width):
    logits = randn(7, width) - 5
    logits[1] = -1.5  # the first of several
    for row, number in ((2, torch.nan), (3, torch.inf), (4, -torch.inf)):
        logits[row, width * 2 // 3] = number
    expected = logits.argmax(dim=-1)
    expected[1], expected[2:5] = 0, -1
    assert (logits.gather(1, expected.clamp(min=0)[:, None])[:2, 0] == logits[:2].max(dim=-1).values).all()
    got = kernels.greedy(logits)
    best = logits.gather(1, got.clamp(min=0)[:, None])[:, 0]
    assert got[1:5].tolist() == [0, -1, -1, -1]
    finite = torch.tensor([0, 1, 5, 6])
    assert torch.equal(best[finite], logits[finite].max(dim=-1).values)
    assert all(not (logits[row, : got[row]] == best[row]).any() for row in finite.tolist())


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 7, 8, 19])
@pytest.mark.parametrize(("width", "out"), [(2, 1), (6, 15), (50, 64), (576, 100)])
@pytest.mark.parametrize("whole", [True, False])  # whether bfloat16 holds the weights as they are
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear(tokens, width, out, dtype, whole):
    kernels = load_kernels(dtype)
    if not kernels.takes_linear(width):
        pytest.skip("this machine's products are PyTorch's")
    draw = torch.Generator().manual_seed(out)
    x, weight, bias = (
        torch.randn(*shape, generator=draw).to(dtype) for shape in [(tokens, width), (out, width), (out,)]
    )
    if whole:
        weight = weight.bfloat16().to(dtype)
    packed = kernels.pack_linear(weight)
    assert (packed.dtype == torch.bfloat16) == (whole or dtype == torch.bfloat16)
    tolerance = {"atol": width**0.5 / 128, "rtol": 1 / 128} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-5}
    for more in (None, bias):
        expected = F.linear(x.float(), weight.float(), None if more is None else more.float())
        got = kernels.linear(x, packed, more, out)
        torch.testing.assert_close(got.float(), expected, **tolerance)
        assert torch.equal(kernels.linear(x[-1:].clone(), packed, more, out), got[-1:]), "the same in whatever company"
    assert dtype == torch.float32 or not kernels.takes_linear(7)


def test_linear_of_a_long_prompt():
    kernels = load_kernels(torch.float32)
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in [(200, 50), (100, 50), (100,)])
    for given in (weight, weight.bfloat16().float()):
        got = kernels.linear(x, kernels.pack_linear(given), bias, 100)
        torch.testing.assert_close(got, F.linear(x, given, bias), atol=1e-4, rtol=1e-5)


# --- building them


def test_other_dtypes_have_none():
    assert load_kernels(torch.float16) is None


def test_they_are_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAUTER_HOME", str(tmp_path))
    built = cpu_kernels._build()
    stamp = built.stat().st_mtime_ns
    assert cpu_kernels._build() == built
    assert built.stat().st_mtime_ns == stamp
    assert [path.name for path in built.parent.iterdir()] == [built.name]


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "fails"])
def test_without_a_compiler_a_warning_says_so(monkeypatch, tmp_path, caplog, compiler):
    monkeypatch.setenv("LORAUTER_HOME", str(tmp_path / "home"))
    if compiler == "fails":
        script = tmp_path / "c++"
        script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no headers here" >&2\nexit 1\n')
        script.chmod(0o755)
        compiler = str(script)
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        assert load_kernels.__wrapped__(torch.float32) is None
    assert "CXX" in caplog.text
    assert ("no headers here" if "no/such" not in compiler else "no/such/compiler") in caplog.text
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        cpu_kernels._build()
    assert not list(tmp_path.rglob("*.so"))


def test_a_folder_that_cannot_be_written_to_is_named_where_kernels_are_not_built(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAUTER_HOME", str(tmp_path / "file"))
    assert cpu_kernels.load_kernels.__wrapped__(torch.float32) is None
    [record] = caplog.records
    assert f"see that {tmp_path / 'file'} can be written to" in record.getMessage()
