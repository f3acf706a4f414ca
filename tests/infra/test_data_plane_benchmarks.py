"""Benchmarks that put something of their own into the service: it still fits, and answers what is asked of it."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import cluster
import latency
import numpy as np
import overload
import uvicorn
from fake_service import FakeService
from local_s3 import free_port
from ray.serve import Application

import deployments.app
from deployments.api import build_api
from deployments.calls import Admitted, GenerateCall
from deployments.config import ApiSettings, AppConfig
from deployments.placement import Placement
from deployments.retries import generated
from deployments.rpc import RpcCall, RpcClient, RpcServer
from deployments.tokenizing import Tokenizing
from lorauter.encoder import HashingEncoder
from lorauter.engine.types import Chunk, Prompt, SamplingParams
from lorauter.errors import Overloaded

CONFIG = AppConfig(adapters="s3://bucket/adapters", catalog="s3://bucket/catalog")


class ToOne:
    """Sends every call to one server."""

    def __init__(self, client: RpcClient) -> None:
        self._client = client

    async def send(self, call: GenerateCall) -> RpcCall:
        return self._client.call("generate", call)

    def ended(self, call: GenerateCall) -> None:
        pass

    def goes_on(self, refusal: Overloaded) -> bool:
        return False

    def elsewhere(self, call: GenerateCall, waited: float) -> tuple[str, ...]:
        return ()


def test_latencys_engine_says_as_many_words_as_it_is_asked_for() -> None:
    async def run() -> list[Admitted | Chunk]:
        talker = latency.Talker.func_or_class(AppConfig())
        server = RpcServer({"generate": talker.generate, "tokenizer": talker.tokenizer})
        client = RpcClient(await server.start("127.0.0.1"))
        tokenizing = Tokenizing(lambda: client.call("tokenizer"))
        call = GenerateCall(Prompt(text=latency.TEXT), (), SamplingParams(max_tokens=3))
        try:
            asked, words = await tokenizing.asked(call)
            return [words.of(item) async for item in generated(ToOne(client), asked, timeout_s=20)]
        finally:
            client.close()
            server.close()

    admitted, *chunks = asyncio.run(run())
    assert isinstance(admitted, Admitted)
    assert Chunk.joined([chunk for chunk in chunks if isinstance(chunk, Chunk)]).text == " word" * 3
    assert [chunk.finish_reason for chunk in chunks if isinstance(chunk, Chunk)] == [None, None, "length"]


def test_latencys_app_is_the_services_own_but_for_an_engine_and_an_encoder_that_are_measured_by() -> None:
    bound = latency.app(CONFIG)._bound_deployment
    assert bound.name == "Router"
    below = [one._bound_deployment for one in bound.init_args if isinstance(one, Application)]
    parts = {part.name: part for part in below}
    own = {"QueryEmbedder": latency.TimedEmbedder, "LoraModel": latency.Talker}
    assert {name: parts[name].func_or_class for name in own} == {n: of.func_or_class for n, of in own.items()}
    assert set(parts) | {"Router"} == set(deployments.app.DEPLOYMENTS)
    for part in own.values():
        real = getattr(deployments.app, part.name).func_or_class
        given = range(len(inspect.signature(real.__init__).parameters))
        inspect.signature(part.func_or_class.__init__).bind(*given)
    timed = latency.TimedEncoder(HashingEncoder(8))
    assert np.array_equal(timed.encode(["a"]), HashingEncoder(8).encode(["a"])) and len(timed.seconds) == 1


def test_clusters_choice_of_replicas_is_asked_as_placement_is() -> None:
    asked = [*inspect.signature(Placement.rank).parameters.values()][1:]
    args = [object(), {"one": 3, "two": 1}, 0.0][: sum(p.kind is not p.KEYWORD_ONLY for p in asked)]
    named: dict[str, Any] = {p.name: () for p in asked if p.kind is p.KEYWORD_ONLY}
    assert cluster.by_load(*args, **named) == ["two", "one"]
    assert issubclass(cluster.ByLoad, cluster.Router.func_or_class)
    assert set(cluster.DEPLOYMENTS) == set(deployments.app.DEPLOYMENTS)


def test_neither_asks_anything_twice() -> None:
    bodies = overload.fresh(overload.questions(1))
    asked = [next(bodies)["messages"][0]["content"] for _ in range(50)]
    assert len(set(asked)) == 50
    assert len({latency.TEXT.format(n) for n in range(50)}) == 50


def test_overload_measures_what_answers_over_http() -> None:
    async def run() -> overload.Report:
        app, port = build_api(FakeService(), ApiSettings()), free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, lifespan="off", log_level="critical", ws="none"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            few = {"seconds": 0.2, "alone": 3, "clients": 2, "saturate_s": 0.2}
            return await overload.measure(f"http://127.0.0.1:{port}", overload.questions(1), **few)
        finally:
            server.should_exit = True
            await serving

    report = asyncio.run(run())
    assert report.sustainable > 0 and report.accepted and not report.refused and not report.other
    assert "p99 accepted / p99 unloaded" in str(report)
