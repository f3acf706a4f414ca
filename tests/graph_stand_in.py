"""CUDA's graphs without a GPU: they are recorded, and repeating one does nothing, or computes anew."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorauter.cuda_graphs import GraphRecorder, Recorded


def stand_in_for_graphs(monkeypatch: pytest.MonkeyPatch, *, compute: bool = False) -> None:
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
    if compute:
        monkeypatch.setattr(GraphRecorder, "record", _recorded)


def _recorded(_: GraphRecorder, compute: Any) -> Recorded:
    found = compute()
    graph: Any = SimpleNamespace(replay=lambda: found.copy_(compute()))
    return Recorded(graph, found, compute)
