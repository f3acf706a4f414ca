"""What goes to a device and comes back, without a GPU: what is asked of CUDA, in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorauter.cuda_graphs import landed, uploaded


def test_on_a_cpu_values_are_copied_as_they_are() -> None:
    to = torch.zeros(2, dtype=torch.long)
    uploaded(torch.tensor([1, 2]), to)
    assert to.tolist() == [1, 2] and landed(to).tolist() == [1, 2]


def test_who_waits_for_a_gpu_sleeps_until_its_copy_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking

        def record(self) -> None:
            done.append("recorded")

        def synchronize(self) -> None:
            done.append("waited")

    class Pinned:
        def copy_(self, found: Any, *, non_blocking: bool) -> None:
            assert non_blocking
            done.append(f"copied {found.shape}")

    pinned = Pinned()

    def empty(shape: Any, *, dtype: Any, pin_memory: bool) -> Pinned:
        assert (shape, dtype, pin_memory) == ((2, 3), torch.float32, True)
        return pinned

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    found: Any = SimpleNamespace(is_cuda=True, shape=(2, 3), dtype=torch.float32)
    came: Any = landed(found)
    assert came is pinned
    assert done == ["copied (2, 3)", "recorded", "waited"]
    to: Any = SimpleNamespace(is_cuda=True, copy_=lambda values, non_blocking: done.append(f"{values} {non_blocking}"))
    values: Any = SimpleNamespace(pin_memory=lambda: "pinned")
    uploaded(values, to)
    assert done[3:] == ["pinned True"]
