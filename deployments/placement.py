"""Which replica answers a request: the adapters that each already holds, weighed against its queue and its pace.

Pure policy: told what is where, how busy each replica is, who refuses and what time it is, it ranks the replicas for a
request. An adapter is a string to it, one for each version: who has another version has nothing. Knows nothing of Ray;
`deployments.dispatch` asks it for each call of the ingress.

A replica's score, the lowest first, is in times that a request takes when its replica is full, that is when its batch
is, or when it begins to refuse requests, whichever is earlier:

    pace * busy(queue / full) + sum_k |w_k| / sum_j |w_j| * (cost of the tier that adapter k is in - HOME at its home)

An adapter that only the store has goes to its *home*, the replica of the largest hash of both names (rendezvous
hashing), so that every router sends it to the same one. A hot adapter's replicas fill up until a replica that
would have to load it scores better, which then holds it too: copies follow the demand. Who has no room comes after all
who have some, whatever they hold.

What a replica holds of a tier comes as a Bloom filter of one size: a report is as long for a thousand adapters as for
one, and all replicas' filters lie side by side in one array, where an adapter is looked up in all of them at once.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

HOME = 0.1
STALE_S = 30.0  # reports change at least every BEAT_S: after three missed ones nothing is believed
BEAT_S = 10.0
SENT_S = 3.0  # for how long an adapter just sent somewhere is taken to be there, reported or not
RAMP_S = 5.0
REPORTED = 512  # adapters that a report tells of each tier at most, the most recently used ones
TIERS = ("device", "host", "disk")  # the nearest first
COSTS = (0.0, 0.2, 0.4, 0.8)
"""What bringing an adapter to the device costs from each tier, and from the store: for this request, and for those
whose adapters must leave for it."""

_BITS = 8192  # of a filter: one adapter in a thousand is seen where it is not, once REPORTED are told
_HASHES = 6
_SAMPLED = 2
_PACES = 4.0  # a replica counts as so many times as slow, or as fast, as others at most
_STEPS = 4  # in which a pace doubles: smaller changes are no news
_TIE, _NO_ROOM, _UNWILLING, _AVOIDED = 1e-9, 1e6, 1e7, 1e9  # what a score gets on top
_BY_BITS = np.array([COSTS[3], *(COSTS[min(t for t in range(3) if bits & 1 << t)] for bits in range(1, 8))])
Filters = NDArray[np.uint8]


@lru_cache(1 << 16)
def _hashed(adapter: str) -> tuple[NDArray[np.intp], np.uint64]:
    """An adapter's places in a filter, and what its home follows from."""
    digest = hashlib.blake2b(adapter.encode(), digest_size=2 * _HASHES + 8).digest()
    places = np.frombuffer(digest, np.uint16, _HASHES).astype(np.intp) % _BITS
    return places, np.frombuffer(digest, np.uint64, 1, 2 * _HASHES)[0]


def holdings(names: Iterable[str]) -> bytes:
    """What a tier holds as a filter: of its adapters, the least recently used first, the last REPORTED ones."""
    bits = np.zeros(_BITS, np.uint8)
    for name in [*names][-REPORTED:]:
        bits[_hashed(name)[0]] = 1
    return np.packbits(bits).tobytes()


