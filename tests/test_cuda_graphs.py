"""What goes to a device and comes back, without a GPU: what is asked of CUDA, in which order."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from lorauter.cuda_graphs import Landing, landed


def test_on_a_cpu_what_lands_is_a_copy() -> None:
    found = torch.tensor([[1, 2], [3, 4], [5, 6]])
    landing = Landing(found)
    first = landing.landed(found[:2])
    assert landing.landed(found).tolist() == found.tolist()
    assert first.tolist() == [[1, 2], [3, 4]] and landed(found) is found


class Event:
    """One of CUDA's, that notes what is asked of it."""

    done: ClassVar[list[str]] = []

    def __init__(self, *, blocking: bool) -> None:
        assert blocking
        self.done.append("made")

    def record(self) -> None:
        self.done.append("recorded")

    def synchronize(self) -> None:
        self.done.append("waited")


class Pinned:
    """Memory of the host."""

    def __getitem__(self, _: slice) -> Pinned:
        return self

    def copy_(self, found: Any, *, non_blocking: bool) -> None:
        assert non_blocking
        Event.done.append(f"copied {found.shape}")

    def clone(self) -> str:
        Event.done.append("cloned")
        return "a copy"


class Found:
    """What a GPU has computed."""

    is_cuda, shape, dtype = True, (2, 3), torch.float32

    def __len__(self) -> int:
        return 2


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Pinned:
    one = Pinned()

    def empty(shape: Any, *, dtype: Any, pin_memory: bool) -> Pinned:
        assert (shape, dtype, pin_memory) == ((2, 3), torch.float32, True)
        return one

    Event.done.clear()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    return one


def test_who_waits_for_a_gpu_sleeps_until_its_copy_is_there(pinned: Pinned) -> None:
    found: Any = Found()
    came: Any = landed(found)
    assert came is pinned
    assert Event.done == ["copied (2, 3)", "made", "recorded", "waited"]


def test_what_lands_again_and_again_has_one_place_and_one_event(pinned: Pinned) -> None:
    found: Any = Found()
    landing = Landing(found)
    assert [landing.landed(found), landing.landed(found)] == ["a copy"] * 2
    assert Event.done == ["made", *["copied (2, 3)", "recorded", "waited", "cloned"] * 2]
