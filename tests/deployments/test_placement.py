from __future__ import annotations

import pickle
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from deployments.placement import BEAT_S, RAMP_S, REPORTED, SENT_S, STALE_S, Placement, holdings, report

BATCH = 8
NAMES = ["r0", "r1", "r2"]


def holding(device: Sequence[str] = (), host: Sequence[str] = (), disk: Sequence[str] = ()) -> dict[str, object]:
    return report(device, host, disk, 0.0)


def placement(now: float = 0.0, **held: dict[str, object]) -> Placement:
    """A router that has heard of the replicas `held`, long ago enough that none is new."""
    found = Placement(batch=BATCH, seed=0)
    found.update(held or {name: holding() for name in NAMES}, now)
    return found


def idle(*names: str) -> dict[str, int]:
    return dict.fromkeys(names or NAMES, 0)


def later(start: float = 0.0) -> Callable[[], float]:
    """A clock whose every reading is so late that what was sent before is forgotten, and reports are not yet stale."""
    times = iter([start + SENT_S * i for i in range(1, int(STALE_S / SENT_S))])
    return lambda: next(times)


def test_the_nearest_tier_wins_among_equally_busy_replicas() -> None:
    chosen = placement(r0=holding(host=["a"]), r1=holding(device=["a"]), r2=holding(disk=["a"]))
    assert chosen.rank([("a", 1.0)], idle(), 1.0) == ["r1", "r0", "r2"]


def test_a_mixture_goes_where_its_heavier_adapters_are() -> None:
    for weights, winner in (((0.7, 0.3), "r0"), ((0.3, 0.7), "r1"), ((-0.7, 0.3), "r0")):
        chosen = placement(r0=holding(device=["a"]), r1=holding(device=["b"]))
        assert chosen.rank(list(zip("ab", weights, strict=True)), idle("r0", "r1"), 1.0)[0] == winner
    both = placement(r0=holding(device=["a"]), r1=holding(device=["b"]), r2=holding(device=["a", "b"]))
    assert both.rank([("a", 0.9), ("b", 0.1)], idle(), 1.0)[0] == "r2"
    assert placement().rank([("a", 0.0)], idle(), 1.0)[0] in NAMES


def test_a_long_queue_outweighs_a_resident_adapter_and_a_short_one_does_not() -> None:
    held = {"r0": holding(device=["a"]), "r1": holding(), "r2": holding()}
    assert placement(**held).rank([("a", 1.0)], {"r0": 2, "r1": 0, "r2": 0}, 1.0)[0] == "r0"
    assert placement(**held).rank([("a", 1.0)], {"r0": 3 * BATCH, "r1": 0, "r2": 0}, 1.0)[0] != "r0"


@pytest.mark.parametrize("other", [{}, {"disk": ["a"]}, {"host": ["a"]}])
@pytest.mark.parametrize("limit", [1, 2, 5, BATCH])
def test_who_would_be_refused_goes_to_an_idle_replica_wherever_its_adapter_is(
    limit: int, other: dict[str, Any]
) -> None:
    """The replica that holds it takes so many requests at once, by its pace, and refuses the next."""
    hot = report(["a"], [], [], 0.0, limit)
    for seed in range(20):
        chosen = Placement(batch=BATCH, seed=seed)
        chosen.update({"r0": hot, "r1": holding(**other)}, 0.0)
        assert chosen.rank([("a", 1.0)], {"r0": limit, "r1": 0}, 1.0)[0] == "r1"
        assert chosen.rank([("a", 1.0)], {"r0": 0, "r1": 0}, 1.0 + SENT_S)[0] == "r0"


def test_an_adapter_that_is_nowhere_has_one_home_for_every_router() -> None:
    homes = {}
    for name in (f"adapter-{i}" for i in range(300)):
        found = {Placement(batch=BATCH, seed=seed).rank([(name, 1.0)], idle(), 0.0)[0] for seed in range(4)}
        assert len(found) == 1
        homes[name] = found.pop()
    assert all(70 < count < 130 for count in Counter(homes.values()).values())
    moved = [name for name, home in homes.items() if placement().rank([(name, 1.0)], idle("r0", "r1"), 0.0)[0] != home]
    assert set(moved) == {name for name, home in homes.items() if home == "r2"}, "only the lost replica's move"


