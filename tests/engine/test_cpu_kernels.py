"""The CPU's kernels against plain PyTorch, at sizes that are no multiples of a vector's."""

import itertools
import logging
import subprocess
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lorauter.engine import cpu_kernels
from lorauter.engine.cpu_kernels import load_kernels
from lorauter.engine.lora import GroupMixture

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


@pytest.mark.parametrize("dim", [4, 20, 64])
def test_rotate_and_store(kernels, randn, dim):
    heads, kv_heads = 6, 2
    qkv, cos, sin = randn(5, heads + 2 * kv_heads, dim), randn(9, dim), randn(9, dim)
    rows, positions = torch.tensor([0, 1, 2, 2, 2]), torch.tensor([8, 0, 3, 4, 5])
    keys, values = randn(3, kv_heads, 9, dim), randn(3, kv_heads, 9, dim)
    expected_keys, expected_values = keys.clone(), values.clone()
    q = kernels.rotate_and_store(qkv, cos, sin, rows, positions, keys, values, heads)
    first, second = qkv.float().chunk(2, dim=-1)
    at = positions[:, None]
    rotated = qkv.float() * cos[at].float() + torch.cat((-second, first), dim=-1) * sin[at].float()
    assert_near(q, rotated[:, :heads], steps=2)
    expected_keys[rows, :, positions] = rotated[:, heads:-kv_heads].to(keys.dtype)
    expected_values[rows, :, positions] = qkv[:, -kv_heads:]
    assert_near(keys, expected_keys, steps=2)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (5, 5, 20), (7, 1, 6), (12, 2, 33)])
def test_decode_attention(kernels, randn, heads, kv_heads, dim, window):
    q, keys, values = randn(4, heads, dim), randn(5, kv_heads, 40, dim), randn(5, kv_heads, 40, dim)
    positions = torch.tensor([0, 15, 16, 39])
    for row, position in enumerate(positions.tolist()):
        for tensor in (keys, values):  # what lies beyond a sequence is never read
            tensor[row, :, position + 1 :] = torch.nan
    y = torch.empty_like(q)
    kernels.decode_attention(q, keys, values, positions, window, y)
    for row, position in enumerate(positions.tolist()):
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        expected = F.scaled_dot_product_attention(
            q[row, :, None].float(), keys[row, :, seen].float(), values[row, :, seen].float(), enable_gqa=True
        )
        assert_near(y[row], expected[:, 0], steps=2)


def test_attention_lets_nan_through(kernels, randn):
    q, keys, values = randn(2, 4, 16), randn(2, 2, 20, 16), randn(2, 2, 20, 16)
    keys[0, 1, 3] = torch.nan
    y = torch.empty_like(q)
    kernels.decode_attention(q, keys, values, torch.tensor([19, 19]), None, y)
    assert y.isnan().all(dim=-1).tolist() == [[False, False, True, True], [False] * 4]


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize(("width", "out"), [(6, 10), (50, 70), (576, 192)])
@pytest.mark.parametrize("shared", [False, True])
def test_lora_add(kernels, randn, dtype, tokens, width, out, shared):
    group = mixture(randn, tokens, width, [out, 3, 2 * out], used=[13, 0, 21], shared=shared)
    x, y = randn(tokens + 2, width), randn(tokens + 2, 3 * out + 3)
    expected = y.float().clone()
    exact = replace(group, a=group.a.float(), bs=[b.float() for b in group.bs], mask=group.mask.float())
    for layer in range(2):
        exact.add(layer, x[1 : tokens + 1].float(), expected[1 : tokens + 1])
        kernels.lora_add(layer, x, y, slice(1, tokens + 1), group.sparse)
    assert_near(y, expected, steps=6)


def mixture(randn, tokens, width, outs, used, *, shared=False):
    """Some columns of stacks that have more, in no order."""
    draw = torch.Generator().manual_seed(tokens)
    bounds = [0, *itertools.accumulate(used)]
    b_places = torch.cat([torch.randperm(count + 4, generator=draw)[:count] for count in used]).int()
    a_places = torch.randperm(60, generator=draw)[: bounds[-1]].int()
    mask = randn(1 if shared else tokens, bounds[-1])
    return GroupMixture(
        randn(2, 60, width) / width**0.5,
        [randn(2, count + 4, out) for count, out in zip(used, outs, strict=True)],
        bounds,
        torch.tensor(bounds).int(),
        a_places,
        b_places,
        mask * (torch.rand(mask.shape, generator=draw) < 0.6),
    )


def test_columns_that_a_token_does_not_use_are_not_read(kernels, randn):
    group = mixture(randn, 2, 8, [8], used=[3])
    group.mask[:] = torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0]])
    group.a[0, group.a_places[1].item()] = torch.inf
    group.bs[0][0, group.b_places[2].item()] = torch.nan
    y = randn(2, 8)
    kernels.lora_add(0, randn(2, 8), y, slice(None), group.sparse)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 19])
@pytest.mark.parametrize(("width", "out"), [(2, 1), (6, 15), (50, 64), (576, 100)])
def test_linear(tokens, width, out):
    kernels = load_kernels(torch.bfloat16)
    if not kernels.takes_linear(width):
        pytest.skip("this machine's bfloat16 products are PyTorch's")
    draw = torch.Generator().manual_seed(out)
    x, weight, bias = (
        torch.randn(*shape, generator=draw).bfloat16() for shape in [(tokens, width), (out, width), (out,)]
    )
    packed = kernels.pack_linear(weight)
    for more in (None, bias):
        expected = F.linear(x.float(), weight.float(), None if more is None else more.float())
        got = kernels.linear(x, packed, more, out)
        torch.testing.assert_close(got.float(), expected, atol=width**0.5 / 128, rtol=1 / 128)
    assert not kernels.takes_linear(7)


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
