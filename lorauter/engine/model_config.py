"""A model's config.json, read without transformers' classes of configs: to import these takes two seconds of CPU time,
in every process that holds a model.

Knows what the files of the served architectures say, and what is meant where they say nothing; what is less usual, or
wrong, is left to transformers to read or to refuse.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
_UNSAID = {"tie_word_embeddings": False, "head_dim": None, "attention_bias": False, "mlp_bias": False}
_TO_BE_SAID: dict[str, tuple[str, ...]] = {  # what else means a size
    "llama": (), "mistral": ("sliding_window",), "qwen2": (), "qwen3": ("head_dim",),
}  # fmt: skip


def read_config(model: str | Path) -> Any | None:
    """What transformers makes of a folder's config.json, in the attributes that are used here; None where only
    transformers can tell."""
    said = _read(Path(model) / "config.json")
    kind = said.get("model_type")
    needed = ("architectures", "eos_token_id", "hidden_act", "rms_norm_eps", *_SIZES)
    if not isinstance(kind, str) or kind not in _TO_BE_SAID or "quantization_config" in said:
        return None
    if any(name not in said for name in (*needed, *_TO_BE_SAID[kind])):
        return None
    sizes = [said[name] for name in _SIZES]
    if not all(type(size) is int and size > 0 for size in sizes) or not isinstance(said["rms_norm_eps"], float):
        return None
    rope = said.get("rope_parameters")
    if rope is None and not said.get("rope_scaling") and "partial_rotary_factor" not in said:  # before transformers 5
        rope = {"rope_type": "default", "rope_theta": said.get("rope_theta")}
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), float | int):
        return None
    windows: dict[str, Any] = {"use_sliding_window": False} if kind.startswith("qwen") else {}
    layers = said.get("layer_types")
    if layers is None and windows and said.get("use_sliding_window"):
        return None
    if not (layers is None or (isinstance(layers, list) and len(layers) == said["num_hidden_layers"])):
        return None
    window = None if kind == "llama" else said.get("sliding_window")
    if not (window is None or type(window) is int) or not isinstance(said["architectures"], list):
        return None
    return SimpleNamespace(**{**_UNSAID, **windows, **said, "sliding_window": window, "rope_parameters": rope})


def known_to_tokenizer(model: str) -> Any | None:
    """What `AutoTokenizer` needs to know of a config where tokenizer_config.json says of which class it is; None where
    it has to read the config itself."""
    config, said = read_config(model), _read(Path(model) / "tokenizer_config.json")
    if config is None or not said.get("tokenizer_class") or "auto_map" in said:
        return None
    return SimpleNamespace(model_type=config.model_type, _name_or_path=model)


def _read(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
