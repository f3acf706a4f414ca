"""Builds and calls the CPU's kernels: cpu_kernels.cpp, compiled once for this machine. Knows tensors, not layers.

They share PyTorch's OpenMP threads, since its library is there already when theirs is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorauter.defaults import home

DTYPES = (torch.bfloat16, torch.float32)
"""What the kernels take."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_HEADERS = sorted(_SOURCE.parent.glob("cpu_*.h"))
_FLAGS = "-std=c++20 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -fPIC -shared".split()
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_CACHE = [_POINTER, *[_LONG] * 3]
_ARGUMENTS: dict[str, list[Any]] = {
    "lora_add": [_POINTER, _LONG, _POINTER, *[_LONG] * 2, *[_POINTER] * 3, *[_LONG] * 2, _INT],
    "add_norm": [*[_POINTER] * 3, _FLOAT, *[_POINTER] * 2, *[_LONG] * 2, _INT],
    "silu_mul": [*[_POINTER] * 2, *[_LONG] * 2, _INT],
    "greedy": [_POINTER, *[_LONG] * 2, _POINTER, _INT],
    "rotate_and_store": [*[_POINTER] * 8, *[_LONG] * 2, *_CACHE, _INT],
    "decode_attention": [*[_POINTER] * 6, *[_LONG] * 3, *_CACHE, _INT],
    "prefill_attention": [*[_POINTER] * 3, *[_LONG] * 2, _POINTER, *[_LONG] * 3, *_CACHE, _INT],
    "linear": [_POINTER, _LONG, *[_POINTER] * 3, *[_LONG] * 2, *[_INT] * 2],
}
_PANEL = 16  # outputs whose weights lie together
_MANY = 192  # tokens for which PyTorch's products of single precision are faster, with the weights' layout for it


class _Target(ctypes.Structure):
    _fields_: ClassVar = [
        *[(name, _LONG) for name in ("out", "y_offset")],
        *[(name, _POINTER) for name in ("starts", "a_offsets", "b_offsets", "weights")],
    ]


@dataclass(frozen=True)
class TargetMixtures:
    """The mixtures of all rows in one target: the columns of adapters that each row uses, its entries.

    Attributes:
        out: the target's width.
        starts: (rows + 2,) int32; the entries of row r are from starts[r] to starts[r + 1].
        a_offsets, b_offsets: (entries,) int64, where in the arena the column's A and B of layer 0 begin.
        weights: (entries,) float32, none of them 0.
    """

    out: int
    starts: Tensor
    a_offsets: Tensor
    b_offsets: Tensor
    weights: Tensor


class RowMixtures:
    """The mixtures of all rows in the targets with the same input, as `CpuKernels.lora_add` takes them.

    Args:
        arena: (elements,) what the offsets are into. A column's next layer follows the one before.
        targets: all of them, also those without entries, in the order of their outputs.
    """

    def __init__(self, arena: Tensor, targets: Sequence[TargetMixtures]) -> None:
        self.arena = arena
        self._kept = targets  # what the pointers point at
        offsets = accumulate((target.out for target in targets), initial=0)
        entries = [
            _Target(
                target.out, offset, target.starts.data_ptr(), target.a_offsets.data_ptr(),
                target.b_offsets.data_ptr(), target.weights.data_ptr(),
            )
            for target, offset in zip(targets, offsets, strict=False)
            if len(target.weights)
        ]  # fmt: skip
        self.targets = (_Target * len(entries))(*entries)


