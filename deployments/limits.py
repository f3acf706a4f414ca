"""Limits per minute that hold for a key as a whole, however many replicas the ingress has.

`TokenBuckets` counts; one actor of the Router deployment holds the buckets, and `SharedLimits` asks it, at once for all
that a replica wants. Knows nothing of keys' secrets or HTTP. The actor's state dies with it: then every bucket is full
again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import DeploymentActorConfig

from deployments.calls import Refused, Taken, Want
from deployments.together import Together
from lorauter.errors import ServiceUnavailable

ACTOR_NAME = "limits"
_MINUTE_S = 60.0
_ATTEMPTS = 6
_PAUSE_S = 0.1  # before the second; it doubles


class TokenBuckets:
    """A bucket for each name: it holds a minute's allowance at most, and fills evenly.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}  # what is left, and when that was so

    def take(self, wants: Sequence[Want]) -> Taken | Refused:
        """Take amounts, one after the other, as far as they are there.

        What is more than a whole bucket is taken from a full one, which then owes the rest.
        """
        left = []
        for i, (name, amount, per_minute) in enumerate(wants):
            level = self._level(name, per_minute)
            needed = min(amount, float(per_minute))
            if level < needed:
                return Refused(i, max((needed - level) * _MINUTE_S / per_minute, 1e-3))
            self._levels[name] = level - amount, self._clock()
            left.append(level - amount)
        return Taken(tuple(left))

    def settle(self, want: Want) -> None:
        """Take what an answer took beyond what was taken for it; a negative amount gives back. May leave a debt."""
        name, amount, per_minute = want
        self._levels[name] = min(self._level(name, per_minute) - amount, float(per_minute)), self._clock()

    def _level(self, name: str, per_minute: int) -> float:
        level, since = self._levels.get(name, (float(per_minute), 0.0))
        return min(float(per_minute), level + (self._clock() - since) * per_minute / _MINUTE_S)


class LimitsActor:
    """The actor's body."""

    def __init__(self) -> None:
        self._buckets = TokenBuckets()

    async def count(self, operations: Sequence[Sequence[Want] | Want]) -> list[Taken | Refused | None]:
        """Take what is a sequence, settle what is a single want, in their order."""
        answers: list[Taken | Refused | None] = []
        for operation in operations:
            if isinstance(operation, Want):
                self._buckets.settle(operation)
                answers.append(None)
            else:
                answers.append(self._buckets.take(operation))
        return answers


def limits_actor() -> DeploymentActorConfig:
    """The actor as Serve starts it beside the Router's replicas, and anew when it has died."""
    return DeploymentActorConfig(name=ACTOR_NAME, actor_class=ray.remote(LimitsActor), actor_options={"num_cpus": 0})


class SharedLimits:
    """A Router replica's way to the actor. While it is down, nobody with limits is let in.

    What is asked while an answer is under way goes together in the next call, so that the actor's work grows with the
    replicas and not with their requests.
    """

    def __init__(self) -> None:
        self._actor: Any = None
        self._asked: Together[Sequence[Want] | Want, Taken | Refused | None] = Together(self._count)

    async def take(self, wants: Sequence[Want]) -> Taken | Refused:
        """See `TokenBuckets.take`. Raises ServiceUnavailable."""
        answer = await self._asked.ask(wants)
        assert answer is not None
        return answer

    async def settle(self, want: Want) -> None:
        """See `TokenBuckets.settle`; nobody waits for it, and it is lost with the actor."""
        self._asked.tell(want)

    async def _count(self, operations: list[Sequence[Want] | Want]) -> list[Taken | Refused | None]:
        for attempt in range(_ATTEMPTS):
            try:
                if self._actor is None:
                    self._actor = await asyncio.to_thread(serve.get_deployment_actor, ACTOR_NAME)
                answers: list[Taken | Refused | None] = await self._actor.count.remote(operations)
                return answers
            except (RayError, ValueError):  # it has died; Serve starts another
                self._actor = None
                await asyncio.sleep(_PAUSE_S * 2**attempt)
        raise ServiceUnavailable("the keys' limits cannot be checked just now; try again")
