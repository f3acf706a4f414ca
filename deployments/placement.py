"""Which replica answers a request: the adapters that each already holds, weighed against its queue.

Pure policy: told what is where, how busy each replica is and what time it is, it ranks the replicas for a request. An
adapter is a string to it, one for each version: who has another version has nothing. Knows nothing of Ray;
`deployments.residency_router` runs it inside Serve's handles.

A replica's score, the lowest first, is in times that a request takes when its replica is full, that is when its batch
is, or when it begins to refuse requests, whichever is earlier:

    busy(queue / full) + sum_k |w_k| / sum_j |w_j| * (cost of the tier that adapter k is in - HOME on its home replica)

An adapter that only the store has goes to its *home*, the replica of the largest hash of both names (rendezvous
hashing), so that every router sends it to the same one. A hot adapter's replicas fill up until a replica that
would have to load it scores better, which then holds it too: copies follow the demand.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

HOME = 0.1
STALE_S = 30.0  # reports change at least every BEAT_S: after three missed ones nothing is believed
BEAT_S = 10.0
SENT_S = 3.0  # for how long an adapter just sent somewhere is taken to be there, reported or not
RAMP_S = 5.0
REPORTED = 512  # names that a report gives of each tier at most
_SAMPLED = 2


class Tier(IntEnum):
    """Where a replica has an adapter, the nearest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    STORE = 3


COST = {Tier.DEVICE: 0.0, Tier.HOST: 0.2, Tier.DISK: 0.4, Tier.STORE: 0.8}
"""What bringing an adapter to the device costs, this request and those whose adapters must leave for it."""


def report(
    device: Sequence[str], host: Sequence[str], disk: Sequence[str], now: float, limit: int | None = None
) -> dict[str, Any]:
    """What a replica tells the routers: names by tier, the most recently used of each, each name once.

    Args:
        device, host, disk: names, the least recently used first.
        now: seconds on any steady clock; makes the report of an idle replica change every BEAT_S seconds.
        limit: requests that the replica takes at once before it refuses more, as far as it knows.
    """
    found: dict[str, Any] = {"beat": int(now // BEAT_S), "limit": limit}
    told: set[str] = set()
    for tier, names in ((Tier.DEVICE, device), (Tier.HOST, host), (Tier.DISK, disk)):
        fresh = [name for name in dict.fromkeys(reversed(names)) if name not in told][:REPORTED]
        told.update(fresh)
        found[tier.name.lower()] = sorted(fresh)  # what was used last must not look like news
    return found


@dataclass
class _Replica:
    since: float
    raw: Mapping[str, Any] | None = None
    heard: float = 0.0
    tiers: dict[str, Tier] = field(default_factory=dict)
    limit: int | None = None
    sent: dict[str, float] = field(default_factory=dict)

    def tier(self, name: str, now: float) -> Tier:
        if now - self.sent.get(name, -SENT_S) < SENT_S:
            return Tier.DEVICE
        return Tier.STORE if self.stale(now) else self.tiers.get(name, Tier.STORE)

    def stale(self, now: float) -> bool:
        """Whether it once reported, and has fallen silent."""
        return self.raw is not None and now - self.heard > STALE_S


class Placement:
    """Ranks replicas for requests.

    Args:
        batch: requests that a replica runs at once.
        seed: of the random choices; None takes the system's.
    """

    def __init__(self, *, batch: int, seed: int | None = None) -> None:
        self._batch = batch
        self._random = random.Random(seed)
        self._replicas: dict[str, _Replica] = {}

    def update(self, reports: Mapping[str, Mapping[str, Any]], now: float) -> None:
        """Take in which replicas there are, with the last report of each (empty: none yet)."""
        first = not self._replicas
        kept = {}
        for name, raw in reports.items():
            replica = self._replicas.get(name) or _Replica(now - RAMP_S if first else now)
            if raw and raw != replica.raw:
                replica.raw, replica.heard, replica.tiers, replica.limit = raw, now, _tiers(raw), raw.get("limit")
            kept[name] = replica
        self._replicas = kept

    def rank(self, adapters: Sequence[tuple[str, float]], queues: Mapping[str, int], now: float) -> list[str]:
        """Replicas for a request, the best first, and take the best to hold the request's adapters soon.

        Where nothing tells them apart, or all information is stale, it is the less busy of two at random.

        Args:
            adapters: names and weights.
            queues: requests in progress by replica, of those that may be chosen.
        """
        sampled = self._random.sample(list(queues), min(_SAMPLED, len(queues)))
        known = {name: self._replicas.setdefault(name, _Replica(now)) for name in queues}
        if not adapters or all(replica.stale(now) for replica in known.values()):
            return sorted(sampled, key=lambda name: queues[name])
        total = sum(abs(weight) for _, weight in adapters)
        shares = [(name, abs(weight) / total if total else 1 / len(adapters)) for name, weight in adapters]
        homes = {name: max(queues, key=lambda replica: _affinity(name, replica)) for name, _ in shares}
        tiers = {replica: {name: state.tier(name, now) for name in homes} for replica, state in known.items()}
        # Those that have or should have something, and two others: not all routers see the idlest replica at once.
        candidates = {*sampled, *homes.values()}
        candidates |= {replica for replica, held in tiers.items() if min(held.values()) < Tier.STORE}
        floor = _slow_start({name: (queues[name], now - state.since) for name, state in known.items()})

        def score(replica: str) -> tuple[float, float]:
            load = 0.0
            for name, share in shares:
                tier = tiers[replica][name]
                load += share * (COST[tier] - (HOME if tier and homes[name] == replica else 0.0))
            full = min(self._batch, known[replica].limit or self._batch)
            return _busy(max(queues[replica], floor[replica]) / full) + load, self._random.random()

        ranked = sorted(candidates, key=score)
        self._note_sent(known[ranked[0]], homes, now)
        return ranked

    def _note_sent(self, replica: _Replica, names: Iterable[str], now: float) -> None:
        sent = replica.sent  # in the order of time
        for name in names:
            sent.pop(name, None)
            sent[name] = now
        while now - sent[first := next(iter(sent))] >= SENT_S:
            del sent[first]


def _busy(share: float) -> float:
    """Rows shared with others slow a request down; where the replica is full, it waits for answers, or is refused.

    Args:
        share: of the requests that make the replica full, those in progress.
    """
    return share if share <= 1 else 2 * share - 1


def _tiers(raw: Mapping[str, Any]) -> dict[str, Tier]:
    found: dict[str, Tier] = {}
    for tier in (Tier.DISK, Tier.HOST, Tier.DEVICE):
        found.update(dict.fromkeys(raw.get(tier.name.lower(), ()), tier))
    return found


def _affinity(adapter: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{adapter}\n{replica}".encode(), digest_size=8).digest()


def _slow_start(replicas: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """The queue that each replica is taken to have at least, by its queue and age in seconds.

    A new replica is empty, and every router would send it all it has before any learns that the others did so too:
    it counts as no less busy than the others are on average, ever less so as its first RAMP_S seconds pass.
    """
    settled = [queue for queue, age in replicas.values() if age >= RAMP_S]
    mean = sum(settled) / len(settled) if settled else 0.0
    return {name: mean * max(0.0, 1 - age / RAMP_S) for name, (_, age) in replicas.items()}
