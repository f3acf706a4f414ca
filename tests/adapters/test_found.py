"""Adapters as they were found: each is served as PEFT computes it, or refused in the words that it deserves."""

import runpy
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from lorauter.adapters.weights import LoraWeights, ModelShape
from lorauter.errors import AdapterRejected

CASES = Path(__file__).with_name("cases")
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def smol() -> LlamaForCausalLM:
    """SmolLM2-135M's shapes, without the vocabulary."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def made(case: str, tmp_path: Path) -> Path:
    runpy.run_path(str(CASES / "make_weights.py"))["main"](CASES / case, tmp_path / case)
    return tmp_path / case


def shape_of(model: LlamaForCausalLM) -> ModelShape:
    first = model.model.layers[0]
    linears = {**dict(first.self_attn.named_children()), **dict(first.mlp.named_children())}
    sizes = {n: (m.in_features, m.out_features) for n, m in linears.items() if isinstance(m, torch.nn.Linear)}
    return ModelShape((NAME,), len(model.model.layers), sizes)


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("R31", None),
        ("R39", None),
        ("T02", None),
        ("T03", None),
        ("T23", "competition_metadata"),
        ("default-infix", None),
        ("extra-layers", "modules that the configuration leaves out"),
        ("extra-module", "modules that the configuration leaves out"),
        ("half-missing", "no tensors for 22 of the 60 modules"),
        ("hfcache", None),
    ],
)
def test_it_is_served_as_peft_computes_it(smol, tmp_path, case, told) -> None:
    folder = made(case, tmp_path)
    weights = LoraWeights.load(folder, name=case, version="1")
    warned = (*weights.warnings, *weights.check_fits(shape_of(smol), max_rank=64))
    assert (told in " ".join(warned)) if told else not warned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(smol, folder)
    adapted = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert adapted
    for name, module in adapted.items():
        expected, (_, _, layer, _, target) = module.get_delta_weight("default"), name.split(".")
        a, b = weights.tensors.get((int(layer), target), (torch.zeros(1, 1), torch.zeros(1, 1)))
        torch.testing.assert_close((b.float() @ a.float()).expand_as(expected), expected)
    assert len(weights.tensors) <= len(adapted)
    model.unload()


def test_a_git_lfs_pointer_is_refused(tmp_path) -> None:
    with pytest.raises(AdapterRejected, match="it is a Git LFS pointer"):
        LoraWeights.load(made("lfs-weights", tmp_path), name="x", version="1")
