"""What waits for room in a Ray cluster, what is free there, and who holds the rest.

Asks Ray's controller itself: the public API for the same goes through the dashboard, which our clusters do without.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state as global_state
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.exceptions import RayError

_GCS: Any = gcs_pb2  # generated: type checkers see nothing of them
_AUTOSCALER: Any = autoscaler_pb2
_ACTOR, _DEAD_NODE = _GCS.ActorTableData, _AUTOSCALER.NodeStatus.Value("DEAD")
_LOOK_S = 2.0  # between two looks at the cluster
_TELL_S, _AGAIN_S = 10.0, 60.0
_START_S = 50.0  # later, where they may have their place
_NAMED = 6  # holders, the largest first
_SLACK = 1e-3  # Ray counts in ten-thousandths
_REPLICA = re.compile(r"SERVE_REPLICA::(?P<app>[^#]+)#(?P<deployment>[^#]+)#")
_WORKER = re.compile(r"MapWorker\(.*?(?P<stage>\w+)\)+$")
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Actor:
    """An actor of the cluster, as far as resources go.

    Attributes:
        name: its own, or "".
        label: what people know it by.
        job: the driver that it belongs to.
        placed: whether it has its resources; else it waits for them.
    """

    name: str
    label: str
    job: str
    resources: Resources
    placed: bool


Mine = Callable[[Actor], bool]


@dataclass(frozen=True)
class Room:
    """A cluster at one moment: the actors, and of each node what is free and what there is."""

    actors: tuple[Actor, ...]
    free: tuple[Resources, ...]
    total: tuple[Resources, ...]

    def waiting(self, mine: Mine) -> list[Actor]:
        """The actors of an owner that have no place yet and find none; what there is room for is only late."""
        free = [dict(node) for node in self.free]
        waiting = []
        for actor in self.actors:
            if actor.placed or not actor.resources:
                continue
            if node := next((node for node in free if _fits(actor.resources, node)), None):
                for kind, amount in actor.resources.items():
                    node[kind] -= amount
            elif mine(actor):
                waiting.append(actor)
        return waiting

    def is_stuck(self, mine: Mine) -> bool:
        """Whether all actors of one label wait, so that nothing goes on."""
        placed = {actor.label for actor in self.actors if mine(actor) and actor.placed}
        return any(actor.label not in placed for actor in self.waiting(mine))

    def may_be_starting(self, mine: Mine) -> bool:
        """Whether what nobody is known to hold would do for all that wait: it may be theirs. Ray's controller knows an
        actor's place once its process runs, whose imports take many seconds on a slow machine."""
        wanted: Counter[str] = Counter()
        for actor in self.waiting(mine):
            wanted.update(actor.resources)
        return all(self._unknown(kind) + _SLACK >= amount for kind, amount in wanted.items())

    def _unknown(self, kind: str) -> float:
        """How much of something is used by nobody who is known."""
        used = sum(node.get(kind, 0.0) for node in self.total) - sum(node.get(kind, 0.0) for node in self.free)
        return used - sum(actor.resources.get(kind, 0.0) for actor in self.actors if actor.placed)

    def never(self, resources: Resources) -> bool:
        """Whether no node has so much, were it all free."""
        return not any(_fits(resources, node) for node in self.total)

    def most(self, kind: str) -> float:
        """What the node with the most of something has."""
        return max((node.get(kind, 0.0) for node in self.total), default=0.0)

    def shortage(self, mine: Mine) -> str | None:
        """What an owner's actors wait for, what is free, and who could give it; None where none waits."""
        wanted = Counter((actor.label, tuple(sorted(actor.resources.items()))) for actor in self.waiting(mine))
        if not wanted:
            return None
        each = [f"{count} of {label} with {_amounts(dict(needs))}" for (label, needs), count in wanted.items()]
        kinds = sorted({kind for _, needs in wanted for kind, _ in needs})
        if too_large := next((dict(needs) for _, needs in wanted if self.never(dict(needs))), None):
            advice = f"no node has {_amounts(too_large)}: ask for less, or add one that has"
        elif holders := self._holders(kinds):
            advice = f"the rest is held by {holders}: end or shrink one of them, ask for less, or add a node"
        else:
            advice = "ask for less, or add a node"
        free = ", ".join(self._free(kind) for kind in kinds)
        return f"waiting for room in the cluster: wanted are {', '.join(each)}; free are {free}; {advice}"

    def _free(self, kind: str) -> str:
        free, total = ([node.get(kind, 0.0) for node in nodes] for nodes in (self.free, self.total))
        most = f", at most {max(free):g} on one node" if max(free, default=0.0) < sum(free) - _SLACK else ""
        return f"{sum(free):g} of {_amount(kind, sum(total))}{most}"

    def _holders(self, kinds: list[str]) -> str:
        held: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for kind in kinds:
            for actor in self.actors:
                if actor.placed and (amount := actor.resources.get(kind, 0.0)):
                    held[actor.label][kind] += amount
            if (unknown := self._unknown(kind)) > _SLACK:
                held["running tasks"][kind] += unknown
        largest = sorted(held.items(), key=lambda item: (-max(item[1].values()), item[0]))
        names = [f"{label} ({_amounts(amounts)})" for label, amounts in largest[:_NAMED]]
        return ", ".join(names + [f"{len(largest) - _NAMED} more"] * (len(largest) > _NAMED))


