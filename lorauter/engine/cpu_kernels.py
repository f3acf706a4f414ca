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
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorauter.defaults import home

DTYPES = (torch.bfloat16, torch.float32)
"""What the kernels take."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = "-std=c++20 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -fPIC -shared".split()
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "lora_add": [_POINTER, _LONG, _POINTER, *[_LONG] * 2, _POINTER, *[_LONG] * 2, *[_INT] * 2],
    "add_norm": [*[_POINTER] * 3, _FLOAT, *[_POINTER] * 2, *[_LONG] * 2, _INT],
    "silu_mul": [*[_POINTER] * 2, *[_LONG] * 2, _INT],
    "rotate_and_store": [*[_POINTER] * 8, *[_LONG] * 5, _INT],
    "decode_attention": [*[_POINTER] * 5, *[_LONG] * 6, _INT],
    "linear": [_POINTER, _LONG, *[_POINTER] * 3, *[_LONG] * 2, _INT],
}
_PANEL = 16  # outputs whose weights lie together


class _Target(ctypes.Structure):
    _fields_: ClassVar = [
        *[(name, _POINTER) for name in ("a", "b")],
        *[(name, _LONG) for name in ("a_stride", "b_stride", "out", "y_offset")],
        *[(name, _POINTER) for name in ("starts", "a_columns", "b_columns", "weights")],
    ]


class SparseLora:
    """The mixtures of a batch in the targets with the same input, as the columns that each token uses.

    Takes what `lorauter.engine.lora.GroupMixture` has.
    """

    def __init__(
        self, a: Tensor, bs: Sequence[Tensor], bounds: Sequence[int], a_places: Tensor, b_places: Tensor, mask: Tensor
    ) -> None:
        self.shared = mask.shape[0] == 1
        self._kept: list[Tensor] = [a, *bs]  # what the pointers point at
        targets, offset = [], 0
        for b, begin, end in zip(bs, bounds, bounds[1:], strict=False):
            token, column = mask[:, begin:end].nonzero(as_tuple=True)
            starts = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
            starts[1:] = torch.bincount(token, minlength=mask.shape[0]).cumsum(0)
            places = begin + column
            entries = [starts, a_places[places], b_places[places], mask[token, places].float()]
            if len(column):
                self._kept += entries
                pointers = [t.data_ptr() for t in (a, b, *entries)]
                strides = [a.stride(0), b.stride(0), b.shape[2], offset]
                targets.append(_Target(*pointers[:2], *strides, *pointers[2:]))
            offset += b.shape[2]
        self.targets = (_Target * len(targets))(*targets)


class CpuKernels:
    """The functions of one built library, for one dtype. Tensors are contiguous, but for what is said."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = str(dtype).removeprefix("torch.")
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"{name}_{suffix}", None)
            if function is not None:
                function.argtypes, function.restype = arguments, None
            setattr(self, f"_{name}", function)
        self._lora_add: Any
        self._add_norm: Any
        self._silu_mul: Any
        self._rotate_and_store: Any
        self._decode_attention: Any
        self._linear: Any

    def takes_linear(self, in_features: int) -> bool:
        """Whether `linear` is there for this width: for bfloat16 on AVX-512. AMX is faster, and left to PyTorch."""
        return self._linear is not None and in_features % 2 == 0 and not torch.cpu.get_capabilities().get("amx_bf16")

    def pack_linear(self, weight: Tensor) -> Tensor:
        """The weight (out, in) as `linear` takes it: (out / 16, in / 2, 16, 2), the last panel filled up with 0."""
        out, width = weight.shape
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -out % _PANEL))
        return padded.view(-1, _PANEL, width // 2, 2).transpose(1, 2).contiguous()

    def linear(self, x: Tensor, packed: Tensor, bias: Tensor | None, out: int) -> Tensor:
        """`x W^T + bias`, (tokens, out)."""
        y = x.new_empty(x.shape[0], out)
        self._linear(
            x.data_ptr(), x.shape[1], packed.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(), out,
            x.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return y

    def lora_add(self, layer: int, x: Tensor, y: Tensor, tokens: slice, lora: SparseLora) -> None:
        """Add the mixtures of x[tokens], (tokens, in), to y[tokens], (tokens, out)."""
        start, stop, _ = tokens.indices(x.shape[0])
        (_, width), out, size = x.shape, y.shape[1], x.element_size()
        self._lora_add(
            x.data_ptr() + start * width * size, width, y.data_ptr() + start * out * size, out, stop - start,
            lora.targets, len(lora.targets), layer, lora.shared, torch.get_num_threads(),
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

    def rotate_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        heads: int,
    ) -> Tensor:
        """Rotate the heads of qkv (tokens, heads + 2 kv_heads, dim), write keys and values to the cache.

        Args:
            cos, sin: (positions, dim).
            rows, positions: (tokens,) int64, where in the cache.
            keys, values: (rows, kv_heads, length, dim).
            heads: of queries.

        Returns:
            Queries, (tokens, heads, dim).
        """
        q = qkv.new_empty(qkv.shape[0], heads, qkv.shape[2])
        self._rotate_and_store(
            qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows.data_ptr(), positions.data_ptr(), keys.data_ptr(),
            values.data_ptr(), q.data_ptr(), qkv.shape[0], heads, *keys.shape[1:], torch.get_num_threads(),
        )  # fmt: skip
        return q

    def decode_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None, y: Tensor
    ) -> None:
        """Attention of one query for each of the cache's first n rows: q and y (n, heads, dim), positions (n,)."""
        self._decode_attention(
            q.data_ptr(), keys.data_ptr(), values.data_ptr(), positions.data_ptr(), y.data_ptr(), *q.shape[:2],
            *keys.shape[1:], window or 0, torch.get_num_threads(),
        )  # fmt: skip


@functools.cache
def load_kernels(dtype: torch.dtype) -> CpuKernels | None:
    """The kernels for a dtype, built first if this machine has not yet; None, with a warning, where that fails."""
    if dtype not in DTYPES:
        return None
    try:
        return CpuKernels(ctypes.CDLL(str(_build())), dtype)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logging.getLogger(__name__).warning(
            "the CPU's kernels were not built, and PyTorch's slower operations serve instead; "
            "install a C++ compiler, or name one in CXX: %s",
            reason,
        )
        return None


def _build() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no c++, g++ or clang++ is on the PATH")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    made_of = [_SOURCE.read_text(), *_FLAGS, version, sorted(torch.cpu.get_capabilities().items())]
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
