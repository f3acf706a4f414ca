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

logger = logging.getLogger("lorauter.warmup")

NAMES = 256
LIMIT_S = 10.0
_ASK_S = 2.0

P = TypeVar("P", bound=Packed)


async def most_wanted(spec: CacheSpec) -> list[str]:
    """The adapters lately wanted on all nodes together, the most wanted first; of the caches that answer at once."""
    caches = await asyncio.to_thread(running_caches, spec)
    answers = await asyncio.gather(*[_ask(cache) for cache in caches])
    counts: Counter[str] = Counter()
    for answer in answers:
        counts.update(answer)
    return [name for name, _ in counts.most_common(NAMES)]


async def _ask(cache: Any) -> dict[str, float]:
    try:
        async with asyncio.timeout(_ASK_S):
            found: dict[str, float] = await cache.wanted.remote(NAMES)
            return found
    except (RayError, TimeoutError):
        return {}


async def warm_up(
    names: Sequence[str],
    load: Callable[[str], Awaitable[P]],
    place: Callable[[P], Awaitable[None]],
    *,
    room_bytes: int,
    at_once: int,
    limit_s: float = LIMIT_S,
) -> list[str]:
    """Bring adapters to the device, the first named first, until their bytes or the time run out.

    Args:
        load: brings one to host memory.
        place: brings it from there to the device.
        room_bytes: bytes of adapters to load at most.
        at_once: adapters under way at the same time.

    Returns:
        The names on the device.
    """
    warm: list[str] = []
    left = room_bytes

    async def bring(name: str) -> None:
        nonlocal left
        try:
            packed = await load(name)
            if packed.nbytes <= left:
                left -= packed.nbytes
                await place(packed)
                warm.append(name)
        except LorauterError as error:  # gone or unusable meanwhile: the next one
            logger.info("not warmed: %s", error)

    try:
        async with asyncio.timeout(limit_s):
            for first in range(0, len(names), at_once):
                if left <= 0:
                    break
                await asyncio.gather(*[bring(name) for name in names[first : first + at_once]])
    except TimeoutError:
        logger.info("warmed %d of %d adapters in the time there was", len(warm), len(names))
    return warm
