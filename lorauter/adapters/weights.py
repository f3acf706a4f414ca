"""A PEFT LoRA adapter in host memory, and whether it fits a base model.

Read from `adapter_config.json` (`lorauter.adapters.peft_config`) and `adapter_model.safetensors`
(`lorauter.adapters.tensors`; never pickles): what PEFT loads and computes as plain LoRA is taken as PEFT computes it,
and all else is refused, by the adapter's name and with the reason. Knows nothing of where the files came from, nor of
batches and devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorauter.adapters.foreign import WEIGHTS_FILE
from lorauter.adapters.peft_config import CONFIG_FILE, TARGETS, PeftConfig
from lorauter.adapters.tensors import NOT_IN_LAYERS, module_of, read_tensors
from lorauter.errors import AdapterRejected
from lorauter.uris import called

if TYPE_CHECKING:
    import torch

    from lorauter.adapters.base_weights import Fingerprint

__all__ = ["CONFIG_FILE", "TARGETS", "WEIGHTS_FILE", "LoadAdapter", "LoraWeights", "ModelShape"]


@dataclass(frozen=True)
class ModelShape:
    """What an adapter has to fit: the base model's names, layers and linear shapes.

    Attributes:
        names: names that `base_model_name_or_path` may have, the first of which is where the model is loaded from;
            compared as `model_name` gives them. Empty accepts any.
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
        config: what it was read by, if it was read.
        base: parameters of the base model that are in the file: they have to be the base's own.
        warnings: what is in the files and has no effect.
        provenance: what a composed adapter says that it was made of; see `lorauter.adapters.provenance`.
    """

    name: str
    version: str
    base_model: str
    tensors: Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    config: PeftConfig | None = None
    base: Mapping[str, Mapping[torch.dtype, Fingerprint]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None

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
            AdapterRejected: a file is missing or corrupt, or PEFT would not load it, or not compute it as plain LoRA
                in the layers that the engine adapts.
        """
        try:
            config = PeftConfig.read(directory / CONFIG_FILE)
            read = read_tensors(directory / WEIGHTS_FILE, config)
        except ValueError as error:
            raise AdapterRejected(str(error), adapter=name) from error
        warnings = (*config.warnings, *read.warnings)
        return cls(name, version, config.base_model, read.pairs, config, read.base, warnings, read.provenance)

    def check_fits(self, shape: ModelShape, *, max_rank: int) -> tuple[str, ...]:
        """Check that the adapter was made for a model of this name and shape.

        Returns:
            Warnings: what it lacks, and what of it this model ignores.

        Raises:
            AdapterRejected: it does not fit.
        """
        try:
            self._check_shape(shape, max_rank)
            return (*self._check_base(shape), *self._check_whole(shape))
        except ValueError as error:
            raise AdapterRejected(str(error), adapter=self.name) from error

    def _check_shape(self, shape: ModelShape, max_rank: int) -> None:
        known = {model_name(name) for name in shape.names}
        if known and self.base_model and model_name(self.base_model) not in known:
            raise ValueError(
                f"was trained for the base model {self.base_model!r}, but this one is {shape.names[0]!r}; "
                "if they are the same model, add the name to base_model_aliases"
            )
        if self.rank > max_rank:
            raise ValueError(f"has rank {self.rank}; the engine serves up to {max_rank}")
        for (layer, target), (a, b) in self.tensors.items():
            if layer >= shape.layers:
                raise ValueError(f"changes layer {layer}, but the base model has {shape.layers}")
            got = (a.shape[1], b.shape[0])
            if target not in shape.linears or shape.linears[target] != got:
                raise ValueError(
                    f"layer {layer} {target} maps {got[0]} to {got[1]} features, but the base model's maps "
                    f"{' to '.join(map(str, shape.linears.get(target, ('none',))))}"
                )

    def _check_base(self, shape: ModelShape) -> list[str]:
        """Parameters of the base model that came along must be its own, as PEFT would put them in their place."""
        unknown = []
        for parameter, fingerprints in self.base.items():
            from lorauter.adapters.base_weights import base_fingerprint

            try:
                if not shape.names:
                    raise LookupError("nobody says which base model this is")
                own = base_fingerprint(shape.names[0], parameter)
            except LookupError as error:
                raise ValueError(
                    f"brings {parameter} along, which cannot be compared with the base model's own: {error}; "
                    "save the adapter without it (save_pretrained with save_embedding_layers=False)"
                ) from error
            if own is None:
                unknown.append(parameter)
            elif fingerprints.get(own[0]) != own[1]:
                raise ValueError(
                    f"brings {parameter} along, changed from the base model's own; only LoRA is served, and no "
                    "parameters that were trained whole"
                )
        return [f"ignored, as in PEFT: {', '.join(unknown)}, which the base model does not have"] if unknown else []

    def _check_whole(self, shape: ModelShape) -> list[str]:
        """What the configuration names and the file lacks stays as it is, if PEFT does not draw it at random."""
        if self.config is None:
            return []
        places = {module_of(i, target): (i, target) for i in range(shape.layers) for target in shape.linears}
        named = self.config.targeted([*places, *NOT_IN_LAYERS])
        there = {module for module, place in places.items() if place in self.tensors}
        missing = sorted(named - there)
        if not missing:
            return []
        some = f"{len(missing)} of the {len(named)} modules that it names, such as {missing[0]}"
        if not self.config.zero_init:
            raise ValueError(f"lacks {some}: with init_lora_weights false PEFT draws those at random")
        return [f"has no tensors for {some}: they stay as the base model's"]


def model_name(name: str) -> str:
    """What a base model is called by, whatever folder it lies in, in lower case.

    The last part of a path (also of Windows, and of ModelScope, which writes dots as ___) or of a hub id; of a snapshot
    in the hub's cache (`models--org--name/snapshots/hash`) the model's.
    """
    name = called(name) if name.startswith("hf://") else name
    parts = name.replace("\\", "/").replace("___", ".").rstrip("/").lower().split("/")
    for below in range(min(3, len(parts))):  # parts behind it: none, "snapshots", or that and a hash
        stem = parts[-1 - below].removeprefix("models--")
        if stem not in ("", parts[-1 - below]) and (not below or parts[-below] == "snapshots"):
            return stem.rsplit("--", 1)[-1] or stem
    return parts[-1]


LoadAdapter = Callable[[str], LoraWeights]
"""Reads an adapter by its name. Raises AdapterError."""
