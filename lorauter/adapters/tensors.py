"""The tensors of an adapter's file: which PEFT would use for what, and whether they are sound.

Given the configuration, every tensor is a side of a LoRA pair, a parameter of the base model that takes the place of
the base's own, or one that PEFT does not look at. Knows nothing of the base model itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lorauter.adapters.foreign import WEIGHTS_FILE, what_is_there
from lorauter.adapters.peft_config import TARGETS, PeftConfig
from lorauter.adapters.provenance import provenance_in

if TYPE_CHECKING:
    import torch

    from lorauter.adapters.base_weights import Fingerprint

PREFIX = "base_model.model."
_NUMBER = "(?:0|[1-9][0-9]*)"
_LINEAR = re.compile(
    rf"model\.layers\.(?P<layer>{_NUMBER})\."
    r"(?:self_attn\.(?P<attention>[qkvo]_proj)|mlp\.(?P<mlp>(?:gate|up|down)_proj))"
)
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?P<infix>\.default)?\.weight")
_OTHER_LORA = re.compile(r"(?P<module>.+?)\.lora_\w")  # how names begin: a whole one takes time by its square
_BASE = re.compile(
    rf"(?P<module>{_LINEAR.pattern}|lm_head|model\.embed_tokens|model\.norm|model\.layers\.{_NUMBER}\."
    r"(?:input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm))"
    r"(?P<inner>\.base_layer)?\.(?P<kind>weight|bias)"
)
NOT_IN_LAYERS = ("lm_head", "model.embed_tokens")
"""What PEFT can adapt, and the engine cannot."""

_CONTAINERS = ("model", "model.layers", "model.norm", "model.rotary_emb")  # what PEFT cannot adapt
_LAYER_CONTAINERS = ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm")
_SHOWN = 3

Where = tuple[int, str]
Pair = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class AdapterTensors:
    """What is used of a file.

    Attributes:
        pairs: `{(layer, target): (A, B)}`, the scaling in B.
        base: `{parameter of the base model: what it would be in each precision}`.
        warnings: what is not used.
        provenance: what a composed adapter says that it was made of.
    """

    pairs: Mapping[Where, Pair]
    base: Mapping[str, Mapping[torch.dtype, Fingerprint]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None


def module_of(layer: int, target: str) -> str:
    """A linear layer's path in the base model."""
    return f"model.layers.{layer}.{'self_attn' if target in TARGETS[:4] else 'mlp'}.{target}"


def read_tensors(path: Path, config: PeftConfig) -> AdapterTensors:
    """Read an adapter's weights.

    Raises:
        ValueError: the file cannot be read, PEFT would use none of it or could not load it, the engine could not
            compute what it would do, or it holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _read(file, config)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{WEIGHTS_FILE} cannot be read: {what_is_there(path) or error}") from error


def _read(file: Any, config: PeftConfig) -> AdapterTensors:
    keys = sorted(file.keys())
    paths = {key: key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)}
    lora = {key: match for key, path in paths.items() if (match := _LORA.fullmatch(path))}
    base = {key: match for key, path in paths.items() if (match := _BASE.fullmatch(path))}
    places = {key: _place(match["module"]) for key, match in lora.items()}
    targeted = _targeted(config, [match["module"] for match in (*lora.values(), *base.values())])

    adapted: dict[Where, dict[str, str]] = {}
    for key, match in lora.items():
        place = places[key]
        if place is not None and match["module"] in targeted:
            sides = adapted.setdefault(place, {})
            if match["side"] in sides:
                raise ValueError(f"{key} is there twice: {sides[match['side']]} is the same tensor by another name")
            sides[match["side"]] = key
    for key, path in paths.items():
        other = _OTHER_LORA.match(path)
        if other and other["module"] in NOT_IN_LAYERS and other["module"] in targeted:
            raise ValueError(f"{key} adapts {other['module']}; served are {', '.join(TARGETS)}")
    # PEFT wraps a module that it adapts, whose own parameters then have other names.
    own = {key: m for key, m in base.items() if (m["module"] in targeted) == bool(m["inner"])}
    _check_whole(config.whole, {match["module"] for match in own.values()})
    used = {key for sides in adapted.values() for key in sides.values()} | own.keys()
    if not adapted:
        raise ValueError(_why_unused(keys, lora, places))

    ranks = config.ranks([module_of(*where) for where in sorted(adapted)])
    scalings = config.scalings(ranks)
    pairs = {}
    for where, sides in sorted(adapted.items()):
        module = module_of(*where)
        if lacking := {"A", "B"} - sides.keys():
            raise ValueError(f"{module} has lora_{'A' if 'B' in lacking else 'B'} without its pair")
        if config.even_ranks and ranks[module] % 2:
            raise ValueError(
                f"{module} has rank {ranks[module]}; PEFT loads even ones with an orthogonal initialisation"
            )
        a, b = (file.get_tensor(sides[side]) for side in "AB")
        pairs[where] = _checked(a, b, module=module, rank=ranks[module], scaling=scalings[module])
    told = _warnings(keys, used, lora, places, own)
    return AdapterTensors(pairs, _fingerprints(file, own), told, provenance_in(file.metadata()))


def _place(module: str) -> Where | None:
    match = _LINEAR.fullmatch(module)
    return (int(match["layer"]), match["attention"] or match["mlp"]) if match else None


def _targeted(config: PeftConfig, modules: Collection[str]) -> set[str]:
    """Those of the modules that PEFT adapts. Raises ValueError where it would take something that it cannot adapt."""
    layers = {f"model.layers.{place[0]}" for module in modules if (place := _place(module))}
    containers = [*_CONTAINERS, *(layer + part for layer in sorted(layers) for part in _LAYER_CONTAINERS)]
    found = config.targeted([*dict.fromkeys((*modules, *NOT_IN_LAYERS, *containers))])
    if wrong := [container for container in containers if container in found]:
        raise ValueError(f"target_modules names {wrong[0]} too, to which PEFT cannot apply LoRA")
    return found


def _check_whole(names: Collection[str], there: Collection[str]) -> None:
    """Refuse modules that were trained whole, unless they may turn out to be the base's own."""
    for name in names:
        for module in (*NOT_IN_LAYERS, *_CONTAINERS, *(f"model.layers.0{part}" for part in _LAYER_CONTAINERS)):
            if module.endswith(name) and (module not in NOT_IN_LAYERS or module not in there):
                raise ValueError(f"modules_to_save names {name}; modules that are trained whole are not served")
        if any(module_of(0, target).endswith(name) for target in TARGETS):
            raise ValueError(f"modules_to_save names {name}; modules that are trained whole are not served")


