"""What `adapter_config.json` says, as PEFT understands it: which modules are adapted, their ranks and scalings.

The rule: what PEFT loads and computes as plain LoRA is read as PEFT reads it, and all else is refused with the reason.
Settings of training alone change nothing here. Checked against PEFT 0.20 and 0.21. Knows nothing of tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorauter.adapters.foreign import what_is_there
from lorauter.adapters.patterns import PatternError, first_matches

CONFIG_FILE = "adapter_config.json"
_MAX_BYTES = 1 << 20  # with a rank for every module of the largest models it has a tenth of that
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama-like decoder layer, which an adapter may change."""

_DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's for Llama, Mistral, Qwen2 and Qwen3
_DEFAULT = 8  # PEFT's rank and alpha
_NEWEST_PEFT = (0, 21)  # whose settings are all below
_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>[0-9]+)\.")
_TASKS = "SEQ_CLS SEQ_2_SEQ_LM CAUSAL_LM TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION".split()
_BIASES = ("none", "all", "lora_only")
# Where no tensor is there for a module, these leave B, A or their product zero, or PEFT draws at random.
_ZERO_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")

_READ = (
    "peft_type peft_version task_type base_model_name_or_path r lora_alpha use_rslora rank_pattern alpha_pattern bias "
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save init_lora_weights".split()
)
_OF_TRAINING = (
    "auto_mapping revision inference_mode lora_dropout megatron_core megatron_config qalora_group_size use_qalora "
    "ensure_weight_tying loftq_config eva_config corda_config lora_ga_config velora_config monteclora_config "
    "fan_in_fan_out runtime_config".split()  # PEFT itself turns fan_in_fan_out off where a layer is linear
)
_SUBCONFIGS = ("eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config")
_VARIANTS = ("velora_config", "monteclora_config")  # of training, of which PEFT takes one
_NOT_SERVED = {
    "use_dora": "DoRA scales the base model's own output too",
    "lora_bias": "B has biases",
    "kasa_config": "KaSA changes the base model's weights",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
    "arrow_config": "Arrow mixes several adapters by itself",
    "alora_invocation_tokens": "aLoRA acts on some of the tokens alone",
    "layer_replication": "it makes a model of other layers",
    "target_parameters": "it adapts parameters that are no linear layers",
    "trainable_token_indices": "it changes the embedding",
}


