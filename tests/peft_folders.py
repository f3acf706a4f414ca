"""Folders as PEFT saves them, over tiny base models, and what PEFT and the engine make of them."""

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorauter.adapters.weights import CONFIG_FILE, TARGETS, WEIGHTS_FILE, LoraWeights, ModelShape
from lorauter.engine import EngineConfig, GenerationRequest, MultiLoraEngine, SamplingParams, load_engine
from lorauter.errors import AdapterRejected

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
}
LINEARS = {
    "q_proj": (16, 16),
    "k_proj": (16, 8),
    "v_proj": (16, 8),
    "o_proj": (16, 16),
    "gate_proj": (16, 24),
    "up_proj": (16, 24),
    "down_proj": (24, 16),
}
PREFIX = "base_model.model."
PROMPT = (3, 1, 4, 15, 9, 2, 6)
NEW_TOKENS = 6
Tensors = dict[str, torch.Tensor]


@dataclass
class Base:
    """A base model, on the disk and in memory, and an engine on it."""

    model: Any
    folder: Path
    engine: MultiLoraEngine

    @property
    def shape(self) -> ModelShape:
        return ModelShape((str(self.folder), "org/tiny"), 2, LINEARS)


def make_base(model: Any, folder: Path) -> Base:
    for key, parameter in model.named_parameters():
        # Large enough that every layer shows in the logits.
        torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.3)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(SIZES["vocab_size"])}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    config = EngineConfig(max_batch=2, adapter_bytes=1 << 20, device="cpu", dtype="float32", threads=1)
    return Base(model.eval(), folder, load_engine(str(folder), config, aliases=("org/tiny",)))


def pairs(*targets: str, layers=(0, 1), rank: int = 4, infix: str = "", prefix: str = f"{PREFIX}model.") -> Tensors:
    """LoRA tensors of these modules."""
    draw = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in layers:
        for target in targets or ("q_proj", "v_proj"):
            block = "self_attn" if target in TARGETS[:4] else "mlp"
            n_in, n_out = LINEARS[target]
            path = f"{prefix}layers.{layer}.{block}.{target}"
            tensors[f"{path}.lora_A{infix}.weight"] = torch.randn(rank, n_in, generator=draw) * 0.3
            tensors[f"{path}.lora_B{infix}.weight"] = torch.randn(n_out, rank, generator=draw) * 0.3
    return tensors


def loud(tensors: Tensors, *parts: str) -> Tensors:
    """Tensors that must have no effect, made so large that they would show."""
    return {key: value * (20 if all(part in key for part in parts) else 1) for key, value in tensors.items()}


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        **config,
    }
    (folder / CONFIG_FILE).write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def peft(base: Base, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says what it ignores
        return PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


def merged(base: Base, weights: LoraWeights) -> Any:
    """The base model with W + B A in place of W."""
    model = copy.deepcopy(base.model)
    for (layer, target), (a, b) in weights.tensors.items():
        block = "self_attn" if target in TARGETS[:4] else "mlp"
        with torch.no_grad():
            model.get_submodule(f"model.layers.{layer}.{block}.{target}").weight += b.float() @ a.float()
    return model


def load(base: Base, folder: Path) -> tuple[LoraWeights, tuple[str, ...]]:
    weights = LoraWeights.load(folder, name=folder.name, version=str(folder))  # the engine keeps what it has packed
    return weights, (*weights.warnings, *weights.check_fits(base.shape, max_rank=16))


def assert_served(base: Base, folder: Path) -> tuple[str, ...]:
    """The engine computes what PEFT computes; returns the warnings."""
    weights, told = load(base, folder)
    reference = peft(base, folder)
    torch.testing.assert_close(logits(merged(base, weights)), logits(reference), atol=1e-4, rtol=1e-4)
    request = GenerationRequest(PROMPT, ((weights, 1.0),), SamplingParams(max_tokens=NEW_TOKENS))
    [answer] = base.engine.generate([request])
    with torch.inference_mode():
        ids = reference.generate(
            input_ids=torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT)),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    assert answer.token_ids == tuple(ids[0, len(PROMPT) :].tolist())
    return told


def assert_refused(base: Base, folder: Path, said: str) -> None:
    with pytest.raises(AdapterRejected, match=said) as caught:
        load(base, folder)
    assert caught.value.adapter == folder.name
