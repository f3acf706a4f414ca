from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from deployments.warmup import warm_up
from lorauter.errors import AdapterNotFound


@dataclass
class Packed:
    name: str
    nbytes: int = 10

    @property
    def key(self) -> tuple[str, str]:
        return self.name, "v1"


class Tiers:
    """Loads what does not begin with "no", and keeps what was placed, with how many were under way at once."""

    def __init__(self, *, wait_s: float = 0.0) -> None:
        self.placed: list[str] = []
        self.under_way = self.most = 0
        self._wait_s = wait_s

    async def load(self, name: str) -> Packed:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self._wait_s)
        self.under_way -= 1
        if name.startswith("no"):
            raise AdapterNotFound("gone", adapter=name)
        return Packed(name, 30 if name == "large" else 10)

    async def place(self, packed: Packed) -> None:
        self.placed.append(packed.name)

    def warm(self, *names: str, room_bytes: int = 1000, at_once: int = 2, limit_s: float = 5.0) -> list[str]:
        return asyncio.run(
            warm_up(names, self.load, self.place, room_bytes=room_bytes, at_once=at_once, limit_s=limit_s)
        )


def test_what_is_wanted_is_placed_and_what_is_gone_is_passed_over() -> None:
    tiers = Tiers()
    assert tiers.warm("a", "nowhere", "b", "c") == tiers.placed == ["a", "b", "c"]
    assert tiers.most == 2
    assert Tiers().warm() == []


def test_bytes_bound_it_from_the_most_wanted_on() -> None:
    assert Tiers().warm("a", "large", "b", "c", "d", room_bytes=30, at_once=1) == ["a", "b", "c"]
    assert Tiers().warm("a", room_bytes=5) == []


def test_time_bounds_it() -> None:
    assert Tiers(wait_s=0.1).warm("a", "b", "c", "d", at_once=1, limit_s=0.25) == ["a", "b"]


def test_other_failures_are_the_callers_to_handle() -> None:
    class Broken(Tiers):
        async def place(self, packed: Packed) -> None:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="memory"):
        Broken().warm("a")
