"""CUDA's graphs without a GPU: they are recorded, and repeating one does nothing."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch


def stand_in_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = SimpleNamespace(capture_begin=lambda *_, **__: None, capture_end=lambda: None, replay=lambda: None)
    stream = SimpleNamespace(synchronize=lambda: None)
    for name, value in {
        "CUDAGraph": lambda: graph,
        "Stream": lambda _: stream,
        "stream": lambda _: nullcontext(),
        "graph_pool_handle": lambda: None,
        "synchronize": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