def _fits(resources: Resources, node: Resources) -> bool:
    return all(node.get(kind, 0.0) + _SLACK >= amount for kind, amount in resources.items())


def _amounts(resources: Resources) -> str:
    return " and ".join(_amount(kind, amount) for kind, amount in sorted(resources.items()))


def _amount(kind: str, amount: float) -> str:
    if kind == "memory":
        return f"{amount / (1 << 30):.3g} GiB of memory"
    return f"{round(amount, 3):g} {kind}{'s' * (kind in ('CPU', 'GPU') and amount != 1)}"


def look() -> Room:
    """The cluster that this process is connected to. Raises RayError."""
    worker: Any = ray._private.worker.global_worker
    nodes = [node for node in get_cluster_resource_state(worker.gcs_client).node_states if node.status != _DEAD_NODE]
    table = global_state._connect_and_get_accessor().get_actor_table(None, None)
    rows = [row for row in map(_ACTOR.FromString, table) if row.state != _ACTOR.DEAD]
    return Room(
        tuple(
            Actor(row.name, _label(row), row.job_id.hex(), dict(row.required_resources), bool(row.address.ip_address))
            for row in rows
        ),
        tuple(dict(node.available_resources) for node in nodes),
        tuple(dict(node.total_resources) for node in nodes),
    )


def _label(row: Any) -> str:
    if replica := _REPLICA.match(row.name):
        return f"{replica['deployment']} of the service {replica['app']!r}"
    if worker := _WORKER.search(row.class_name):
        return f"{worker['stage']} of the batch job {row.job_id.hex()}"
    return str(row.name or row.class_name)


class Watch:
    """Says what an owner's actors wait for, once they have waited for ten seconds, or a minute where they may only be
    starting, and every minute from then on.

    Args:
        mine: which actors are the owner's.
        tell: is given the line.
        now: the time, in seconds.
    """

    def __init__(self, mine: Mine, tell: Callable[[str], None], *, now: Callable[[], float] = time.monotonic) -> None:
        self._mine, self._tell, self._now = mine, tell, now
        self._looked = self._stuck_since = now()
        self._tell_at = self._looked + _TELL_S
        self.line: str | None = None
        """What is waited for, as of the last look."""
        self.hopeless = False
        """Whether something is wanted that no node of the cluster has."""

    def check(self, room: Callable[[], Room] = look) -> float:
        """Look, if it is time to; returns the seconds for which nothing has gone on for want of room."""
        now = self._now()
        if now - self._looked < _LOOK_S:
            return self._looked - self._stuck_since
        self._looked = now
        with suppress(RayError):  # the controller is away: it is asked again
            found = room()
            self.line = found.shortage(self._mine)
            self.hopeless = any(found.never(actor.resources) for actor in found.waiting(self._mine))
            if self.line is None:
                self._tell_at = now + _TELL_S
            elif now >= self._tell_at + (_START_S if found.may_be_starting(self._mine) else 0.0):
                self._tell_at = now + _AGAIN_S
                self._tell(self.line)
            if not found.is_stuck(self._mine):
                self._stuck_since = now
        return self._looked - self._stuck_since
