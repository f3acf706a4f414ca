"""benchmarks/engine.py gpu on the smallest model, without a GPU: whatever it asks of an engine is there."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import engine_common
import engine_gpu
import pytest
import torch

SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("zipf", "figures"),
    [
        (0, ["batch 128, K = 3 of base", "batch 32, 256 resident, base of base with none"]),
        (8, ["three kinds of target sets of the harmonic mean"]),
    ],
)
def test_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], zipf: int, figures: list[str]
) -> None:
    monkeypatch.setitem(engine_common.SHAPES, "135M", SHAPE)
    model = engine_common.random_model("135M", "cpu", torch.float32)
    make, engine = engine_common.random_requests, engine_common.gpu_engine

    def few(count: int, prompt: int, new: int, *others: Any) -> Any:
        return make(min(count, 4), 4, 2, *others)

    monkeypatch.setattr(engine_gpu, "random_model", lambda *_: model)
    monkeypatch.setattr(engine_gpu, "random_requests", few)
    monkeypatch.setattr(engine_gpu, "gpu_engine", lambda *given, **named: engine(*given, **named | {"max_batch": 4}))
    monkeypatch.setattr(engine_gpu, "CACHE_BYTES", {"135M": 1 << 20})
    monkeypatch.setattr(engine_gpu, "ADAPTER_BYTES", {"135M": 8 << 20})
    monkeypatch.setattr(engine_gpu, "zipf", lambda *_: None)  # it takes as long as its answers are long
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    engine_gpu.gpu(Namespace(shape="135M", zipf=zipf, long=0, peers=False, profile=False, repeats=1))
    told = capsys.readouterr().out
    assert all(figure in told for figure in figures)
