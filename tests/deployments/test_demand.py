from __future__ import annotations

import pytest

from deployments.demand import Demand


def test_counts_halve_with_time_and_the_most_wanted_come_first() -> None:
    demand = Demand(half_life_s=10)
    for _ in range(4):
        demand.note("old", 0.0)
    demand.note("new", 30.0)
    assert list(demand.top(2, 30.0)) == ["new", "old"]
    assert demand.top(2, 30.0)["old"] == pytest.approx(0.5)
    assert demand.top(1, 40.0) == {"new": pytest.approx(0.5)}
    demand.note("old", 30.0)
    assert list(demand.top(2, 30.0)) == ["old", "new"]
    assert demand.top(0, 30.0) == {}


def test_the_least_wanted_are_forgotten_when_there_are_too_many() -> None:
    demand = Demand(limit=4)
    for name in ("a", "b", "c", "d", "a", "b", "e"):
        demand.note(name, 0.0)
    assert set(demand.top(9, 0.0)) == {"a", "b"}
