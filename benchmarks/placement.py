"""Placement at the size of a large cluster: the production policy in a simulated one, beside Serve's own choice.

    python benchmarks/placement.py [--replicas 100] [--adapters 10000] [--seconds 60] [--load 0.6 0.9] [--json FILE]

`deployments.placement` as it is, its reports and its memory of refusals, drives simulated replicas: rows that slow
each other down, a bounded queue that refuses, tiers of adapters that push each other out and take their time to load.
Several ingress replicas each know what they have sent themselves, the queues that replicas told them last, and reports
that are a second old at most. Serve's own choice (the less busy of two at random) sees the same requests. More tables
are of three replicas that refuse what would take more than twice its time alone, one adapter a request and loaded at
once. Time is simulated: one core does. The last lines are one figure each, `NAME VALUE`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import pickle
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import Any

from deployments.placement import Placement, report

INGRESSES = 4
REPORT_S = 1.0
QUEUE_LAPSES_S = 10.0  # Serve's count of what another replica runs
RETRY_AFTER_S, SPARED = 1.0, 1 / 16  # as in `deployments.dispatch`
TIERS = ("device", "host", "disk")
LOAD_S = {"host": 0.01, "disk": 0.1, "store": 0.5}


@dataclass(frozen=True)
class Shape:
    """A cluster: its sizes, and what a step of `n` rows takes."""

    replicas: int
    adapters: int
    rows: int
    limit: int  # requests that a replica takes at once; it refuses more
    tokens: int
    step_s: Callable[[int], float]
    room: dict[str, int]  # adapters in each tier
    load_s: dict[str, float]  # to bring one to the device from elsewhere
    mix: float  # share of requests under three adapters

    def rate(self) -> float:
        """Requests a second that all replicas sustain."""
        rows = min(self.rows, self.limit)
        return self.replicas * rows / (self.tokens * self.step_s(rows))


@dataclass
class Replica:
    """One replica: rows that share its steps, a queue, and tiers of adapters, the least recently used out first."""

    shape: Shape
    rows: dict[int, float] = field(default_factory=dict)  # tokens that each request still needs
    waiting: deque[int] = field(default_factory=deque)
    tiers: dict[str, OrderedDict[str, None]] = field(default_factory=lambda: {tier: OrderedDict() for tier in TIERS})
    at: float = 0.0
    event: int = 0
    here: int = 0
    taken: int = 0

    def advance(self, now: float) -> None:
        if self.rows:
            tokens = (now - self.at) / self.shape.step_s(len(self.rows))
            self.rows = {request: left - tokens for request, left in self.rows.items()}
        self.at = now

    def next_end(self) -> float | None:
        return self.at + max(min(self.rows.values()), 0.0) * self.shape.step_s(len(self.rows)) if self.rows else None

    def load(self, adapters: list[str], loads: Counter[str]) -> float:
        """Bring adapters to the device; the seconds that it takes."""
        seconds = 0.0
        for adapter in adapters:
            found = next((tier for tier in TIERS if adapter in self.tiers[tier]), "store")
            loads[found] += 1
            seconds = max(seconds, self.shape.load_s.get(found, 0.0))
            for tier in TIERS[: TIERS.index(found) + 1 if found in TIERS else 3]:
                self.tiers[tier][adapter] = None
                self.tiers[tier].move_to_end(adapter)
                if len(self.tiers[tier]) > self.shape.room[tier]:
                    self.tiers[tier].popitem(last=False)
        return seconds


@dataclass
class Ingress:
    """What one ingress replica knows of the queues."""

    own: Counter[str] = field(default_factory=Counter)
    told: dict[str, tuple[int, float]] = field(default_factory=dict)

    def queue(self, name: str, now: float) -> int:
        count, at = self.told.get(name, (0, now))
        return max(self.own[name], count if now - at <= QUEUE_LAPSES_S else 0)


class Policy:
    """Serve's own choice: the less busy of two; a refusal is the client's."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._random = random.Random(seed)

    def update(self, reports: dict[str, dict[str, Any]], ingress: Ingress, now: float) -> None:
        pass

    def turned_away(self, ingress: Ingress, now: float) -> bool:
        return False

    def choose(self, adapters: list[tuple[str, float]], queues: dict[str, int], now: float, tried: list[str]) -> str:
        return min(self._random.sample(list(queues), min(2, len(queues))), key=lambda name: queues[name])

    def refused(self, name: str, now: float, tried: list[str]) -> bool:
        """Whether another replica may take the request."""
        return False


