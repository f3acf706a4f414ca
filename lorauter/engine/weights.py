"""A base model out of its folder, in the parts that `Decoder` takes of transformers' models.

Importing transformers' own takes seconds, in every process that holds a model, and so does loading by them. Knows what
the tensors of the served architectures are called; what is less usual about a folder, or wrong with it, is left to
transformers to load or to refuse.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorauter.engine.model import ARCHITECTURES
from lorauter.engine.model_config import read_config

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PEFT = "adapter_config.json"  # transformers would add that adapter
Shape = tuple[int, ...]


class _Part(nn.Module):
    """A module by the names of what is in it."""

    def put(self, path: str, module: nn.Module) -> None:
        first, _, rest = path.partition(".")
        if rest:
            if first not in self._modules:
                self.add_module(first, _Part())
            part = self._modules[first]
            assert isinstance(part, _Part)
            part.put(rest, module)
        else:
            self.add_module(first, module)


class _Norm(nn.Module):
    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = eps


class _Rotary(nn.Module):
    """Rotary frequencies (arXiv 2104.09864), as transformers has them: halves, not pairs."""

    def __init__(self, theta: float, head_dim: int, device: torch.device) -> None:
        super().__init__()
        powers = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        self._frequencies = (1.0 / (theta**powers)).to(device)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (n, length, head_dim) each, in the dtype of `x`."""
        angles = positions[..., None].float() * self._frequencies
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def read_model(model: str, dtype: torch.dtype, device: torch.device) -> Any | None:
    """What `Decoder` takes, of a folder; None if it is another kind of folder than usual, or has not all of it."""
    try:
        return _read(Path(model), dtype, device)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError):  # transformers tells what is wrong
        return None


def _read(folder: Path, dtype: torch.dtype, device: torch.device) -> Any | None:
    if not (folder / "config.json").is_file() or (folder / _PEFT).exists():
        return None
    config = read_config(folder)
    if config is None:
        from transformers import AutoConfig  # seconds to import

        config = AutoConfig.from_pretrained(folder)
    [architecture] = config.architectures or [""]
    plain = architecture in ARCHITECTURES and architecture.lower() == f"{config.model_type}forcausallm"
    if not plain or getattr(config, "quantization_config", None) is not None:
        return None
    if config.rope_parameters["rope_type"] != "default" or config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        return None
    shapes, tensors = _shapes(config), dict[str, Tensor]()
    for file in _files(folder):
        read = load_file(file)
        if any(shapes.get(name) != tuple(tensor.shape) for name, tensor in read.items()):
            return None
        tensors |= {name: tensor.to(device, dtype) for name, tensor in read.items()}
    if tensors.keys() != shapes.keys():
        return None
    return _built(architecture, config, tensors, _eos(folder, config))


def _files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = json.loads((folder / _INDEX).read_text())
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _eos(folder: Path, config: Any) -> Any:
    """The ends of text that generation goes by."""
    file = folder / "generation_config.json"
    return json.loads(file.read_text()).get("eos_token_id") if file.is_file() else config.eos_token_id


def _head_dim(config: Any) -> int:
    found: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return found


def _shapes(config: Any) -> dict[str, Shape]:
    """All tensors of a model, by name."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, _head_dim(config)
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    biased = set[str]()
    if config.model_type == "qwen2":
        biased |= {"q_proj", "k_proj", "v_proj"}
    if getattr(config, "attention_bias", False):
        biased |= attention.keys()
    if getattr(config, "mlp_bias", False):
        biased |= mlp.keys()
    layer: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for part, linears in (("self_attn", attention), ("mlp", mlp)):
        for name, shape in linears.items():
            layer[f"{part}.{name}.weight"] = shape
            if name in biased:
                layer[f"{part}.{name}.bias"] = shape[:1]
    if config.model_type == "qwen3":
        layer |= {f"self_attn.{name}.weight": (dim,) for name in ("q_norm", "k_norm")}
    vocabulary = config.vocab_size, hidden
    whole: dict[str, Shape] = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        whole["lm_head.weight"] = vocabulary
    for i in range(config.num_hidden_layers):
        whole |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return whole


def _built(architecture: str, config: Any, tensors: dict[str, Tensor], eos: Any) -> Any:
    """The tensors in modules of transformers' names."""
    whole = type(architecture, (_Part,), {})()
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind == "bias":
            continue
        if tensor.dim() == 1:
            whole.put(path, _Norm(tensor, config.rms_norm_eps))
            continue
        bias = tensors.get(f"{path}.bias")
        linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(tensor, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        whole.put(path, linear)
    if config.tie_word_embeddings:
        whole.put("lm_head", whole.model.embed_tokens)
    theta, device = config.rope_parameters["rope_theta"], tensors["model.norm.weight"].device
    whole.put("model.rotary_emb", _Rotary(theta, _head_dim(config), device))
    layers = dict(whole.model.layers.named_children())  # in the file's order
    whole.model.layers = nn.ModuleList(layers[str(i)] for i in range(config.num_hidden_layers))
    config.dtype = tensors["model.norm.weight"].dtype
    whole.config, whole.generation_config = config, SimpleNamespace(eos_token_id=eos)
    return whole
