"""LoraModel follows its load from zero to two replicas and back, and loses nothing on the way."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from ray import serve

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),  # else it is 10 s
]

APP = "scaling"
SMALL = {"ray_actor_options": {"num_cpus": 0.01}}
SCALING = {
    "min_replicas": 0,
    "max_replicas": 2,
    "target_ongoing_requests": 3,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 20,
    "downscale_to_zero_delay_s": 3,
    "metrics_interval_s": 0.2,
    "look_back_period_s": 1,
}
COUNTING = "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25"


@pytest.fixture
def url(service: Any) -> Iterator[str]:
    """A second model beside the session's, with caches of its own, which has no replica yet."""
    cache = service.config.cache.model_copy(update={"directory": f"{service.config.cache.directory}-{APP}"})
    api = service.config.api.model_copy(update={"first_token_s": 400.0})  # a replica starts for it, on a slow machine
    config = service.config.model_copy(update={"cache": cache, "api": api})
    model = {**SMALL, "autoscaling_config": SCALING}
    router = {**SMALL, "num_replicas": 1}  # which knows where its calls are: two streams are with two
    serve.run(service.beside(config, model=model, router=router), name=APP, route_prefix=f"/{APP}")
    yield f"{service.url}/{APP}"
    serve.delete(APP)


def running() -> int:
    return serve.status().applications[APP].deployments["LoraModel"].replica_states.get("RUNNING", 0)


def others() -> dict[str, dict[str, int]]:
    """The replicas of all that is not to follow that load, by their states.

    Without the session's CatalogEditor, which goes some minutes after the last change that another test made.
    """
    found = {
        f"{app} {name}": dict(part.replica_states)
        for app, running in serve.status().applications.items()
        for name, part in running.deployments.items()
        if name != "CatalogEditor"
    }
    del found[f"{APP} LoraModel"]
    return found


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, serve.status().applications[APP]
        await asyncio.sleep(0.5)  # Serve's status takes two tenths of a second of CPU time


async def until_running(number: int) -> None:
    async def condition() -> bool:
        return await asyncio.to_thread(running) == number

    await until(condition)


async def replicas(handle: Any, number: int) -> list[dict[str, Any]]:
    """The stats of as many replicas; many ask together, so that the busier one is asked as well."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(20):
        for stats in await asyncio.gather(*[handle.stats.remote() for _ in range(64)]):
            found[stats["replica"]] = stats
        if len(found) == number:
            return list(found.values())
    raise AssertionError(f"found {len(found)} replicas, not {number}")


class Client:
    """Asks the app; every answer is checked, so that one that is lost, or cut short, fails the test."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.answers = 0

    async def ask(self, model: str, max_tokens: int = 4) -> str:
        body = {"model": model, "prompt": COUNTING, "max_tokens": max_tokens}
        answer = await self._http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        self.answers += 1
        return str(answer.json()["choices"][0]["text"])

    async def stream(self, max_tokens: int) -> None:
        body = {"model": "base", "prompt": COUNTING, "max_tokens": max_tokens, "stream": True}
        body["stream_options"] = {"include_usage": True}
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            events = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
        assert events[-1] == "[DONE]", events[-1]
        *chunks, usage = [json.loads(event) for event in events[:-1]]
        assert chunks[-1]["choices"][0]["finish_reason"] in ("length", "stop")
        assert usage["usage"]["completion_tokens"] > 0
        self.answers += 1

    @asynccontextmanager
    async def load(self, clients: int, what: Callable[[], Any]) -> AsyncIterator[None]:
        """So many clients ask again and again; on leaving, all are answered."""
        going = True

        async def one() -> None:
            while going:
                await what()

        tasks = [asyncio.create_task(one()) for _ in range(clients)]
        try:
            yield
        finally:
            going = False
            await asyncio.gather(*tasks)


def test_replicas_follow_the_load_and_no_request_is_lost(url: str, alone: None) -> None:
    """Alone: its clients would keep others from their cores for minutes, and those its replicas."""

    async def whole() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=400) as http:
            await scenario(Client(http))

    async def scenario(client: Client) -> None:
        assert running() == 0
        before = others()
        assert before[f"{APP} Router"] == {"RUNNING": 1}
        await client.ask("sst2")  # waits for the first replica
        assert running() == 1
        for name in ("rte", "tomqa"):
            await client.ask(name)

        handle = serve.get_deployment_handle("LoraModel", APP)

        async def both_answer() -> bool:
            return all(stats["device"]["hits"] > 3 for stats in await replicas(handle, 2))

        async with client.load(10, lambda: client.ask("sst2", 24)):
            await until_running(2)
            for stats in await replicas(handle, 2):  # the second one never answered under these two: it was warmed
                assert {"rte", "tomqa"} <= {name for name, _ in stats["resident"]}
            await until(both_answer)

        async def a_stream_on_each() -> bool:
            return all(stats["running"] == 1 for stats in await replicas(handle, 2))

        asked = client.answers
        async with client.load(2, lambda: client.stream(100)):
            await until(a_stream_on_each)
            await until_running(1)
        assert client.answers >= asked + 2
        await until_running(0)
        assert others() == before

    asyncio.run(whole())