class Ours(Policy):
    """The production policy, with what `deployments.dispatch` and `retries` do of a refusal."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__(shape, seed)
        self._placement = Placement(batch=shape.rows, seed=seed)
        self._replicas = shape.replicas
        self.seconds = 0.0
        self.ranks = 0

    def update(self, reports: dict[str, dict[str, Any]], ingress: Ingress, now: float) -> None:
        for name in self._placement.update(reports, now):
            ingress.told[name] = sum(reports[name]["calls"].values()), now

    def turned_away(self, ingress: Ingress, now: float) -> bool:
        self._placement.look = lambda: {f"r{i}": ingress.queue(f"r{i}", now) for i in range(self._replicas)}
        return self._placement.full(now)

    def choose(self, adapters: list[tuple[str, float]], queues: dict[str, int], now: float, tried: list[str]) -> str:
        started = time.process_time()
        best = self._placement.rank(adapters, queues, now, avoid=tried)[0]
        self.seconds += time.process_time() - started
        self.ranks += 1
        return best

    def refused(self, name: str, now: float, tried: list[str]) -> bool:
        self._placement.refused(name, now + SPARED * RETRY_AFTER_S)
        return not self._placement.all_refuse(now) and name not in tried


@dataclass
class Seen:
    """What became of the requests."""

    requests: int = 0
    refused: int = 0
    refused_beside_idle: int = 0
    asked: int = 0
    loads: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    busiest: list[float] = field(default_factory=list)
    copies: float = 0.0
    taken: list[int] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        taken = sorted(self.seconds)
        return {
            "requests": self.requests,
            "adapters found on the device": self.loads["device"] / max(sum(self.loads.values()), 1),
            "loads from host memory": self.loads["host"],
            "loads from the node's disk": self.loads["disk"],
            "loads from the store": self.loads["store"],
            "device copies of an adapter, mean": self.copies,
            "busiest replica's queue over the mean": mean(self.busiest),
            "busiest replica's requests over the mean": max(self.taken) / mean(self.taken),
            "replicas asked a request": self.asked / self.requests,
            "refused, %": 100 * self.refused / self.requests,
            "refused while a replica was idle, %": 100 * self.refused_beside_idle / self.requests,
            "p50, s": median(taken),
            "p99, s": taken[int(0.99 * len(taken))],
        }


def simulate(shape: Shape, kind: type[Policy], load: float, seconds: float, seed: int) -> Seen:
    """Requests at random moments, under adapters of Zipf's law; the first quarter, which fills tiers, counts not."""
    draw = random.Random(seed)
    names = [f"r{i}" for i in range(shape.replicas)]
    replicas = {name: Replica(shape) for name in names}
    policies, ingresses = [kind(shape, seed + i) for i in range(INGRESSES)], [Ingress() for _ in range(INGRESSES)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(shape.adapters)))
    reports: dict[str, dict[str, Any]] = {}
    seen, began, ingress_of = Seen(), dict[int, float](), dict[int, int]()
    rate, number = load * shape.rate(), 0
    events: list[tuple[float, int, str, str, int]] = [(draw.expovariate(rate), 0, "arrival", "", 0)]
    ties = iter(range(1, 1 << 60))

    def at(when: float, kind: str, name: str = "", what: int = 0) -> None:
        heapq.heappush(events, (when, next(ties), kind, name, what))

    def plan(name: str) -> None:
        replica = replicas[name]
        replica.event += 1
        if (end := replica.next_end()) is not None:
            at(end, "end", name, replica.event)

    def begin(name: str, now: float) -> None:
        replica = replicas[name]
        replica.advance(now)
        while replica.waiting and len(replica.rows) < shape.rows:
            replica.rows[replica.waiting.popleft()] = shape.tokens
        plan(name)

    for i in range(INGRESSES):
        at(i * REPORT_S / INGRESSES, "report", "", i)
    while events:
        now, _, kind, name, what = heapq.heappop(events)
        counted = now > seconds / 4
        if kind == "report":
            if now < seconds:
                at(now + REPORT_S, "report", "", what)
                if what == 0:
                    reports = {
                        other: report(*replica.tiers.values(), now, shape.limit, calls={"all": replica.here})
                        for other, replica in replicas.items()
                    }
                policies[what].update(reports, ingresses[what], now)
            if counted and what == 0 and now < seconds:
                queues = [replica.here for replica in replicas.values()]
                seen.busiest.append(max(queues) / max(mean(queues), 1e-9))
        elif kind == "end" and replicas[name].event == what:
            replica = replicas[name]
            replica.advance(now)
            for request in [request for request, left in replica.rows.items() if left <= 1e-6]:
                del replica.rows[request]
                replica.here -= 1
                ingress = ingresses[ingress_of.pop(request)]
                ingress.own[name] -= 1
                if name in ingress.told:
                    ingress.told[name] = max(0, ingress.told[name][0] - 1), now
                if (start := began.pop(request)) > seconds / 4:
                    seen.seconds.append(now - start)
            begin(name, now)
        elif kind == "loaded":
            replicas[name].waiting.append(what)
            begin(name, now)
        elif kind == "arrival" and now < seconds:
            at(now + draw.expovariate(rate), "arrival")
            number += 1
            own = draw.choices(range(shape.adapters), cum_weights=weights)[0]
            mixture = [(f"adapter-{own:05d}@{own:08x}", 1.0)]
            if draw.random() < shape.mix:
                first = own - own % 3
                mixture = [(f"adapter-{i:05d}@{i:08x}", 0.6 if i == own else 0.2) for i in range(first, first + 3)]
            who = draw.randrange(INGRESSES)
            policy, ingress, tried = policies[who], ingresses[who], list[str]()
            seen.requests += counted
            chosen = None
            while not (chosen is None and not tried and policy.turned_away(ingress, now)):
                queues = {other: ingress.queue(other, now) for other in names}
                other = policy.choose(mixture, queues, now, tried)
                seen.asked += counted
                ingress.told[other] = min(replicas[other].here + 1, shape.limit), now
                if replicas[other].here < shape.limit:
                    chosen = other
                    break
                if not policy.refused(other, now, tried):
                    break
                tried.append(other)
            if chosen is None:
                seen.refused += counted
                seen.refused_beside_idle += counted and min(r.here for r in replicas.values()) <= shape.limit // 3
                continue
            replica = replicas[chosen]
            replica.here += 1
            replica.taken += counted
            ingress.own[chosen] += 1
            began[number], ingress_of[number] = now, who
            loads: Counter[str] = Counter()
            at(now + replica.load([adapter for adapter, _ in mixture], loads), "loaded", chosen, number)
            if counted:
                seen.loads += loads
    held = Counter(adapter for replica in replicas.values() for adapter in replica.tiers["device"])
    seen.copies, seen.taken = mean(held.values()), [replica.taken for replica in replicas.values()]
    return seen


