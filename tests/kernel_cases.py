"""What tests of the GPU's kernels share: tensors, a paged cache, and how they are run where there is no GPU.

There it is Triton's interpreter, which has to be chosen before Triton is imported: it has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FULL, HALF = torch.float32, torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _seen = set()

    def _call(self, *given, **named):
        """Triton's own puts the interpreter's functions in the language's place whenever one of its functions calls
        another, for a third of all time. A kernel's start has done so; what is not to be undone at its end needs it
        once.
        """
        if self.fn.__module__ not in _seen:
            _seen.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*given, **named)

    interpreter.InterpretedFunction.__call__ = _call


def assert_near(got, expected, *, steps=2):
    """As near as `steps` roundings to the dtype leave it. The interpreter cuts off where a GPU rounds."""
    step = 4e-6 if got.dtype == FULL else 2**-8 if DEVICE == "cuda" else 2**-7
    tolerance = steps * step
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=tolerance, equal_nan=True)


def ints(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def pass_in_the_interpreter(file, *, with_fixtures=False):
    """The `Cases` of a file do."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning"]
    if not with_fixtures:
        command.append("--noconftest")
    ran = subprocess.run(
        [*command, "-o", "python_classes=Cases", f"{file}::Cases"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-10_000:] + ran.stderr[-2000:]


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


class KernelCases:
    @pytest.fixture
    def dtype(self):
        return FULL

    @pytest.fixture
    def draw(self):
        return torch.Generator().manual_seed(0)

    @pytest.fixture
    def randn(self, dtype, draw):
        return lambda *shape: torch.randn(*shape, generator=draw).to(DEVICE, dtype)

    @pytest.fixture
    def kernels(self):
        from lorauter.engine import cuda_kernels

        return cuda_kernels

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
