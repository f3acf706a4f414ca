"""The policy in a simulated cluster beside Serve's own choice; `benchmarks/placement.py` is the long version."""

from __future__ import annotations

from placement import LOAD_S, Ours, Policy, Seen, Shape, simulate


def both(shape: Shape, load: float, seconds: float) -> tuple[Seen, Seen]:
    return simulate(shape, Policy, load, seconds, seed=0), simulate(shape, Ours, load, seconds, seed=0)


def test_adapters_are_found_where_requests_go_and_the_load_is_spread() -> None:
    room = {"device": 64, "host": 128, "disk": 512}
    shape = Shape(24, 3000, 16, 24, 64, lambda n: 0.008 + 0.0002 * n, room, LOAD_S, mix=0.3)
    serves, ours = (seen.figures() for seen in both(shape, 0.6, 16))
    assert ours["adapters found on the device"] > 1.5 * serves["adapters found on the device"]
    assert ours["device copies of an adapter, mean"] < 0.7 * serves["device copies of an adapter, mean"]
    assert ours["busiest replica's requests over the mean"] < 1.5
    assert ours["p99, s"] < 1.1 * serves["p99, s"]
    assert ours["refused, %"] == 0


def test_of_three_replicas_that_refuse_none_does_while_another_is_idle() -> None:
    """At 60 % of what they sustain; each takes six requests at once, by its pace."""
    room = {"device": 40, "host": 80, "disk": 200}
    shape = Shape(3, 200, 16, 6, 64, lambda n: 0.02 * (1 + n / 4), room, {}, mix=0.0)
    serves, ours = both(shape, 0.6, 1500)
    assert serves.refused > 30
    assert serves.refused_beside_idle > 10
    assert ours.refused_beside_idle == 0
    assert ours.refused < 0.01 * ours.requests