def report(
    device: Iterable[str],
    host: Iterable[str],
    disk: Iterable[str] | bytes,
    now: float,
    limit: int | None = None,
    seconds: float = 0.0,
    calls: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What a replica tells the routers. It is of one size, and changes only if there is news.

    Args:
        device, host, disk: names, the least recently used first, or what `holdings` made of them.
        now: seconds on any steady clock; makes the report of an idle replica change every BEAT_S seconds.
        limit: requests that the replica takes at once before it refuses more, as far as it knows.
        seconds: what a request takes there when the batch is full; 0 while that is not known.
        calls: that it has in progress, by who has sent them.
    """
    tiers = {
        tier: names if isinstance(names, bytes) else holdings(names)
        for tier, names in zip(TIERS, (device, host, disk), strict=True)
    }
    pace = round(_STEPS * math.log2(seconds)) if seconds > 0 else None
    return {"beat": int(now // BEAT_S), "limit": limit, "pace": pace, "calls": dict(calls or {}), **tiers}


@dataclass
class _Replica:
    since: float
    raw: Mapping[str, Any] | None = None
    heard: float = 0.0


class Placement:
    """Ranks replicas for requests.

    Args:
        batch: requests that a replica runs at once.
        seed: of the random choices; None takes the system's.
    """

    def __init__(self, *, batch: int, seed: int | None = None) -> None:
        self._batch = batch
        self._random = random.Random(seed)
        self._jitter = np.random.default_rng(seed)
        self._replicas: dict[str, _Replica] = {}
        self._rows: dict[str, int] = {}
        self._held: Filters = np.zeros((_BITS, 0), np.uint8)  # of each place, by replica: the tiers whose filter has it
        self._sent: dict[str, dict[str, float]] = {}  # by adapter: to whom it was sent lately, and when
        self._at: dict[int, str] = {}  # who has a call
        self.look: Callable[[], Mapping[str, int]] = dict
        """Requests in progress by replica, as of now."""
        self._refusals: dict[str, float] = {}  # until when, by replica
        self._sendings: deque[tuple[float, str, str]] = deque()
        self._arrange()

    def update(self, reports: Mapping[str, Mapping[str, Any]], now: float) -> set[str]:
        """Take in which replicas there are, with the last report of each (empty: none yet); returns whose are new."""
        first, news = not self._replicas, set()
        known = self._replicas
        self._replicas = {name: known.get(name) or _Replica(now - RAMP_S if first else now) for name in reports}
        self._arrange()
        for name, raw in reports.items():
            replica = self._replicas[name]
            if raw and raw != replica.raw:
                replica.raw, replica.heard = raw, now
                self._held[:, self._rows[name]] = _tiers(raw)
                news.add(name)
        self._arrange()
        return news

    def refused(self, replica: str, until: float) -> None:
        """A replica has refused a request, and would refuse others until then."""
        self._refusals[replica] = until

    def all_refuse(self, now: float) -> bool:
        """Whether every replica has refused a request, and would refuse others still."""
        replicas = self._replicas
        return bool(replicas) and all(self._refusals.get(name, -math.inf) > now for name in replicas)

    def full(self, now: float, coming: int = 0) -> bool:
        """Whether no replica has room, as far as is known: each has just refused a request, or has as many as it takes
        and a queue among them, which no second's old news can be wrong about; or all together have, once those that
        are on their way are there.

        Args:
            coming: requests that will be sent, and have not been.
        """
        rows, limits, queues = self._rows, self._limits, self.look()
        refusing = self._refusing(now)

        def limit(name: str) -> float:
            return float(limits[rows[name]]) if rows.get(name, len(limits)) < len(limits) else math.inf

        def has_no_room(name: str, queue: int) -> bool:
            return name in refusing or queue >= limit(name) > self._batch

        if not queues:
            return False
        if all(has_no_room(name, queue) for name, queue in queues.items()):
            return True
        return sum(queues.values()) + coming >= sum(map(limit, queues)) > self._batch * len(queues)

    def took(self, call: int, replica: str) -> None:
        """A replica has a call now, which `elsewhere` may be asked of until it has `left`."""
        self._at[call] = replica

    def left(self, call: int) -> None:
        """A call is with no replica any more."""
        self._at.pop(call, None)

    def elsewhere(self, call: int, now: float, *, avoid: Collection[str] = (), long: bool = False) -> tuple[str, ...]:
        """The replicas that a call which waits for its first token had better not be with; none to leave it there.

        It waits in a queue, and another replica has a row to spare: then it is who has none. Or it has waited for so
        long that its replica may not get to it, and there is another: then it is that one alone.

        Args:
            call: its number.
            avoid: who it has been with, or would have been.
            long: whether it has waited for long.
        """
        at = self._at.get(call)
        queues = self.look()
        others = queues.keys() - {at, *avoid, *self._refusing(now)}
        if at is None or not others:
            return ()
        busy = {name for name, queue in queues.items() if queue >= self._batch}
        if queues.get(at, 0) > self._batch and not others <= busy:
            return tuple(busy)
        return (at,) if long and not avoid else ()

    def whereabouts(self, adapter: str) -> dict[str, int]:
        """How many replicas reported to have an adapter, by tier: one may have it in several."""
        bits = np.bitwise_and.reduce(self._held[_hashed(adapter)[0]])
        return {tier: count for i, tier in enumerate(TIERS) if (count := int(np.count_nonzero(bits & 1 << i)))}

    def rank(
        self,
        adapters: Sequence[tuple[str, float]],
        queues: Mapping[str, int],
        now: float,
        *,
        avoid: Collection[str] = (),
    ) -> list[str]:
        """Replicas for a request, the best first, and take the best to hold the request's adapters soon.

        Where nothing tells them apart, or all information is stale, it is the less busy of two at random.

        Args:
            adapters: names and weights.
            queues: requests in progress by replica, of those that may be chosen.
            avoid: who has refused this very request, or kept it waiting; they come last.
        """
        if not queues:
            return []
        if not self._rows.keys() >= queues.keys():
            self._replicas = {**{name: _Replica(now) for name in queues}, **self._replicas}
            self._arrange()
        if len(queues) == 1:
            return list(queues)
        names = list(self._rows)
        queue = np.array([queues.get(name, -1) for name in names], np.float64)
        here = queue >= 0
        willing = here.copy()
        for name in (*avoid, *self._refusing(now)):
            if name in self._rows:
                willing[self._rows[name]] = False
        room = willing & (queue < self._limits)
        if now < self._grown:
            queue = np.maximum(queue, self._slow_start(queue, now))
        share = queue / self._full
        score = self._pace * np.maximum(share, 2 * share - 1)
        chosen = np.zeros(len(names), np.bool_)
        for name in self._random.sample(list(queues), min(_SAMPLED, len(queues))):
            chosen[self._rows[name]] = True
        informed = bool(adapters) and now - self._heard_last <= STALE_S
        if informed:
            load, near = self._load(adapters, here, now)
            score += load
            chosen |= near
        # Those that have or should have something, and two others: not all routers see the idlest replica at once. But
        # where none of them has room, it is anybody who has, or who at least has not refused: it may have some by now.
        for others in (room, willing):
            if not (chosen & room).any():
                chosen |= others
        score += self._jitter.random(len(names)) * _TIE
        score[~room] += _NO_ROOM
        score[~willing] += _UNWILLING
        for name in avoid:
            if name in self._rows:
                score[self._rows[name]] += _AVOIDED
        order = score.argsort()
        ranked = [names[row] for row in order[chosen[order]].tolist()]
        if informed:
            self._note_sent(ranked[0], adapters, now)
        return ranked

    def _load(
        self, adapters: Sequence[tuple[str, float]], here: NDArray[np.bool_], now: float
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """What bringing the adapters to each replica costs, and which replicas have one or are one's home."""
        weights = [abs(weight) for _, weight in adapters]
        total = sum(weights)
        shares = np.array([weight / total if total else 1 / len(adapters) for weight in weights])
        hashed = [_hashed(name) for name, _ in adapters]
        held = self._held[np.concatenate([places for places, _ in hashed])]
        tiers = np.bitwise_and.reduce(held.reshape(len(adapters), _HASHES, -1), axis=1)
        if now - self._heard_first > STALE_S:
            tiers[:, now - self._heard > STALE_S] = 0
        self._forget(now)
        for k, (name, _) in enumerate(adapters):
            for replica in self._sent.get(name, ()):
                if (row := self._rows.get(replica)) is not None:
                    tiers[k, row] |= 1
        affinity = _affinity(np.array([number for _, number in hashed])[:, None], self._numbers)
        if not here.all():
            affinity[:, ~here] = 0
            tiers[:, ~here] = 0
        each, homes = np.arange(len(adapters)), affinity.argmax(axis=1)
        costs, near = _BY_BITS[tiers], tiers.any(axis=0)
        costs[each, homes] -= HOME * (tiers[each, homes] & 1 == 0)
        near[homes] = True
        return shares @ costs, near

    def _slow_start(self, queue: NDArray[np.float64], now: float) -> NDArray[np.float64]:
        """The queue that each replica is taken to have at least.

        A new replica is empty, and every router would send it all it has before any learns that the others did so too:
        it counts as no less busy than the others are on average, ever less so as its first RAMP_S seconds pass.
        """
        ages = now - self._since
        settled = queue[(queue >= 0) & (ages >= RAMP_S)]
        mean = settled.mean() if len(settled) else 0.0
        return np.asarray(mean * np.maximum(0.0, 1 - ages / RAMP_S))

    def _refusing(self, now: float) -> list[str]:
        """Who would refuse a request, by what it has said."""
        if not self._refusals:
            return []
        told = list(self._refusals.items())
        for name, until in told:
            if until <= now or name not in self._replicas:
                self._refusals.pop(name, None)
        return [name for name, until in told if until > now]

    def _note_sent(self, replica: str, adapters: Sequence[tuple[str, float]], now: float) -> None:
        for name, _ in adapters:
            self._sent.setdefault(name, {})[replica] = now
            self._sendings.append((now, name, replica))

    def _forget(self, now: float) -> None:
        while self._sendings and now - self._sendings[0][0] >= SENT_S:
            at, name, replica = self._sendings.popleft()
            if (sent := self._sent.get(name)) is not None and sent.get(replica) == at:
                del sent[replica]
                if not sent:
                    del self._sent[name]

    def _arrange(self) -> None:
        """A column for each replica, and what is known of them as arrays."""
        names = list(self._replicas)
        if names != list(self._rows):
            held = np.zeros((_BITS, len(names)), np.uint8)
            kept = [(new, self._rows[name]) for new, name in enumerate(names) if name in self._rows]
            held[:, [new for new, _ in kept]] = self._held[:, [old for _, old in kept]]
            self._held, self._rows = held, {name: row for row, name in enumerate(names)}
            self._numbers = np.array([_hashed(name)[1] for name in names], np.uint64)
        states = list(self._replicas.values())
        told = [state.raw or {} for state in states]
        self._limits = np.array([raw.get("limit") or math.inf for raw in told])
        self._full = np.minimum(self._limits, self._batch)
        paces = np.array([math.nan if raw.get("pace") is None else 2 ** (raw["pace"] / _STEPS) for raw in told])
        slow = paces / np.nanmean(paces) if not np.isnan(paces).all() else paces
        self._pace = np.clip(np.nan_to_num(slow, nan=1.0), 1 / _PACES, _PACES)
        self._since = np.array([state.since for state in states])
        self._grown = max((state.since for state in states), default=0.0) + RAMP_S
        # Who has never reported has not fallen silent: it holds nothing.
        heard = [math.inf if state.raw is None else state.heard for state in states]
        self._heard = np.array(heard)
        self._heard_first, self._heard_last = min(heard, default=math.inf), max(heard, default=math.inf)


def _tiers(raw: Mapping[str, Any]) -> Filters:
    """Of each place, as bits, the tiers whose filter has it. What a replica of another lorauter reports is not read."""
    found = np.zeros(_BITS, np.uint8)
    for number, tier in enumerate(TIERS):
        held = raw.get(tier)
        if isinstance(held, bytes) and 8 * len(held) == _BITS:
            found |= np.unpackbits(np.frombuffer(held, np.uint8)) << number
    return found


def _affinity(adapters: NDArray[np.uint64], replicas: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The hash of both (the finaliser of splitmix64)."""
    mixed = adapters ^ replicas
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
