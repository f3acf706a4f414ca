"""Limits per minute that hold for a key as a whole, however many replicas the ingress has.

`TokenBuckets` counts; one actor of the Router deployment holds the buckets, and `SharedLimits` asks it. Knows
nothing of keys' secrets or HTTP. The actor's state dies with it: then every bucket is full again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import DeploymentActorConfig

from lorauter.errors import ServiceUnavailable

ACTOR_NAME = "limits"
_MINUTE_S = 60.0
_ATTEMPTS = 6


class TokenBuckets:
    """A bucket for each name: it holds a minute's allowance at most, and fills evenly.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}  # what is left, and when that was so

    def take(self, name: str, amount: float, per_minute: int) -> float:
        """Take an amount, if it is there: 0.0; else nothing is taken, and the seconds are told until it will be.

        What is more than a whole bucket is taken from a full one, which then owes the rest.
        """
        level = self._level(name, per_minute)
        needed = min(amount, float(per_minute))
        if level < needed:
            return max((needed - level) * _MINUTE_S / per_minute, 1e-3)
        self._levels[name] = level - amount, self._clock()
        return 0.0

    def settle(self, name: str, amount: float, per_minute: int) -> None:
        """Take what an answer took beyond what was taken for it; a negative amount gives back. May leave a debt."""
        self._levels[name] = min(self._level(name, per_minute) - amount, float(per_minute)), self._clock()

    def _level(self, name: str, per_minute: int) -> float:
        level, since = self._levels.get(name, (float(per_minute), 0.0))
        return min(float(per_minute), level + (self._clock() - since) * per_minute / _MINUTE_S)


class LimitsActor:
    """The actor's body; see `TokenBuckets`."""

    def __init__(self) -> None:
        self._buckets = TokenBuckets()

    async def take(self, name: str, amount: float, per_minute: int) -> float:
        """See `TokenBuckets.take`."""
        return self._buckets.take(name, amount, per_minute)

    async def settle(self, name: str, amount: float, per_minute: int) -> None:
        """See `TokenBuckets.settle`."""
        self._buckets.settle(name, amount, per_minute)


def limits_actor() -> DeploymentActorConfig:
    """The actor as Serve starts it beside the Router's replicas, and anew when it has died."""
    return DeploymentActorConfig(name=ACTOR_NAME, actor_class=ray.remote(LimitsActor), actor_options={"num_cpus": 0})


class SharedLimits:
    """A Router replica's way to the actor. While it is down, nobody with limits is let in."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def take(self, name: str, amount: float, per_minute: int) -> float:
        """See `TokenBuckets.take`. Raises ServiceUnavailable."""
        for attempt in range(_ATTEMPTS):
            try:
                if self._actor is None:
                    self._actor = await asyncio.to_thread(serve.get_deployment_actor, ACTOR_NAME)
                wait: float = await self._actor.take.remote(name, amount, per_minute)
                return wait
            except (RayError, ValueError):  # it has died; Serve starts another
                self._actor = None
                await asyncio.sleep(0.1 * 2**attempt)
        raise ServiceUnavailable("the keys' limits cannot be checked just now; try again")

    async def settle(self, name: str, amount: float, per_minute: int) -> None:
        """See `TokenBuckets.settle`; nobody waits for it, and it is lost with the actor."""
        if self._actor is not None:
            self._actor.settle.remote(name, amount, per_minute)