def test_a_burst_for_one_adapter_loads_it_on_one_replica_before_any_report() -> None:
    chosen = placement()
    queues = idle()
    for _ in range(BATCH // 2):
        queues[chosen.rank([("a", 1.0)], queues, 1.0)[0]] += 1
    assert sorted(queues.values()) == [0, 0, BATCH // 2]
    [home] = [name for name, queue in queues.items() if queue]
    elsewhere = {"r0": 1, "r1": 1, "r2": 1, home: 4}
    assert chosen.rank([("a", 1.0)], elsewhere, 1.1)[0] == home
    assert chosen.rank([("a", 1.0)], elsewhere, 2.0 + SENT_S)[0] != home, "what no report confirms is forgotten"


def test_a_hot_adapter_is_spread_and_then_kept_where_it_spread_to() -> None:
    chosen = placement()
    queues = idle()
    for _ in range(3 * BATCH):
        queues[chosen.rank([("hot", 1.0)], queues, 1.0)[0]] += 1
    assert min(queues.values()) >= BATCH // 2
    clock = later()
    chosen.update({name: holding(device=["hot"]) for name in NAMES}, 0.0)
    winners = Counter(chosen.rank([("hot", 1.0)], idle(), clock())[0] for _ in range(8))
    assert len(winners) > 1, "replicas that all hold it share it"


def test_no_herd_onto_a_new_replica() -> None:
    chosen = placement(**{name: holding(device=["a"]) for name in NAMES})
    busy = dict.fromkeys(NAMES, BATCH)
    now = 100.0
    chosen.update({name: holding(device=["a"]) | {"beat": 9} for name in NAMES} | {"new": holding(device=["a"])}, now)

    def share(age: float) -> float:
        return sum(chosen.rank([("a", 1.0)], {**busy, "new": 0}, now + age)[0] == "new" for _ in range(400)) / 400

    assert 0.1 < share(0.0) < 0.45, "as busy as the others are, at first"
    assert share(RAMP_S) == 1.0
    queues = {**busy, "new": 0}
    for _ in range(8):
        queues[chosen.rank([("a", 1.0)], queues, now + 0.5 * RAMP_S)[0]] += 1
    assert 3 <= queues["new"] <= BATCH + 1, "half way it is filled up to the others, not beyond"


def test_with_stale_information_it_is_the_less_busy_of_two_at_random() -> None:
    chosen = placement(**{"r0": holding(device=["a"]), "r1": holding(), "r2": holding()})
    busy = {"r0": 5, "r1": 1, "r2": 3}
    winners = Counter(chosen.rank([("a", 1.0)], busy, STALE_S + 1)[0] for _ in range(300))
    assert set(winners) == {"r1", "r2"}
    assert winners["r1"] > winners["r2"] > 0
    chosen.update({"r0": holding(device=["a"]), "r1": holding(), "r2": holding()}, STALE_S + 2)
    assert set(Counter(chosen.rank([("a", 1.0)], busy, STALE_S + 2)[0] for _ in range(99))) == {"r1", "r2"}, "no news"
    chosen.update({"r0": {**holding(device=["a"]), "beat": 7}, "r1": holding(), "r2": holding()}, STALE_S + 3)
    assert chosen.rank([("a", 1.0)], idle(), STALE_S + 4)[0] == "r0"


def test_one_silent_replica_is_not_believed_but_not_shunned() -> None:
    chosen = placement(**{"r0": holding(device=["a"]), "r1": holding(), "r2": holding()})
    chosen.update({"r0": holding(device=["a"]), "r1": holding(disk=["a"]), "r2": {**holding(), "beat": 1}}, STALE_S - 1)
    assert chosen.rank([("a", 1.0)], idle(), STALE_S + 1)[0] == "r1"
    others_full = {"r0": 0, "r1": 3 * BATCH, "r2": 3 * BATCH}
    assert "r0" in {chosen.rank([("b", 1.0)], others_full, STALE_S + 1)[0] for _ in range(9)}


def test_calls_without_adapters_go_to_the_less_busy_of_two() -> None:
    chosen = placement()
    for _ in range(50):
        ranked = chosen.rank([], {"r0": 9, "r1": 1, "r2": 5}, 1.0)
        assert len(ranked) == 2
        assert ranked[0] != "r0"
    assert chosen.rank([], {}, 1.0) == []
    assert chosen.rank([("a", 1.0)], {"only": 99}, 1.0) == ["only"]


def test_a_replica_that_has_gone_is_forgotten() -> None:
    chosen = placement(**{"r0": holding(device=["a"]), "r1": holding()})
    chosen.update({"r1": holding()}, 1.0)
    chosen.update({"r0": {}, "r1": holding()}, 2.0)
    winners = {chosen.rank([("b", 1.0), ("a", 0.1)], idle("r0", "r1"), 3.0 + SENT_S * i)[0] for i in range(5)}
    assert len(winners) == 1, "neither has anything: it is the home of the heavier one"
    chosen.update({"r0": holding(device=["b"]), "r1": holding(device=["a"])}, 4.0)
    assert chosen.rank([("a", 1.0)], idle("r0", "r1"), 4.0 + SENT_S)[0] == "r1"


def test_a_report_is_of_one_size_and_quiet_when_nothing_changes() -> None:
    sizes = set()
    for held in (0, 1, 10, 1000, 10_000):
        many = [f"adapter-{i}@{i:016x}" for i in range(held)]
        sizes.add(len(pickle.dumps(report(many, many, many, 1.0, 200, 0.3))))
    assert len(sizes) == 1, "what a replica sends a second does not grow with the adapters that it holds"
    assert sizes.pop() < 4096
    assert report(["a", "b"], [], [], 1.0, 8, 1.0) == report(["b", "a"], [], [], 2.0, 8, 1.05)
    assert report([], [], [], 0.0) != report([], [], [], BEAT_S)
    assert report(["a"], [], holdings(["b"]), 0.0) == report(["a"], [], ["b"], 0.0)


def test_of_many_adapters_the_most_recently_used_are_told_and_hardly_any_that_are_not_there() -> None:
    here = [f"here-{i}" for i in range(2 * REPORTED)]
    chosen = placement(r0=report(here, [], [], 0.0), r1=holding())

    def found(names: list[str]) -> float:
        """The share of them for which the busier replica is taken."""
        return sum(chosen.rank([(name, 1.0)], {"r0": 5, "r1": 0}, 1.0)[0] == "r0" for name in names) / len(names)

    assert found(here[REPORTED:]) == 1.0
    assert found(here[:REPORTED]) < 0.02
    assert found([f"elsewhere-{i}" for i in range(2000)]) < 0.005


def test_what_another_lorauter_reports_does_no_harm() -> None:
    """While a new one replaces it, replica by replica."""
    old = {"beat": 1, "limit": None, "device": ["a"], "host": [], "disk": b"short"}
    chosen = placement(r0=old, r1=holding(device=["a"]))
    assert chosen.rank([("a", 1.0)], idle("r0", "r1"), 1.0)[0] == "r1"


def test_a_slow_replica_gets_less_than_a_fast_one() -> None:
    chosen = placement(slow=report([], [], [], 0.0, None, 4.0), fast=report([], [], [], 0.0, None, 1.0))
    queues = idle("slow", "fast")
    for _ in range(40):
        queues[chosen.rank([], queues, 1.0)[0]] += 1
    assert 2.5 < queues["fast"] / queues["slow"] < 5
    unknown = placement(new=holding(), old=report([], [], [], 0.0, None, 4.0))
    assert {unknown.rank([], idle("new", "old"), 1.0)[0] for _ in range(30)} == {"new", "old"}


def test_who_has_refused_comes_last_and_the_next_has_it() -> None:
    chosen = placement(r0=holding(device=["a"]), r1=holding(), r2=holding())
    assert chosen.rank([("a", 1.0)], idle(), 1.0)[0] == "r0"
    again = chosen.rank([("a", 1.0)], idle(), 1.0, avoid=["r0"])
    assert again[0] != "r0"
    assert chosen.rank([("a", 1.0)], idle(), 1.0, avoid=["r0", again[0]])[0] not in ("r0", again[0])
    assert chosen.rank([("a", 1.0)], idle(), 1.0, avoid=NAMES)[0] in NAMES, "then somebody has to say it"
    assert chosen.rank([("a", 1.0)], idle(), 2.0 + SENT_S)[0] == "r0", "another request is another matter"


def test_a_refusal_is_remembered_of_its_replica_alone_and_for_a_while() -> None:
    chosen = placement(r0=holding(device=["a"]), r1=holding(device=["a"]), r2=holding())
    chosen.refused("r0", 5.0)
    assert {chosen.rank([("a", 1.0)], idle(), 4.0 + i / 100)[0] for i in range(50)} == {"r1"}
    assert not chosen.all_refuse(4.0)
    chosen.update({name: {**holding(device=["a"]), "beat": 3} for name in NAMES}, 4.6)
    assert "r0" not in {chosen.rank([("a", 1.0)], idle(), 4.7)[0] for i in range(50)}, "a report does not change that"
    for name in NAMES:
        chosen.refused(name, 8.0)
    chosen.refused("who has gone", 9.0)
    assert chosen.all_refuse(7.9)
    assert not chosen.all_refuse(8.0)
    assert not Placement(batch=BATCH).all_refuse(0.0), "who is not there refuses nobody"


def test_who_waits_goes_to_a_replica_that_has_a_row_to_spare() -> None:
    chosen = placement()
    chosen.look = lambda: queues
    chosen.took(1, "r0")
    queues = {"r0": BATCH + 3, "r1": BATCH, "r2": BATCH - 1}
    assert set(chosen.elsewhere(1, 1.0)) == {"r0", "r1"}, "who has no row to spare is avoided"
    queues = {"r0": BATCH, "r1": 0, "r2": 0}
    assert chosen.elsewhere(1, 1.0) == (), "it has a row, and is at work"
    queues = {"r0": BATCH + 3, "r1": BATCH, "r2": BATCH}
    assert chosen.elsewhere(1, 1.0) == (), "nobody has one"
    queues = {"r0": BATCH + 3, "r1": BATCH, "r2": 0}
    assert chosen.elsewhere(1, 1.0, avoid=["r2"]) == (), "it has been there"
    chosen.refused("r2", 5.0)
    assert chosen.elsewhere(1, 1.0) == (), "who has just refused a call has none"
    assert chosen.elsewhere(2, 6.0) == (), "nobody has it yet"
    chosen.left(1)
    assert chosen.elsewhere(1, 6.0) == ()


def test_who_has_waited_for_long_tries_one_other_replica() -> None:
    chosen = placement()
    chosen.look = lambda: dict.fromkeys(names, 2)
    chosen.took(1, "r0")
    names = NAMES
    assert chosen.elsewhere(1, 1.0) == ()
    assert chosen.elsewhere(1, 1.0, long=True) == ("r0",)
    chosen.took(1, "r1")
    assert chosen.elsewhere(1, 1.0, avoid=["r0"], long=True) == ()
    names = ["r1"]
    assert chosen.elsewhere(1, 1.0, long=True) == ()


@pytest.mark.parametrize("replicas", [3, 20, 100])
def test_nobody_is_sent_to_a_full_replica_while_one_has_room(replicas: int) -> None:
    """Wherever the one is, and whatever it holds, as far as is known of limits and refusals."""
    names = [f"r{i}" for i in range(replicas)]
    for seed in range(20):
        chosen = Placement(batch=BATCH, seed=seed)
        chosen.update({name: report(["a"], [], [], 0.0, 6) for name in names}, 0.0)
        free = names[seed % replicas]
        assert chosen.rank([("a", 1.0)], {**dict.fromkeys(names, 6), free: 5}, 1.0)[0] == free
        assert chosen.rank([], {**dict.fromkeys(names, 6), free: 5}, 1.0)[0] == free


def test_where_all_seem_full_everybody_is_asked_before_a_request_is_refused() -> None:
    """What is known of queues may be old: a replica that has not refused may have room by now."""
    names = [f"r{i}" for i in range(30)]
    chosen = Placement(batch=BATCH, seed=0)
    chosen.update({name: report(["a"], [], [], 0.0, 6) for name in names}, 0.0)
    asked: list[str] = []
    for _ in names:
        asked.append(chosen.rank([("a", 1.0)], dict.fromkeys(names, 6), 1.0, avoid=asked)[0])
        chosen.refused(asked[-1], 2.0)
    assert sorted(asked) == sorted(names)
    assert chosen.all_refuse(1.5)


def test_a_rank_costs_a_fraction_of_a_millisecond() -> None:
    """At 100 replicas, 10,000 adapters and 16 of them mixed, in this process's own time; the least of some.

    A fifth is what `benchmarks/placement.py` is held to, on a machine of its own.
    """
    draw = random.Random(0)
    names = [f"adapter-{i:05d}@{i:016x}" for i in range(10_000)]
    chosen = Placement(batch=16, seed=0)
    held = {f"r{i}": report(draw.sample(names, 256), draw.sample(names, 512), draw.sample(names, 512), 0.0)
            for i in range(100)}  # fmt: skip
    chosen.update(held, 0.0)
    queues = {name: draw.randrange(16) for name in held}
    wanted = [[(name, 1.0) for name in draw.sample(names, 16)] for _ in range(50)]
    taken = []
    for turn in range(10):
        started = time.process_time()
        for i, mixture in enumerate(wanted):
            chosen.rank(mixture, queues, 10 + turn + i / 50)
        taken.append((time.process_time() - started) / len(wanted))
    assert min(taken) < 0.5e-3


def two_loads(policy: Callable[[list[tuple[str, float]], dict[str, int], float], str], tell: Placement) -> int:
    """Loads of 40-slot replicas under Zipf traffic over 200 adapters; each answer takes 24 requests' time."""
    draw = random.Random(1)
    held = {name: OrderedDict[str, None]() for name in NAMES}
    queues, ends, loads = idle(), [], 0
    for step in range(4000):
        now = step / 10
        if step % 10 == 0:
            tell.update({name: report(list(slots), [], [], now) for name, slots in held.items()}, now)
        ends = [(end, name) for end, name in ends if end > step or queues.update({name: queues[name] - 1})]
        adapter = f"a{draw.choices(range(200), [1 / (i + 1) for i in range(200)])[0]}"
        name = policy([(adapter, 1.0)], queues, now)
        queues[name] += 1
        ends.append((step + draw.randint(4, 20), name))
        loads += adapter not in held[name]
        held[name][adapter] = None
        held[name].move_to_end(adapter)
        if len(held[name]) > 40:
            held[name].popitem(last=False)
        assert queues[name] <= 2 * BATCH
    return loads


def test_at_least_half_of_the_loads_are_spared_under_zipf_traffic() -> None:
    ours = Placement(batch=BATCH, seed=0)
    draw = random.Random(2)

    def two_choices(_: object, queues: dict[str, int], now: float) -> str:
        return min(draw.sample(NAMES, 2), key=lambda name: queues[name])

    spared = two_loads(lambda adapters, queues, now: ours.rank(adapters, queues, now)[0], ours)
    assert 2 * spared <= two_loads(two_choices, Placement(batch=BATCH))


def test_an_adapter_is_known_to_be_where_replicas_report_it() -> None:
    known = placement(r0=holding(["a"], ["a"], ["a"]), r1=holding(disk=["a", "b"]), r2=holding())
    assert known.whereabouts("a") == {"device": 1, "host": 1, "disk": 2}
    assert known.whereabouts("b") == {"disk": 1}
    assert known.whereabouts("c") == {}
    assert Placement(batch=BATCH).whereabouts("a") == {}
