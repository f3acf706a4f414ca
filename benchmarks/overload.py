"""Back-pressure on the whole HTTP path: three times the load that the service sustains.

    python benchmarks/overload.py [--seconds 60] [--factor 3] [--max-slowdown X] [--url URL]

Asks real, routed questions of the example tasks, in one run: one after the other (the unloaded latency), by more
clients than the service takes (what it completes then is its sustainable load), and then at `factor` times that rate,
requests arriving at random (Poisson) whatever becomes of the earlier ones. Without `--url` it starts the default
service on this machine, whose cores the clients share, with `engine.max_slowdown` if one is given.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from local_s3 import free_port

TASKS = ("agnews", "dbpedia", "multi30k_deen", "sst2", "tomqa")
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Outcome:
    """What became of one request: its status, its seconds, `Retry-After` if it was refused, and the error."""

    status: int
    seconds: float
    retry_after: str | None
    error: str | None


@dataclass(frozen=True)
class Report:
    """What was measured; times in seconds, rates in requests a second."""

    unloaded: list[float]
    sustainable: float
    offered: float
    accepted: list[float]
    refused: int
    without_retry_after: int
    other: list[str]
    seconds: float

    @property
    def ratio(self) -> float:
        """p99 of what was accepted, of the unloaded one."""
        return percentile(self.accepted, 99) / percentile(self.unloaded, 99)

    def __str__(self) -> str:
        def times(seconds: Sequence[float]) -> str:
            return f"p50 {percentile(seconds, 50):6.2f} s  p99 {percentile(seconds, 99):6.2f} s"

        total = len(self.accepted) + self.refused + len(self.other)
        done = len(self.accepted) / self.seconds
        return "\n".join(
            [
                f"unloaded       {times(self.unloaded)}  ({len(self.unloaded)} requests, one after the other)",
                f"sustainable    {self.sustainable:.2f} requests/s",
                f"offered        {self.offered:.2f} requests/s for {self.seconds:.0f} s: {total} requests",
                f"accepted       {times(self.accepted)}  ({len(self.accepted)} requests, {done:.2f}/s: "
                f"{done / self.sustainable:.2f} of the sustainable load)",
                f"refused (429)  {self.refused}, without Retry-After {self.without_retry_after}",
                f"other          {len(self.other)}",
                *(f"  {n}: {said}" for said, n in Counter(self.other).items()),
                f"p99 accepted / p99 unloaded   {self.ratio:.2f}",
            ]
        )


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Outcome:
    started = time.perf_counter()
    response = await client.post(PATH, json=body)
    seconds = time.perf_counter() - started
    error = None if response.is_success else f"{response.status_code} {response.json()['error']['message']}"
    return Outcome(response.status_code, seconds, response.headers.get("Retry-After"), error)


def fresh(bodies: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same, again and again, with a number before each question: of what comes twice much is known."""
    for n in itertools.count():
        body = bodies[n % len(bodies)]
        [message] = body["messages"]
        yield {**body, "messages": [{**message, "content": f"{n}. {message['content']}"}]}


async def in_turn(client: httpx.AsyncClient, bodies: Iterator[dict[str, Any]], requests: int) -> list[float]:
    """Seconds of requests that are alone."""
    outcomes = [await ask(client, next(bodies)) for _ in range(requests)]
    assert {outcome.status for outcome in outcomes} == {200}
    return [outcome.seconds for outcome in outcomes]


async def saturated(client: httpx.AsyncClient, bodies: Iterator[dict[str, Any]], clients: int, seconds: float) -> float:
    """Requests completed a second while so many clients ask all the time, those refused again when they were told."""
    end = time.perf_counter() + seconds
    completed = 0

    async def run() -> None:
        nonlocal completed
        while time.perf_counter() < end:
            outcome = await ask(client, next(bodies))
            if outcome.status == 200:
                completed += time.perf_counter() < end
            else:
                await asyncio.sleep(float(outcome.retry_after or 1))

    await asyncio.gather(*(run() for _ in range(clients)))
    return completed / seconds


async def arriving(
    client: httpx.AsyncClient, bodies: Iterator[dict[str, Any]], rate: float, seconds: float
) -> list[Outcome]:
    """Outcomes of requests that arrive at random, so many a second."""
    gaps = random.Random(0)
    tasks = []
    next_at = started = time.perf_counter()
    while (next_at := next_at + gaps.expovariate(rate)) < started + seconds:
        await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(client, next(bodies))))
    return list(await asyncio.gather(*tasks))


async def measure(
    url: str,
    bodies: Sequence[dict[str, Any]],
    *,
    factor: float = 3.0,
    seconds: float = 60.0,
    alone: int = 100,
    clients: int = 16,
    saturate_s: float = 20.0,
) -> Report:
    """Measure a service that has nothing else to do."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        asked = fresh(bodies)
        await in_turn(client, asked, len(bodies))  # adapters are resident then
        unloaded = await in_turn(client, asked, alone)
        sustainable = await saturated(client, asked, clients, saturate_s)
        offered = factor * sustainable
        outcomes = await arriving(client, asked, offered, seconds)
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    return Report(
        unloaded,
        sustainable,
        offered,
        [outcome.seconds for outcome in outcomes if outcome.status == 200],
        len(refused),
        sum(not (outcome.retry_after or "").isdigit() or outcome.retry_after == "0" for outcome in refused),
        [outcome.error or "" for outcome in outcomes if outcome.status not in (200, 429)],
        seconds,
    )


def questions(each: int = 4) -> list[dict[str, Any]]:
    """Chats of the example tasks' test questions, of several tasks in turn."""
    from pathlib import Path

    from lorauter.tasks import read_task

    folder = Path(__file__).resolve().parent.parent / "examples" / "tasks"
    tests = [read_task(folder / f"{task}.json").test[:each] for task in TASKS]
    return [
        {"model": "lorauter", "messages": [{"role": "user", "content": example.input}], "max_tokens": 32}
        for row in zip(*tests, strict=True)
        for example in row
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--factor", type=float, default=3)
    parser.add_argument("--max-slowdown", type=float)
    parser.add_argument("--url")
    options = parser.parse_args()
    if options.url:
        print(asyncio.run(measure(options.url, questions(), factor=options.factor, seconds=options.seconds)))
        return

    import ray
    from ray import serve

    from deployments.app import assemble
    from deployments.cluster import LOCAL, connect
    from deployments.config import AppConfig

    config = AppConfig.parse({"engine": {"max_slowdown": options.max_slowdown}})
    port = free_port()
    connect(LOCAL, num_cpus=2)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
    serve.run(assemble(config, {}), name="lorauter")
    try:
        url = f"http://127.0.0.1:{port}"
        print(asyncio.run(measure(url, questions(), factor=options.factor, seconds=options.seconds)))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