@dataclass(frozen=True)
class PeftConfig:
    """A configuration that can be served.

    Attributes:
        base_model: `base_model_name_or_path`, or "".
        targets: the modules to adapt: names, by which a path is or ends; or one expression for whole paths.
        excluded: those of them that are not, the same way.
        layers: whose modules alone are adapted; None is all.
        layers_patterns: expressions for what stands before a layer's number; none of them is any.
        whole: `modules_to_save`, modules that are saved whole.
        rank, alpha, rank_pattern, alpha_pattern, rslora: as PEFT's settings.
        even_ranks: PEFT loads no odd rank.
        zero_init: a module that is adapted without having tensors stays what it is; else PEFT draws them at random.
        warnings: what is in the file and has no effect.
    """

    base_model: str
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    layers_patterns: tuple[str, ...]
    whole: tuple[str, ...]
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    even_ranks: bool
    zero_init: bool
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> PeftConfig:
        """Read a file.

        Raises:
            ValueError: it cannot be read, or uses what is not served.
        """
        try:
            if (size := path.stat().st_size) > _MAX_BYTES:
                raise ValueError(f"it has {size} bytes; at most {_MAX_BYTES} are taken")
            config = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{CONFIG_FILE} cannot be read: {what_is_there(path) or error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_FILE} is not a JSON object")
        return cls.of(config)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PeftConfig:
        """Make sense of the file's content. Raises ValueError."""
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {config.get('peft_type')!r}; only LORA is served")
        warnings = _check_known(config)
        if config.get("bias", "none") not in _BIASES:
            raise ValueError(f"bias is {config['bias']!r}; PEFT knows {', '.join(_BIASES)}")
        if config.get("task_type") not in (None, *_TASKS):
            raise ValueError(f"task_type is {config['task_type']!r}; PEFT knows {', '.join(_TASKS)}")
        init = _initialisation(config)
        if init == "lora_ga":
            warnings.append("LoRA-GA's training changed the base model; as in PEFT, the base is taken as it is")
        layers, layers_patterns = _layers(config)
        rank, alpha = config.get("r", _DEFAULT), config.get("lora_alpha", _DEFAULT)
        if not _is_rank(rank):
            raise ValueError(f"r is {rank!r}; it must be a positive integer")
        if not _is_number(alpha):
            raise ValueError(f"lora_alpha is {alpha!r}; it must be a finite number")
        return cls(
            base_model=str(config.get("base_model_name_or_path") or ""),
            targets=_targets(config),
            excluded=_names(config, "exclude_modules"),
            layers=layers,
            layers_patterns=layers_patterns,
            whole=_list(config, "modules_to_save"),
            rank=rank,
            alpha=alpha,
            rank_pattern=_patterns(config, "rank_pattern", _is_rank),
            alpha_pattern=_patterns(config, "alpha_pattern", _is_number),
            rslora=bool(config.get("use_rslora")),
            even_ranks=init == "orthogonal",
            zero_init=bool(init),
            warnings=tuple(warnings),
        )

    def targeted(self, modules: Sequence[str]) -> set[str]:
        """Which of these paths (`model.layers.0.self_attn.q_proj`) PEFT adapts (its `check_target_module_exists`).

        Raises:
            ValueError: an expression is none, or takes too long to match.
        """
        found = _matching("target_modules", self.targets, modules)
        if self.layers is not None and found:
            # PEFT looks at the layer of those alone that it does not find by their whole path.
            layers, named = frozenset(self.layers), frozenset(self.targets)
            within = {module for module, layer in self._layers_of(modules).items() if layer in layers}
            found = {module for module in found if module in within or module in named}
        found -= _matching("exclude_modules", self.excluded, modules)
        # PEFT reads the names of modules that are saved whole as expressions, but here alone.
        saved = _first("modules_to_save", self.whole, modules, template=r"(^|.*\.){}($|\..*)")
        return {module for module in found if module not in saved}

    def _layers_of(self, modules: Sequence[str]) -> dict[str, int]:
        if self.layers_patterns:
            template = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
            matches = _first("layers_pattern", self.layers_patterns, modules, template=template)
            return {module: int(match.groups["idx"] or -1) for module, match in matches.items()}
        return {module: int(match["idx"]) for module in modules if (match := _LAYER.match(module))}

    def ranks(self, modules: Sequence[str]) -> dict[str, int]:
        """Of each module. Raises ValueError as `targeted`."""
        return _by_pattern("rank_pattern", self.rank_pattern, self.rank, modules)

    def scalings(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv 2312.03732), of each module by its rank.

        Raises:
            ValueError: as `targeted`.
        """
        alphas = _by_pattern("alpha_pattern", self.alpha_pattern, self.alpha, list(ranks))
        return {module: alphas[module] / (math.sqrt(rank) if self.rslora else rank) for module, rank in ranks.items()}


def _check_known(config: Mapping[str, Any]) -> list[str]:
    """Refuse what changes the computation; returns warnings of what nobody knows."""
    for setting, why in _NOT_SERVED.items():
        # An empty object of sub-settings switches its method on, with defaults.
        if config.get(setting) not in (None, False, []):
            raise ValueError(f"{CONFIG_FILE} has {setting}, which is not served: {why}")
    for setting in _SUBCONFIGS:
        if not isinstance(config.get(setting), dict | None):
            raise ValueError(f"{setting} is {config[setting]!r}; it must be an object")
    variants = [name for name in _VARIANTS if config.get(name) is not None]
    if len(variants) + (config.get("init_lora_weights") == "mica") > 1:
        raise ValueError(f"{CONFIG_FILE} joins {' and '.join(variants)} with another variant of LoRA; PEFT takes one")
    unknown = sorted(key for key, value in config.items() if value and key not in {*_READ, *_OF_TRAINING, *_NOT_SERVED})
    if not unknown:
        return []
    version = config.get("peft_version")  # PEFT has written it since 0.17, so that a file without it is older
    number = re.match(r"([0-9]+)\.([0-9]+)", str(version))
    if version is not None and (number is None or (int(number[1]), int(number[2])) > _NEWEST_PEFT):
        raise ValueError(
            f"{CONFIG_FILE} is of PEFT {version} and uses {', '.join(unknown)}, which is not served: known are the "
            f"settings up to PEFT {'.'.join(map(str, _NEWEST_PEFT))}; take out of the file what changes nothing"
        )
    return [f"{CONFIG_FILE} has {', '.join(unknown)}, which PEFT does not know and ignores"]


def _initialisation(config: Mapping[str, Any]) -> str:
    """How the tensors began, in lower case; "" is at random, and "default" with zero for B. Raises ValueError."""
    init = config.get("init_lora_weights", True)
    if init is True:
        return "default"
    if not init:
        return ""
    name = init.lower() if isinstance(init, str) else ""
    if name.startswith(_BASE_CHANGING_INITS):
        raise ValueError(
            f"init_lora_weights is {init!r}, which changes the base weights; convert the adapter to a plain LoRA when "
            "saving it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if name not in _ZERO_INITS:
        raise ValueError(f"init_lora_weights is {init!r}, which PEFT does not know")
    return name


def _targets(config: Mapping[str, Any]) -> tuple[str, ...] | str:
    if config.get("target_modules") is None:
        return _DEFAULT_TARGETS
    targets = _names(config, "target_modules")
    if isinstance(targets, str):
        for setting in ("layers_to_transform", "layers_pattern"):
            if config.get(setting) is not None:
                raise ValueError(f"{setting} is set, and target_modules is a string; PEFT loads only one of them")
        if targets.lower() == "all-linear":
            return TARGETS  # all that are in a layer; the output layer, which is linear too, is none of PEFT's
    return targets


def _layers(config: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not _is_list(patterns, str):
        raise ValueError(f"layers_pattern is {patterns!r}; it must be a string or a list of strings")
    if patterns and layers is None:
        raise ValueError("layers_pattern is set without layers_to_transform; PEFT loads no such adapter")
    layers = [layers] if isinstance(layers, int) else layers or None
    if layers is not None and not _is_list(layers, int):
        raise ValueError(f"layers_to_transform is {layers!r}; it must be a layer's number or a list of them")
    return None if layers is None else tuple(layers), tuple(patterns)


def _names(config: Mapping[str, Any], setting: str) -> tuple[str, ...] | str:
    value = config.get(setting)
    return value if isinstance(value, str) else _list(config, setting)


def _list(config: Mapping[str, Any], setting: str) -> tuple[str, ...]:
    value = config.get(setting) or []
    if not _is_list(value, str):
        raise ValueError(f"{setting} is {value!r}; it must be a list of modules' names")
    return tuple(value)


def _patterns(config: Mapping[str, Any], setting: str, is_valid: Any) -> dict[str, Any]:
    patterns = config.get(setting) or {}
    if not isinstance(patterns, dict) or not all(map(is_valid, patterns.values())):
        raise ValueError(f"{setting} is {patterns!r}; it must map modules to numbers as r and lora_alpha are")
    return patterns


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1e9


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # NaN compares as False


def _matching(setting: str, names: tuple[str, ...] | str, modules: Sequence[str]) -> set[str]:
    if isinstance(names, str):
        return set(_first(setting, [names] if names else [], modules, whole=True))
    known, lengths = frozenset(names), {len(name) for name in names}  # a file may name as many as it has room for

    def is_named(module: str) -> bool:
        starts = (len(module) - length for length in lengths)
        return module in known or any(i > 0 and module[i - 1] == "." and module[i:] in known for i in starts)

    return set(filter(is_named, modules))


def _first(setting: str, patterns: Iterable[str], modules: Sequence[str], **how: Any) -> dict[str, Any]:
    """The modules that an expression matches, each with the first match."""
    try:
        found = first_matches(list(patterns), modules, **how)
    except PatternError as error:
        raise ValueError(f"{setting}: {error}") from error
    return {module: match for module, match in zip(modules, found, strict=True) if match is not None}


def _by_pattern(setting: str, patterns: Mapping[str, Any], default: Any, modules: Sequence[str]) -> dict[str, Any]:
    """Each module's value by PEFT's `get_pattern_key`: the first pattern that matches the path's end says it."""
    first = _first(setting, patterns, modules, template=r"(.*\.)?({})$")
    values = list(patterns.values())
    return {module: values[first[module].pattern] if module in first else default for module in modules}
