"""A PEFT LoRA adapter: its configuration and tensors, parsed and checked.

Reads `adapter_config.json` and `adapter_model.safetensors` (never pickles) and refuses, by the adapter's
name, whatever the engine would not compute exactly: a setting it does not know is a reason to refuse, not to
ignore. Knows nothing of where the files came from, nor of batches and devices.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lorauter.adapters.patterns import PatternError, first_matches
from lorauter.errors import AdapterRejected

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama-like decoder layer that an adapter may change."""

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d+)\.(?:self_attn\.(?=[qkvo]_)|mlp\.(?=gate_|up_|down_))(?P<target>\w+))"
    r"\.lora_(?P<side>[AB])\.weight"
)
# Settings that change nothing at inference, or that `_scaling` and the shapes of the tensors already cover.
_UNDERSTOOD = frozenset(
    "peft_type peft_version auto_mapping base_model_name_or_path revision inference_mode task_type r lora_alpha "
    "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern "
    "use_rslora megatron_core megatron_config qalora_group_size ensure_weight_tying init_lora_weights "
    "loftq_config eva_config lora_ga_config bias".split()
)


@dataclass(frozen=True)
class ModelShape:
    """What an adapter has to fit: the base model's names, layers and linear shapes.

    Attributes:
        names: names that `base_model_name_or_path` may have; compared by their last path part, without case.
            Empty accepts any.
        layers: number of decoder layers.
        linears: `{target: (in_features, out_features)}`.
    """

    names: tuple[str, ...]
    layers: int
    linears: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class LoraWeights:
    """One adapter in host memory.

    Attributes:
        name: the adapter's name.
        version: identifies the content; the same name with another version is another adapter.
        base_model: `base_model_name_or_path` of its configuration.
        tensors: `{(layer, target): (A, B)}`; A is (r, in_features), B is (out_features, r) and already carries
            the scaling s, so that the layer's change is `B A x`. float32, or A's own dtype where s is 1.
    """

    name: str
    version: str
    base_model: str
    tensors: Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]

    @property
    def key(self) -> tuple[str, str]:
        """Name and version."""
        return self.name, self.version

    @property
    def ranks(self) -> dict[str, int]:
        """The largest rank over the layers, for each target it has."""
        ranks: dict[str, int] = {}
        for (_, target), (a, _) in self.tensors.items():
            ranks[target] = max(ranks.get(target, 0), a.shape[0])
        return ranks

    @property
    def rank(self) -> int:
        """The largest rank over layers and targets."""
        return max(self.ranks.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(a.nbytes + b.nbytes for a, b in self.tensors.values())

    @classmethod
    def load(cls, directory: Path, *, name: str, version: str) -> LoraWeights:
        """Read an adapter's folder.

        Raises:
            AdapterRejected: a file is missing or corrupt, a setting is not served, a tensor is not one of a
                LoRA pair, has the wrong shape, or holds NaN or infinity.
        """
        config = _read_config(directory / CONFIG_FILE, name)
        sides: dict[str, dict[tuple[int, str], torch.Tensor]] = {"A": {}, "B": {}}
        modules: dict[tuple[int, str], str] = {}
        try:
            with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    match = _TENSOR.fullmatch(key)
                    if match is None or match["target"] not in TARGETS:
                        raise AdapterRejected(
                            f"tensor {key} is not a LoRA weight of {', '.join(TARGETS)}; only those are served",
                            adapter=name,
                        )
                    where = (int(match["layer"]), match["target"])
                    modules[where] = match["module"]
                    sides[match["side"]][where] = file.get_tensor(key)
        except (OSError, SafetensorError, ValueError) as error:
            raise AdapterRejected(f"{WEIGHTS_FILE} cannot be read: {error}", adapter=name) from error
        if not modules:
            raise AdapterRejected(f"{WEIGHTS_FILE} holds no LoRA tensor", adapter=name)
        ranks = _by_pattern(config, "rank_pattern", config["r"], modules.values(), name)
        alphas = _by_pattern(config, "alpha_pattern", config["lora_alpha"], modules.values(), name)
        tensors = {}
        for where, module in sorted(modules.items()):
            # s = alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv 2312.03732).
            rank = ranks[module]
            scaling = alphas[module] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            pair = sides["A"].get(where), sides["B"].get(where)
            tensors[where] = _checked_pair(*pair, module=module, rank=rank, scaling=scaling, name=name)
        return cls(name, version, str(config.get("base_model_name_or_path") or ""), tensors)

    def check_fits(self, shape: ModelShape, *, max_rank: int) -> None:
        """Raise AdapterRejected unless the adapter was made for a model of this name and shape."""
        known = {_last_part(n) for n in shape.names}
        if known and self.base_model and _last_part(self.base_model) not in known:
            raise AdapterRejected(
                f"was trained for the base model {self.base_model!r}, but this one is {shape.names[0]!r}; "
                "if they are the same model, add the name to base_model_aliases",
                adapter=self.name,
            )
        if self.rank > max_rank:
            raise AdapterRejected(f"has rank {self.rank}; the engine serves up to {max_rank}", adapter=self.name)
        for (layer, target), (a, b) in self.tensors.items():
            if layer >= shape.layers:
                raise AdapterRejected(
                    f"changes layer {layer}, but the base model has {shape.layers}", adapter=self.name
                )
            got = (a.shape[1], b.shape[0])
            if target not in shape.linears or shape.linears[target] != got:
                raise AdapterRejected(
                    f"layer {layer} {target} maps {got[0]} to {got[1]} features, but the base model's maps "
                    f"{' to '.join(map(str, shape.linears.get(target, ('none',))))}",
                    adapter=self.name,
                )


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterRejected(f"{CONFIG_FILE} cannot be read: {error}", adapter=name) from error
    if not isinstance(config, dict):
        raise AdapterRejected(f"{CONFIG_FILE} is not a JSON object", adapter=name)
    if config.get("peft_type") != "LORA":
        raise AdapterRejected(f"peft_type is {config.get('peft_type')!r}; only LORA is served", adapter=name)
    unknown = sorted(key for key, value in config.items() if value and key not in _UNDERSTOOD)
    if unknown:
        raise AdapterRejected(f"{CONFIG_FILE} uses {', '.join(unknown)}, which is not served", adapter=name)
    if config.get("bias") not in (None, "none"):
        raise AdapterRejected(f"bias is {config['bias']!r}; only 'none' is served", adapter=name)
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise AdapterRejected(
            f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base weights; convert the "
            "adapter to a plain LoRA when saving it",
            adapter=name,
        )
    if not _is_positive(config.get("r"), int):
        raise AdapterRejected(f"r is {config.get('r')!r}; it must be a positive integer", adapter=name)
    if not _is_positive(config.get("lora_alpha"), int | float):
        raise AdapterRejected(f"lora_alpha is {config.get('lora_alpha')!r}; it must be positive", adapter=name)
    for key, kind in (("rank_pattern", int), ("alpha_pattern", int | float)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(_is_positive(value, kind) for value in patterns.values()):
            raise AdapterRejected(
                f"{key} is {patterns!r}; it must map modules to positive numbers like r and lora_alpha", adapter=name
            )
    return config


def _is_positive(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < 1e9  # NaN compares as False


def _by_pattern(
    config: Mapping[str, Any], setting: str, default: Any, modules: Iterable[str], name: str
) -> dict[str, Any]:
    """Each module's value by PEFT's rule (`get_pattern_key`): the first pattern that matches the path's end says it."""
    patterns, paths = config.get(setting) or {}, list(modules)
    try:
        found = first_matches(list(patterns), paths, template=r"(.*\.)?({})$")
    except PatternError as error:
        raise AdapterRejected(f"{setting}: {error}", adapter=name) from error
    values = list(patterns.values())
    return {path: default if first is None else values[first.pattern] for path, first in zip(paths, found, strict=True)}


def _checked_pair(
    a: torch.Tensor | None, b: torch.Tensor | None, *, module: str, rank: int, scaling: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch  # seconds and memory, which those who only move adapters' files are spared

    if a is None or b is None:
        raise AdapterRejected(f"{module} has lora_{'B' if a is None else 'A'} without its pair", adapter=name)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterRejected(
            f"{module} has A {tuple(a.shape)} and B {tuple(b.shape)}, which do not fit rank {rank}",
            adapter=name,
        )
    if not {a.dtype, b.dtype} <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        raise AdapterRejected(
            f"{module} has tensors of {a.dtype} and {b.dtype}; floats of 16, 32 or 64 bits needed", adapter=name
        )
    scaled = b if scaling == 1 else b.float() * scaling
    if not (torch.isfinite(a).all() and torch.isfinite(scaled).all()):
        raise AdapterRejected(f"{module} holds NaN or infinity", adapter=name)
    return a, scaled


LoadAdapter = Callable[[str], LoraWeights]
"""Reads an adapter by its name. Raises AdapterError."""
