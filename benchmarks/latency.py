"""What the ingress costs: the latency of `POST /v1/route` against a bare Serve app with the same hops, and CPU time.

    python benchmarks/latency.py [--requests 300]

The app is the service's own, but for an engine that says as many words as it is asked for, at once. The bare app has
an ingress that calls two deployments in turn, and does nothing else; requests alternate between the two. The time that
the encoder itself takes is measured in its replica, request by request, and subtracted, since any embedding service has
to pay it. Keyed requests go to a second ingress, whose keys have limits. CPU time is that of the ingress replica's
process, Serve's own work in it included, by request and, with streamed answers, by chunk: here one for each word.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import httpx
import psutil
import ray
from local_s3 import free_port
from ray import serve
from starlette.requests import Request
from transformers import AutoTokenizer

import deployments.app
from deployments.calls import Admitted, Begun, GenerateCall
from deployments.cluster import LOCAL, connect
from deployments.config import AppConfig
from deployments.embedder import QueryEmbedder
from deployments.replicas import ReplicaServer, by_name
from deployments.tokenizing import packed
from lorauter.defaults import resolve_model
from lorauter.encoder import Embeddings, Encoder
from lorauter.engine import Chunk
from lorauter.engine.text import TextCodec
from lorauter.engine.types import Prompt
from lorauter.keys import hash_key, new_key

TEXT = "Short movie review: a joy to watch, all {} times.\nDid the critic think positively or negatively of the movie?"
CPUS = {"num_cpus": 0.1}
WORDS, STREAMS = 200, 20
CONTEXT = 8192
WARM = 30


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


@serve.deployment(name="QueryEmbedder", max_ongoing_requests=256)
class TimedEmbedder(QueryEmbedder.func_or_class):  # type: ignore[name-defined, misc]
    def __init__(self, encoder: str, state_model: str | None = None) -> None:
        super().__init__(encoder, state_model)
        self._encoder = TimedEncoder(self._encoder)

    def take_seconds(self) -> list[float]:
        seconds, self._encoder.seconds = self._encoder.seconds, []
        return seconds


@serve.deployment(name="LoraModel")
class Talker:
    def __init__(self, config: AppConfig) -> None:
        self._codec = TextCodec(AutoTokenizer.from_pretrained(resolve_model(config.base_model)))
        self._server = ReplicaServer("LoraModel", by_name(self.generate, self.tokenizer))

    async def record_replica_metadata(self) -> dict[str, Any]:
        return await self._server.metadata()

    async def tokenizer(self) -> bytes:
        return packed(self._codec, CONTEXT)

    async def generate(self, call: GenerateCall) -> AsyncIterator[Begun | Chunk]:
        [word] = self._codec.encode(Prompt(text=" word"))
        for i in range(1, call.sampling.max_tokens + 1):
            chunk = Chunk("", (word,), "length" if i == call.sampling.max_tokens else None)
            yield chunk if i > 1 else Begun(Admitted(20), chunk)


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


def app(config: AppConfig) -> serve.Application:
    """The service with an engine and an encoder that are measured by."""
    options = {name: {"ray_actor_options": CPUS} for name in deployments.app.DEPLOYMENTS}
    with mock.patch.multiple(deployments.app, QueryEmbedder=TimedEmbedder, LoraModel=Talker):
        return deployments.app.assemble(config, options)


def process_of(replica: str) -> psutil.Process:
    """The process of a deployment's only replica, which Ray names after it."""
    [found] = [
        process
        for process in psutil.Process().children(recursive=True)
        if " ".join(process.cmdline()).startswith(f"ray::ServeReplica:{replica}")
    ]
    return found


def cpu_ms(process: psutil.Process, work: Callable[[], int]) -> float:
    """Milliseconds of CPU time that a process takes for each thing that is done."""
    before = process.cpu_times()
    done = work()
    after = process.cpu_times()
    return 1000 * (after.user + after.system - before.user - before.system) / done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    requests = parser.parse_args().requests

    port = free_port()
    key = new_key()
    limits = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9}
    os.environ["LATENCY_KEYS"] = json.dumps([{"name": "one", "sha256": hash_key(key), **limits}])
    connect(LOCAL, num_cpus=2)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    serve.run(app(AppConfig()), name="open", route_prefix="/open")
    keyed = AppConfig.parse({"access": {"keys_env": "LATENCY_KEYS"}})
    serve.run(app(keyed), name="keyed", route_prefix="/keyed")
    bare = BareIngress.bind(Echo.options(name="First").bind(), Echo.options(name="Second").bind())
    serve.run(bare, name="bare", route_prefix="/bare")
    timed = {name: serve.get_deployment_handle("QueryEmbedder", name) for name in ("open", "keyed")}
    paths = {"open": "/open/v1/route", "keyed": "/keyed/v1/route", "bare": "/bare"}
    headers = {"Authorization": f"Bearer {key}"}
    numbers = itertools.count()  # of a text that comes again the embedding is known
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:

        def route(path: str) -> float:
            text = TEXT.format(next(numbers))
            started = time.perf_counter()
            client.post(path, json={"input": text}).raise_for_status()
            return time.perf_counter() - started

        times: dict[str, list[float]] = {name: [] for name in paths}
        for i in range(requests + WARM):
            if i == WARM:
                times = {name: [] for name in paths}
                for handle in timed.values():
                    handle.take_seconds.remote().result()
            for name, path in paths.items():
                times[name].append(route(path))
        encoding = {name: handle.take_seconds.remote().result() for name, handle in timed.items()}

        def routes(name: str) -> int:
            with ThreadPoolExecutor(8) as pool:
                return len(list(pool.map(route, [paths[name]] * requests)))

        def streams(model: str, words: int) -> int:
            def stream(_: int) -> None:
                messages = [{"role": "user", "content": TEXT.format(next(numbers))}]
                body = {"model": model, "messages": messages, "stream": True, "max_tokens": words}
                text = client.post("/open/v1/chat/completions", json=body).raise_for_status().text
                assert text.count(" word") == words

            with ThreadPoolExecutor(8) as pool:
                return len(list(pool.map(stream, range(STREAMS * (10 if words == 1 else 1)))))

        ingress = process_of("open:Router")
        streams("base", WORDS)
        calls = cpu_ms(process_of("bare:BareIngress"), lambda: routes("bare"))
        routing = cpu_ms(ingress, lambda: routes("open"))
        short = cpu_ms(ingress, lambda: streams("base", 1))
        long = cpu_ms(ingress, lambda: streams("base", WORDS))
    ratios = {}
    waits = statistics.median(times["bare"])
    for name in ("open", "keyed"):
        own = statistics.median(encoding[name])
        whole = statistics.median(times[name])
        net = statistics.median(a - b for a, b in zip(times[name], encoding[name], strict=True))
        ratios[name] = net / waits
        print(f"/v1/route, {name:5}   {1000 * whole:7.2f} ms (median of {requests})")
        print(f"  encoder's own    {1000 * own:7.2f} ms")
        print(f"  without encoder  {1000 * net:7.2f} ms")
    print(f"bare two-hop app   {1000 * waits:7.2f} ms")
    print(f"ratio_keyed        {ratios['keyed']:7.2f}")
    print(f"ratio              {ratios['open']:7.2f}")
    print(f"cpu_ms_bare        {calls:7.2f}")
    print(f"cpu_ms_route       {routing:7.2f}")
    print(f"cpu_ms_stream      {short:7.2f}")
    print(f"cpu_ms_chunk       {(long - short) / (WORDS - 1):7.3f}")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
