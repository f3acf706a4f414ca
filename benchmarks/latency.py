"""Latency of `POST /v1/route` against a bare Serve app with the same hops, in one run.

    python benchmarks/latency.py [--requests 300]

Both apps have an ingress that calls two other deployments in turn; the bare one does nothing else. Requests
alternate between them. The time that the encoder itself takes is measured in its replica, request by request,
and subtracted, since any embedding service has to pay it.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import Sequence

import httpx
import ray
from ray import serve
from starlette.requests import Request

from deployments.config import AppConfig
from deployments.embedder import QueryEmbedder
from deployments.retriever import TaskRetriever
from deployments.router import Router
from lorauter.defaults import resolve_adapters, resolve_catalog
from lorauter.encoder import Embeddings, Encoder

TEXT = "Short movie review: a joy to watch.\nDid the critic think positively or negatively of the movie?"
CPUS = {"num_cpus": 0.1}


class TimedEncoder:
    """An encoder that keeps the seconds each call took."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.name = encoder.name
        self.seconds: list[float] = []

    def encode(self, texts: Sequence[str]) -> Embeddings:
        started = time.perf_counter()
        vectors = self._encoder.encode(texts)
        self.seconds.append(time.perf_counter() - started)
        return vectors


@serve.deployment(name="QueryEmbedder", max_ongoing_requests=256, ray_actor_options=CPUS)
class TimedEmbedder(QueryEmbedder.func_or_class):  # type: ignore[name-defined, misc]
    def __init__(self, encoder: str) -> None:
        super().__init__(encoder)
        self._encoder = TimedEncoder(self._encoder)

    def take_seconds(self) -> list[float]:
        seconds, self._encoder.seconds = self._encoder.seconds, []
        return seconds


@serve.deployment(ray_actor_options=CPUS)
class Echo:
    async def __call__(self, value: str) -> str:
        return value


@serve.deployment(ray_actor_options=CPUS)
class BareIngress:
    def __init__(self, first: serve.handle.DeploymentHandle, second: serve.handle.DeploymentHandle) -> None:
        self._first, self._second = first, second

    async def __call__(self, request: Request) -> dict[str, str]:
        body = await request.json()
        value = await self._first.remote(body["input"])
        return {"output": await self._second.remote(value)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    requests = parser.parse_args().requests

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = AppConfig(adapters=resolve_adapters("default"), catalog=resolve_catalog("default"))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    embedder = TimedEmbedder.bind(config.encoder)
    retriever = TaskRetriever.options(ray_actor_options=CPUS).bind(config, embedder)
    unused_model = Echo.options(name="LoraModel").bind()
    serve.run(
        Router.options(ray_actor_options=CPUS).bind(config, embedder, retriever, unused_model, None),
        name="lorauter",
        route_prefix="/lorauter",
    )
    serve.run(
        BareIngress.bind(Echo.options(name="First").bind(), Echo.options(name="Second").bind()),
        name="bare",
        route_prefix="/bare",
    )
    timed = serve.get_deployment_handle("QueryEmbedder", "lorauter")
    times: dict[str, list[float]] = {"/lorauter/v1/route": [], "/bare": []}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for i in range(requests + 30):
            if i == 30:  # warm by now
                timed.take_seconds.remote().result()
                times = {path: [] for path in times}
            for path, seconds in times.items():
                started = time.perf_counter()
                client.post(path, json={"input": TEXT}).raise_for_status()
                seconds.append(time.perf_counter() - started)
    encoding = timed.take_seconds.remote().result()
    routed = [total - own for total, own in zip(times["/lorauter/v1/route"], encoding, strict=True)]
    ours, bare = statistics.median(routed), statistics.median(times["/bare"])
    print(f"/v1/route          {1000 * statistics.median(times['/lorauter/v1/route']):7.2f} ms (median of {requests})")
    print(f"  encoder's own    {1000 * statistics.median(encoding):7.2f} ms")
    print(f"  without encoder  {1000 * ours:7.2f} ms")
    print(f"bare two-hop app   {1000 * bare:7.2f} ms")
    print(f"ratio              {ours / bare:7.2f}")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
