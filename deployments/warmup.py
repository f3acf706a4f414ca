"""A new replica takes in the adapters in demand before it takes traffic.

Demand is what the node caches have seen wanted, on all nodes. A courtesy: bounded in time and bytes, and no failure
of it stops a replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayError

from deployments.adapter_cache import CacheSpec, running_caches
from deployments.host_adapters import Packed
from lorauter.errors import LorauterError
from lorauter.names import AdapterKey

logger = logging.getLogger("lorauter.warmup")

LIMIT_S = 10.0
_ASK_S = 2.0
_MOST = 256

P = TypeVar("P", bound=Packed)


async def most_wanted(spec: CacheSpec) -> list[AdapterKey]:
    """The adapters lately wanted on all nodes together, the most wanted first; of the caches that answer at once."""
    return [key for key, _ in (await demand_for(spec, _MOST)).most_common(_MOST)]


async def demand_for(spec: CacheSpec, most: int) -> Counter[AdapterKey]:
    """How much adapters were wanted lately on all nodes together, of so many of each node."""
    caches = await asyncio.to_thread(running_caches, spec)
    answers = await asyncio.gather(*[_ask(cache, most) for cache in caches])
    counts: Counter[AdapterKey] = Counter()
    for answer in answers:
        counts.update(answer)
    return counts


async def _ask(cache: Any, most: int) -> dict[AdapterKey, float]:
    try:
        async with asyncio.timeout(_ASK_S):
            found: dict[AdapterKey, float] = await cache.wanted.remote(most)
            return found
    except (RayError, TimeoutError):
        return {}


async def warm_up(
    adapters: Sequence[AdapterKey],
    load: Callable[[AdapterKey], Awaitable[P]],
    place: Callable[[P], Awaitable[None]],
    *,
    room_bytes: int,
    at_once: int,
    limit_s: float = LIMIT_S,
) -> list[AdapterKey]:
    """Bring adapters to the device, the first named first, until their bytes or the time run out.

    Args:
        load: brings one to host memory.
        place: brings it from there to the device.
        room_bytes: bytes of adapters to load at most.
        at_once: adapters under way at the same time.

    Returns:
        Those on the device.
    """
    warm: list[AdapterKey] = []
    left = room_bytes

    async def bring(key: AdapterKey) -> None:
        nonlocal left
        try:
            packed = await load(key)
            if packed.nbytes <= left:
                left -= packed.nbytes
                await place(packed)
                warm.append(key)
        except LorauterError as error:  # gone or unusable meanwhile: the next one
            logger.info("not warmed: %s", error)

    try:
        async with asyncio.timeout(limit_s):
            for first in range(0, len(adapters), at_once):
                if left <= 0:
                    break
                await asyncio.gather(*[bring(key) for key in adapters[first : first + at_once]])
    except TimeoutError:
        logger.info("warmed %d of %d adapters in the time there was", len(warm), len(adapters))
    return warm
