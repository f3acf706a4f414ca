"""More clients than the service has room for; `benchmarks/overload.py` measures more load than it sustains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from overload import Outcome, ask, percentile, questions
from ray import serve

from lorauter.engine import EngineConfig

pytestmark = pytest.mark.integration

ROOM, FEW, MANY = 16, 12, 48  # requests that run or wait; clients


@pytest.fixture
def url(service: Any) -> Iterator[str]:
    """A second engine beside the service's, as it is shipped but for a small queue, with a cache of its own."""
    engine = EngineConfig(max_batch=ROOM // 2, max_queue=ROOM // 2, max_model_len=512)
    cache = service.config.cache.model_copy(update={"directory": f"{service.config.cache.directory}-overload"})
    config = service.config.model_copy(update={"engine": engine, "cache": cache})
    few = {"ray_actor_options": {"num_cpus": 0.05}, "num_replicas": 1}
    serve.run(service.beside(config, model=few, router=few), name="overload", route_prefix="/overload")
    yield f"{service.url}/overload"
    serve.delete("overload")


async def load(url: str, clients: int, seconds: float) -> list[Outcome]:
    """What becomes of the requests of so many clients who ask all the time, those refused again when they were told."""
    bodies, outcomes = questions(each=2), list[Outcome]()
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        end = time.perf_counter() + seconds

        async def run(i: int) -> None:
            while time.perf_counter() < end:
                outcomes.append(await ask(client, bodies[i % len(bodies)]))
                i += clients
                if retry_after := outcomes[-1].retry_after:
                    await asyncio.sleep(min(3.0, float(retry_after)))

        await asyncio.gather(*map(run, range(clients)))
    return outcomes


def test_who_has_no_room_is_refused_and_all_others_are_answered(url: str, alone: None) -> None:
    asyncio.run(load(url, FEW, 5))  # adapters are resident then
    few, many = asyncio.run(load(url, FEW, 10)), asyncio.run(load(url, MANY, 15))
    assert {outcome.status for outcome in few} == {200}
    refused = [outcome for outcome in many if outcome.status == 429]
    answered = [outcome for outcome in many if outcome.status == 200]
    assert len(answered) + len(refused) == len(many), {outcome.error for outcome in many}
    assert refused
    assert all((outcome.retry_after or "").isdigit() and outcome.retry_after != "0" for outcome in refused)
    assert len(answered) / 15 > 0.5 * len(few) / 10
    waits = [[outcome.seconds for outcome in outcomes] for outcomes in (few, answered)]
    assert percentile(waits[1], 90) <= 3 * percentile(waits[0], 90)
