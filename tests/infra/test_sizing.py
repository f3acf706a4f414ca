"""docs/sizing.md: its formulas give what the engine allocates, and its tables are what the script prints."""

from __future__ import annotations

import runpy
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lorauter.adapters.weights import LoraWeights, ModelShape
from lorauter.engine.blocks import BLOCK, blocks_of
from lorauter.engine.paged_cache import PagedCache
from lorauter.engine.sequences import ActiveSequence
from lorauter.engine.slots import SLOTS, AdapterSlots, PackedAdapter

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sizing() -> Any:
    """benchmarks/sizing.py, loaded."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "sizing.py"), run_name="sizing"))


@pytest.fixture
def tiny(sizing: Any) -> Any:
    """A shape whose sizes all differ."""
    return sizing.Model("tiny", 3, 24, 40, 4, 2, 6, 50, tied=False)


def holder(packed: PackedAdapter) -> ActiveSequence:
    return ActiveSequence(array("i", [1]), 1, 2, ((packed.key, 1.0),), adapters=[packed])


def adapter(model: Any, rank: int, targets: tuple[str, ...], layers: int) -> LoraWeights:
    tensors = {
        (layer, target): (torch.ones(rank, model.linears[target][0]), torch.ones(model.linears[target][1], rank))
        for layer in range(layers)
        for target in targets
    }
    return LoraWeights("some", "1" * 8, "", tensors)


@pytest.mark.parametrize(("rank", "targets", "layers"), [(5, "ATTENTION", 3), (16, "ALL", 3), (1, "ALL", 1)])
def test_an_adapter_takes_what_the_formula_says(sizing: Any, tiny: Any, rank: int, targets: str, layers: int) -> None:
    names = getattr(sizing, targets)
    expected = sizing.adapter_bytes(tiny, rank, names)
    slots = AdapterSlots(
        ModelShape((), tiny.layers, tiny.linears), budget_bytes=1 << 20, max_rank=16, dtype=torch.bfloat16, device=CPU
    )
    packed = slots.pack(adapter(tiny, rank, names, layers))
    assert expected <= packed.nbytes < expected + 16 * 2 * len(names)
    assert slots.acquire(holder(packed))
    assert expected <= slots.used_bytes < expected + 128


def test_slots_are_budget_over_adapter(sizing: Any, tiny: Any) -> None:
    one = sizing.adapter_bytes(tiny, 4)
    budget = 7 * (one + 128) + one // 2
    slots = AdapterSlots(
        ModelShape((), tiny.layers, tiny.linears), budget_bytes=budget, max_rank=4, dtype=torch.bfloat16, device=CPU
    )
    for i in range(10):
        weights = adapter(tiny, 4, sizing.ATTENTION, 3)
        packed = slots.pack(LoraWeights(f"a{i}", "1" * 8, "", weights.tensors))
        sequence = holder(packed)
        assert slots.acquire(sequence)
        slots.release(sequence)
        assert slots.used_bytes <= slots.arena.nbytes <= budget
    assert len(slots.resident) == sizing.slots(budget, one) == 7
    assert f"{SLOTS:,} at most" in (ROOT / "docs" / "sizing.md").read_text()


@pytest.mark.parametrize("positions", [BLOCK, 100])
def test_the_cache_takes_what_the_formula_says(sizing: Any, tiny: Any, positions: int) -> None:
    shape = {"layers": tiny.layers, "kv_heads": tiny.kv_heads, "head_dim": tiny.head_dim, "dtype": torch.bfloat16}
    cache = PagedCache(**shape, blocks=blocks_of(positions), device=CPU)
    assert cache.keys.nbytes + cache.values.nbytes == sizing.kv_bytes(tiny, positions)
    assert sizing.kv_bytes(tiny, positions) == (blocks_of(positions) + 1) * PagedCache.block_bytes(**shape)


@pytest.mark.parametrize("shape", ["EIGHT_B", "SMOL"])
def test_a_model_takes_what_the_formula_says(sizing: Any, shape: str) -> None:
    model = getattr(sizing, shape)
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        tie_word_embeddings=model.tied,
    )
    assert config.head_dim == model.head_dim
    with torch.device("meta"):
        source = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(p.nbytes for p in source.parameters()) == sizing.weight_bytes(model)


def test_replicas_grow_with_the_load(sizing: Any) -> None:
    assert sizing.replicas(0.001, 128, 4000) == 1
    assert sizing.replicas(100, 128, 4000) == 5  # 12,800 tokens/s over 2,800
    assert sizing.concurrency(10, 128, 4000, 32) == pytest.approx(10.24)


def test_zipf_share(sizing: Any) -> None:
    assert sizing.zipf_share(10, 10) == 1
    assert sizing.zipf_share(1, 3) == pytest.approx(6 / 11)


def test_the_page_has_the_tables_of_the_script(sizing: Any) -> None:
    page = (ROOT / "docs" / "sizing.md").read_text()
    for name, table in sizing.tables().items():
        assert table in page, f"{name}: run benchmarks/sizing.py and put its tables into docs/sizing.md"


def test_the_page_uses_the_figures_of_what_was_measured(sizing: Any) -> None:
    measured = (ROOT / "docs" / "figures.md").read_text()
    for figure in ("3,861", "9,451", "54,702", "326"):
        assert figure in measured