def rank_ms(replicas: int, adapters: int, mixed: int) -> tuple[float, int]:
    """What ranking a request takes, the median of some, and the bytes of a report."""
    draw = random.Random(0)
    names = [f"adapter-{i:05d}@{i:016x}" for i in range(adapters)]
    reports = {
        f"r{i}": report(draw.sample(names, 256), draw.sample(names, 512), draw.sample(names, 512), 0.0)
        for i in range(replicas)
    }
    placement = Placement(batch=16, seed=0)
    placement.update(reports, 0.0)
    queues = {name: draw.randrange(16) for name in reports}
    wanted = [[(name, 1.0) for name in draw.sample(names, mixed)] for _ in range(100)]
    taken = []
    for turn in range(9):
        started = time.process_time()
        for i, mixture in enumerate(wanted):
            placement.rank(mixture, queues, 10 + turn + i / 100)
        taken.append(1000 * (time.process_time() - started) / len(wanted))
    return median(taken), len(pickle.dumps(reports["r0"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=40, help="simulated, of each case")
    parser.add_argument("--load", type=float, nargs="*", default=[0.6, 0.9], help="shares of what is sustained")
    parser.add_argument("--mix", type=float, default=0.3, help="share of requests under three adapters")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    large = Shape(
        args.replicas, args.adapters, rows=16, limit=24, tokens=64, step_s=lambda n: 0.008 + 0.0002 * n,
        room={"device": 256, "host": 1024, "disk": 4096}, load_s=LOAD_S, mix=args.mix,
    )  # fmt: skip
    small = Shape(
        3, 200, rows=16, limit=6, tokens=64, step_s=lambda n: 0.02 * (1 + n / 4),
        room={"device": 40, "host": 80, "disk": 200}, load_s={}, mix=0.0,
    )  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    cases = [("large", large, load, args.seconds) for load in args.load]
    cases += [("three", small, load, 240 * args.seconds) for load in (0.4, 0.6, 0.8)]
    for title, shape, load, seconds in cases:
        arms = {}
        for arm, kind in (("Serve's own", Policy), ("this one", Ours)):
            seen = simulate(shape, kind, load, seconds, seed=0)
            arms[arm] = found[f"{title} {load:g} {arm}"] = seen.figures()
        print(f"\n{shape.replicas} replicas, {shape.adapters} adapters, {load:.0%} of {shape.rate():.0f} requests/s")
        print(f"{'':42}{'Serve’s own':>14}{'this one':>14}")
        for key, value in arms["Serve's own"].items():
            print(f"{key:42}{value:14.4g}{arms['this one'][key]:14.4g}")
    milliseconds, size = rank_ms(args.replicas, args.adapters, 16)
    last = found[f"large {args.load[0]:g} this one"]
    figures = {
        "rank_ms": milliseconds,
        "report_bytes": size,
        "hit_rate": last["adapters found on the device"],
        "hit_rate_serve": found[f"large {args.load[0]:g} Serve's own"]["adapters found on the device"],
        "refused_percent": last["refused, %"],
        "refused_percent_serve": found[f"large {args.load[0]:g} Serve's own"]["refused, %"],
        "three_at_60_refused_percent": found["three 0.6 this one"]["refused, %"],
        "three_at_60_refused_percent_serve": found["three 0.6 Serve's own"]["refused, %"],
    }
    print()
    for name, value in figures.items():
        print(f"{name} {value:.4g}")
    if args.json:
        args.json.write_text(json.dumps({"figures": figures, **found}, indent=1))


if __name__ == "__main__":
    main()
