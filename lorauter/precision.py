"""In which precision, and in which layout, a device computes fastest, and models that make use of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

# Weights laid out once for oneDNN are up to a third faster at few rows. PyTorch's compiler does the same, by the
# same operators; they are not public, so a build without them goes on with plain weights, and so does a CPU without
# AVX-512, where they refuse bfloat16.
_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
PACKS = all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_PACKED_FOR_ROWS = 32


def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`x W^T + bias`, of a weight that does not change."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and PACKS:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return partial(F.linear, weight=weight, bias=bias)


def native_dtype(device: torch.device) -> torch.dtype:
    """The half precision that the device's own instructions compute in (bfloat16 before float16), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    features = torch.cpu.get_capabilities()
    native = features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16")
    return torch.bfloat16 if native else torch.float32


def compute_linear_layers_in(dtype: torch.dtype, model: torch.nn.Module) -> None:
    """Have a float32 model's linear layers compute in another precision; what goes between layers stays float32."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.dtype != dtype:
            layer.to(dtype)
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
            layer.register_forward_hook(lambda _, inputs, output: output.float())