def _why_unused(keys: Collection[str], lora: Mapping[str, object], places: Mapping[str, Where | None]) -> str:
    if any(places.values()):
        return "none of its tensors is of a module that target_modules and the like name; PEFT would change nothing"
    foreign = next((key for key in keys if "lora" in key.lower()), None)
    if foreign is None:
        return f"{WEIGHTS_FILE} holds no LoRA tensor"
    return (
        f"{WEIGHTS_FILE} holds no LoRA tensor that PEFT would use: {foreign} is not named like "
        f"{PREFIX}{module_of(0, 'q_proj')}.lora_A.weight; save the adapter with PEFT, for a causal language model"
    )


def _fingerprints(file: Any, own: Mapping[str, re.Match[str]]) -> dict[str, Mapping[torch.dtype, Fingerprint]]:
    if not own:
        return {}
    from lorauter.adapters.base_weights import fingerprints

    return {f"{m['module']}.{m['kind']}": fingerprints(file.get_tensor(key)) for key, m in own.items()}


def _warnings(
    keys: Collection[str],
    used: Collection[str],
    lora: Mapping[str, re.Match[str]],
    places: Mapping[str, Where | None],
    own: Collection[str],
) -> tuple[str, ...]:
    left_out = [key for key in keys if key not in used and places.get(key) is not None]
    unknown = [key for key in keys if key not in used and places.get(key) is None]
    warnings = []
    if left_out:
        modules = dict.fromkeys(lora[key]["module"] for key in left_out)
        warnings.append(f"ignored, as in PEFT: tensors of modules that the configuration leaves out ({_some(modules)})")
    if unknown:
        warnings.append(f"ignored, as in PEFT: tensors that are no part of the model ({_some(unknown)})")
    if own:
        warnings.append(f"served only if these are the base model's own parameters, unchanged: {_some(own)}")
    return tuple(warnings)


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(list(names)[:_SHOWN]) + more


def _checked(a: torch.Tensor, b: torch.Tensor, *, module: str, rank: int, scaling: float) -> Pair:
    import torch  # seconds and memory, which those who only move adapters' files are spared

    shapes = f"{module} has A {tuple(a.shape)} and B {tuple(b.shape)}, which do not fit rank {rank}"
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(shapes)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        swapped = (a.shape[1], b.shape[0]) == (rank, rank)
        raise ValueError(f"{shapes}; A and B are transposed" if swapped else shapes)
    a, b = (t.float() if t.is_floating_point() and t.itemsize == 1 else t for t in (a, b))
    if not {a.dtype, b.dtype} <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        raise ValueError(f"{module} has tensors of {a.dtype} and {b.dtype}; floating-point numbers needed")
    scaled = b if scaling == 1 else b.float() * scaling
    if not (is_finite(a) and is_finite(scaled)):
        raise ValueError(f"{module} holds NaN or infinity")
    return a, scaled


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all of its numbers are. A sum tells it in a fifth of the time, but where it overflows."""
    import torch

    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
