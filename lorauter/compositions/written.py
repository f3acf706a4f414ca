"""A composition as an ordinary PEFT adapter, with what it was made of in its weights' file.

What PEFT reads is what it would read of any adapter; the provenance is text beside the tensors, which PEFT leaves alone
and `lorauter.adapters` shows. Knows nothing of how weights are fitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorauter.adapters.peft_config import CONFIG_FILE
from lorauter.adapters.provenance import PROVENANCE
from lorauter.adapters.weights import WEIGHTS_FILE

if TYPE_CHECKING:
    import torch

    from lorauter.compositions.cut import Cut


@dataclass(frozen=True)
class Source:
    """An adapter that a composition was made of, with its weight in each layer: a number, or one for each target, which
    is the mean over its ranks where these have weights of their own.
    """

    name: str
    version: str
    weights: tuple[float, ...] | tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class CompositionProvenance:
    """What a composition was made of, and what it was found to be worth.

    Attributes:
        task: that it was made for.
        base_model: digest of the base model.
        examples: digest of the task's metric and examples.
        sources: those of a weight other than 0.
        targets: the linear layers, in the order of a source's weights.
        settings: of the fit and the cut.
        score_before: mean log-likelihood of the examples' targets under the mixtures that the router gave them.
        score_after: the same under weights that had not seen them.
        error: standard error of the difference.
        right_before, right_after: the share of the examples that came out right, under the same weights.
        exact: whether an example came out right as a whole or not at all; else so much of it as tokens did.
        energy: share of the mixture's squared singular values that the rank keeps.
        rank: the largest.
        step: of the fit.
    """

    task: str
    base_model: str
    examples: str
    sources: tuple[Source, ...]
    targets: tuple[str, ...]
    settings: Mapping[str, Any]
    score_before: float
    score_after: float
    error: float
    right_before: float
    right_after: float
    exact: bool
    energy: float
    rank: int
    step: int
    history: tuple[float, ...] = field(default=())

    @property
    def gain(self) -> float:
        """By how much the score is better."""
        return self.score_after - self.score_before

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompositionProvenance:
        """Raises KeyError or TypeError where it is none."""
        sources = tuple(Source(row["name"], row["version"], tuple(row["weights"])) for row in data["sources"])
        return cls(**{**data, "sources": sources, "targets": tuple(data["targets"]), "history": tuple(data["history"])})


def write_adapter(
    folder: Path, cut: Cut, provenance: CompositionProvenance | None, *, base_model: str, dtype: torch.dtype
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        base_model: `base_model_name_or_path`.
        dtype: of the tensors.
    """
    from safetensors.torch import save_file

    from lorauter.adapters.tensors import PREFIX, module_of

    ranks: dict[str, int] = {}
    tensors = {}
    for (layer, target), (a, b) in sorted(cut.pairs.items()):
        ranks[target] = a.shape[0]
        tensors[f"{PREFIX}{module_of(layer, target)}.lora_A.weight"] = a.to(dtype).contiguous()
        tensors[f"{PREFIX}{module_of(layer, target)}.lora_B.weight"] = b.to(dtype).contiguous()
    largest = max(ranks.values())
    others = {target: rank for target, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": largest,
        "lora_alpha": largest,  # the weights are in B, and nothing is to be scaled
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    metadata = {"format": "pt"}
    if provenance is not None:
        metadata[PROVENANCE] = json.dumps(provenance.to_json(), sort_keys=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
