"""In which precision a device computes fastest, and models that make use of it."""

from __future__ import annotations

import torch


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
