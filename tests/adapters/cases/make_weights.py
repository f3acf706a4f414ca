"""Random weights for a case: python make_weights.py CASE OUT [--seed N].

Writes OUT/adapter_config.json and the safetensors, in SmolLM2-135M's shapes (30 layers, hidden 576, k and v out 192,
intermediate 1536). Which tensors the file holds may differ from what its configuration says: that is what some cases
are about (WEIGHTS below; else all of target_modules).
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}
WEIGHTS = {
    "extra-module": {"modules": ["q_proj", "v_proj"], "ignored": lambda layer, m: m == "v_proj"},
    "extra-layers": {"modules": ["q_proj", "v_proj"], "ignored": lambda layer, m: layer not in (26, 27)},
    "excluded-module": {"modules": ["q_proj", "v_proj"], "ignored": lambda layer, m: m == "v_proj"},
    "default-infix": {"infix": ".default"},
    "half-missing": {"layers": range(19)},
}


def main(case: str, out: str, seed: int = 0) -> None:
    source, out_dir = Path(case), Path(out)
    out_dir.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text())
    shutil.copy(source / "adapter_config.json", out_dir)
    if (source / "adapter_model.safetensors").exists():
        shutil.copy(source / "adapter_model.safetensors", out_dir)
        return
    how = WEIGHTS.get(source.name, {})
    targets = config.get("target_modules")
    modules = (
        how.get("modules")
        or [m for m in (targets if isinstance(targets, list) else []) if m in SIZES]
        or ["q_proj", "v_proj"]
    )
    g, tensors, infix = torch.Generator().manual_seed(seed), {}, how.get("infix", "")
    for layer in how.get("layers", range(30)):
        for m in modules:
            part = "self_attn" if m[0] in "qkvo" else "mlp"
            n_in, n_out = SIZES[m]
            p = f"base_model.model.model.layers.{layer}.{part}.{m}"
            tensors[f"{p}.lora_A{infix}.weight"] = torch.randn(config["r"], n_in, generator=g) * 0.02
            loud = 20 if how.get("ignored") and how["ignored"](layer, m) else 1  # tensors that must have no effect
            tensors[f"{p}.lora_B{infix}.weight"] = torch.randn(n_out, config["r"], generator=g) * 0.02 * loud
    save_file(tensors, out_dir / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[4]) if len(sys.argv) > 4 else 0)