class CpuKernels:
    """The functions of one built library, for one dtype. Tensors are contiguous, but for what is said."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._dtype = dtype
        suffix = str(dtype).removeprefix("torch.")
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"{name}_{suffix}", None)
            if function is not None:
                function.argtypes, function.restype = arguments, None
            setattr(self, f"_{name}", function)
        self._lora_add: Any
        self._add_norm: Any
        self._silu_mul: Any
        self._greedy: Any
        self._rotate_and_store: Any
        self._decode_attention: Any
        self._prefill_attention: Any
        self._linear: Any

    def takes_linear(self, in_features: int) -> bool:
        """Whether `linear` is the fastest for this width: for bfloat16 on AVX-512, and for float32 on AVX2 alone.

        With AMX bfloat16 is left to PyTorch, and so is float32 with AVX-512.
        """
        features = torch.cpu.get_capabilities()
        if self._dtype == torch.float32:
            return bool(features.get("avx2") and not features.get("avx512_f"))
        return self._linear is not None and in_features % 2 == 0 and not features.get("amx_bf16")

    def pack_linear(self, weight: Tensor) -> Tensor:
        """The weight (out, in) as `linear` takes it, 16 outputs a panel, the last of which is filled up with 0.

        bfloat16 is (out / 16, in / 2, 16, 2), and float32 (out / 16, in, 16): as bfloat16 where that loses nothing,
        which is half as much to read for each step, and to keep.
        """
        out, width = weight.shape
        if -out % _PANEL:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, -out % _PANEL))
        if weight.dtype == torch.float32 and not weight.view(torch.int16)[:, ::2].any():  # the lower halves
            weight = weight.view(torch.bfloat16)[:, 1::2]  # as it lies
        together = 1 if self._dtype == torch.float32 else 2
        shape = (-1, _PANEL, width // together, together)
        return weight.unfold(1, together, together).reshape(shape).transpose(1, 2).contiguous()

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: int) -> Tensor:
        """`x W^T + bias`, (tokens, out)."""
        if self._dtype == torch.float32 and len(x) >= _MANY:
            weight = packed.transpose(1, 2).reshape(-1, x.shape[1])[:out].float()
            return torch.nn.functional.linear(x, weight, bias)
        y = x.new_empty(x.shape[0], out)
        self._linear(
            x.data_ptr(), x.shape[1], packed.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), out,
            x.shape[0], packed.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def lora_add(self, layer: int, x: Tensor, y: Tensor, rows: Tensor, mixtures: RowMixtures) -> None:
        """Add to y (tokens, out) what the mixtures of the tokens' rows, (tokens,) int32, make of x (tokens, in)."""
        if mixtures.targets:
            self._lora_add(
                x.data_ptr(), x.shape[1], y.data_ptr(), y.shape[1], x.shape[0], rows.data_ptr(),
                mixtures.arena.data_ptr(), mixtures.targets, len(mixtures.targets), layer, torch.get_num_threads(),
            )  # fmt: skip

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`x + delta` (x itself without it) and its RMS norm; (tokens, width) each."""
        total, normed = x if delta is None else torch.empty_like(x), torch.empty_like(x)
        self._add_norm(
            x.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), eps, total.data_ptr(),
            normed.data_ptr(), *x.shape, torch.get_num_threads(),
        )  # fmt: skip
        return total, normed

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of (tokens, 2 * width)."""
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(tokens, width)
        self._silu_mul(gate_up.data_ptr(), y.data_ptr(), tokens, width, torch.get_num_threads())
        return y

    def greedy(self, logits: Tensor) -> Tensor:
        """(n,) int64: where each row of (n, vocabulary) is highest; -1 where one of its numbers is not finite."""
        tokens = torch.empty(logits.shape[0], dtype=torch.int64)
        self._greedy(logits.data_ptr(), *logits.shape, tokens.data_ptr(), torch.get_num_threads())
        return tokens

    def rotate_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Tensor,
        positions: Tensor,
        table: Tensor,
        keys: Tensor,
        values: Tensor,
        heads: int,
    ) -> Tensor:
        """Rotate the heads of qkv (tokens, heads + 2 kv_heads, dim), write keys and values to the cache.

        Args:
            cos, sin: (positions, dim).
            rows, positions: (tokens,) int32, where in the cache.
            table: (rows, max_blocks) int32, each row's blocks.
            keys, values: (blocks, kv_heads, BLOCK, dim).
            heads: of queries.

        Returns:
            Queries, (tokens, heads, dim).
        """
        q = qkv.new_empty(qkv.shape[0], heads, qkv.shape[2])
        self._rotate_and_store(
            qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows.data_ptr(), positions.data_ptr(), keys.data_ptr(),
            values.data_ptr(), q.data_ptr(), qkv.shape[0], heads, *_cache(table, keys), torch.get_num_threads(),
        )  # fmt: skip
        return q

    def decode_attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        rows: Tensor,
        positions: Tensor,
        window: int | None,
        y: Tensor,
    ) -> None:
        """Attention of one query for each of the first n rows and positions: q and y (n, heads, dim)."""
        self._decode_attention(
            q.data_ptr(), keys.data_ptr(), values.data_ptr(), rows.data_ptr(), positions.data_ptr(), y.data_ptr(),
            *q.shape[:2], window or 0, *_cache(table, keys), torch.get_num_threads(),
        )  # fmt: skip

    def prefill_attention(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        row: int,
        start: int,
        window: int | None,
        y: Tensor,
    ) -> None:
        """Causal attention of one row's tokens at successive positions from `start` on: q and y (n, heads, dim)."""
        self._prefill_attention(
            q.data_ptr(), keys.data_ptr(), values.data_ptr(), row, start, y.data_ptr(), *q.shape[:2], window or 0,
            *_cache(table, keys), torch.get_num_threads(),
        )  # fmt: skip


def _cache(table: Tensor, keys: Tensor) -> tuple[int, int, int, int]:
    return table.data_ptr(), table.shape[1], keys.shape[1], keys.shape[3]


@functools.cache
def load_kernels(dtype: torch.dtype) -> CpuKernels | None:
    """The kernels for a dtype, built first if this machine has not yet; None, with a warning, where that fails."""
    if dtype not in DTYPES:
        return None
    try:
        return CpuKernels(ctypes.CDLL(str(_build())), dtype)
    except (OSError, subprocess.CalledProcessError) as error:
        of_compiler = isinstance(error, (FileNotFoundError, subprocess.CalledProcessError))
        logging.getLogger(__name__).warning(
            "the CPU's kernels were not built, and PyTorch's slower operations serve instead; %s: %s",
            "install a C++ compiler, or name one in CXX" if of_compiler else f"see that {home()} can be written to",
            error.stderr if isinstance(error, subprocess.CalledProcessError) else error,
        )
        return None


def find_compiler() -> str:
    """The C++ compiler that this machine has. Raises FileNotFoundError."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no c++, g++ or clang++ is on the PATH")
    return compiler


def _build() -> Path:
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    sources = [path.read_text() for path in (_SOURCE, *_HEADERS)]
    made_of = [*sources, *_FLAGS, version, sorted(torch.cpu.get_capabilities().items())]
    target = home() / "kernels" / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder, target.name)
            subprocess.run(  # noqa: S603
                [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], capture_output=True, text=True, check=True
            )
            made.replace(target)
    return target
