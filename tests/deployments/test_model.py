"""What a replica does with a mixture of which something cannot be had; tests/integration has whole replicas."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import counting
import pytest

import deployments.model
from deployments.calls import Admitted, Begun, Choice, GenerateCall, Prompt
from deployments.model import LoraModel
from deployments.placement import holdings
from lorauter.engine import Chunk, EngineConfig, MultiLoraEngine, SamplingParams
from lorauter.errors import (
    AdapterError,
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    InvalidRequest,
    Overloaded,
)
from lorauter.names import AdapterKey
from lorauter.routing import AdapterWeight, LeftOut

A, B, C = (AdapterWeight(name, "1", weight) for name, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2)))
CALL = GenerateCall(Prompt(text="?"), (A, B, C), SamplingParams(), routed=True)


@dataclass(frozen=True)
class Packed:
    key: AdapterKey


class Adapters:
    """A host tier in which some adapters fail, "slow" takes its time, and all are asked patiently or not."""

    def __init__(self, **errors: AdapterError) -> None:
        self._errors = errors
        self.patient: set[bool] = set()

    def ready(self, keys: Sequence[AdapterKey]) -> list[Packed] | None:
        return None if keys else []

    async def get(self, key: AdapterKey, *, patient: bool) -> Packed:
        self.patient.add(patient)
        if key.name == "slow":
            await asyncio.sleep(60)
        if key.name in self._errors:
            raise self._errors[key.name]
        return Packed(key)


def mix(call: GenerateCall, adapters: Adapters) -> tuple[dict[str, float], tuple[LeftOut, ...]]:
    replica: Any = object.__new__(LoraModel.func_or_class)
    replica._adapters, replica._adapter_wait_s = adapters, 0.05
    mixture, left_out = asyncio.run(replica._mixture(call))
    return {packed.key.name: weight for packed, weight in mixture}, left_out


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (AdapterNotFound("gone", adapter="a"), "not_found"),
        (AdapterRejected("broken", adapter="a"), "rejected"),
        (AdapterUnavailable("down", adapter="a"), "unavailable"),
    ],
)
def test_a_routed_mixture_goes_on_without_what_cannot_be_had(error: AdapterError, cause: Any) -> None:
    adapters = Adapters(a=error)
    mixture, left_out = mix(CALL, adapters)
    assert mixture == pytest.approx({"b": 0.6, "c": 0.4})
    assert left_out == (LeftOut("a", "1", cause),)
    assert adapters.patient == {False}


def test_what_takes_too_long_is_left_out_too() -> None:
    mixture, left_out = mix(replace(CALL, adapters=(A, AdapterWeight("slow", "1", 0.5))), Adapters())
    assert mixture == {"a": 1.0}
    assert left_out == (LeftOut("slow", "1", "unavailable"),)


def test_where_all_is_well_weights_stay_to_the_last_bit() -> None:
    odd = (AdapterWeight("a", "1", 0.1), AdapterWeight("b", "1", 0.2))
    assert mix(replace(CALL, adapters=odd), Adapters()) == ({"a": 0.1, "b": 0.2}, ())


def test_where_nothing_is_left_the_first_error_is_told() -> None:
    errors = {name: AdapterRejected("broken", adapter=name) for name in "abc"}
    with pytest.raises(AdapterRejected, match="'a'"):
        mix(CALL, Adapters(**errors))


@dataclass
class Pace:
    """A request takes `each` seconds beside none, and so much more for each other one."""

    each: float

    @property
    def seconds_alone(self) -> float:
        return self.each

    @property
    def turnover_s(self) -> float:
        return self.seconds(16) / 16

    def seconds(self, requests: int) -> float:
        return self.each * (1 + 0.1 * (requests - 1)) * max(1, requests / 16)


def queueing(here: int, each: float, **engine: Any) -> Any:
    """A replica with so many requests, for whose first tokens clients wait 60 s."""
    replica: Any = object.__new__(LoraModel.func_or_class)
    config = EngineConfig(**engine)
    load = (min(here, config.rows), max(0, here - config.rows))
    replica._engine, replica._first_token_s = (
        SimpleNamespace(config=config, pace=Pace(each), load=load, close=lambda: None),
        60.0,
    )
    return replica


@pytest.mark.parametrize(
    ("each", "engine", "limit"),
    [
        (0.0, {}, 16 + 256),  # nothing is known of the pace: the shipped bound
        (0.1, {}, 16 + 256),
        (4.0, {}, 16 + 64),  # 10 s a batch: of 64 that wait the last begins after 40 s
        (4.0, {"max_queue": 8}, 16 + 8),
        (100.0, {}, 16 + 2),
        (0.1, {"max_slowdown": 2.0}, 11),
        (100.0, {"max_slowdown": 3.0}, 16 + 1),  # the next would take three times as long as alone
    ],
)
def test_a_replica_takes_no_more_than_begin_in_time(each: float, engine: dict[str, Any], limit: int) -> None:
    """What it tells the routers of its limit is what it keeps to, and the shipped one takes a burst of 64."""
    assert queueing(0, each, **engine)._limit() == limit
    if "max_slowdown" in engine:  # the engine keeps to that itself
        return
    queueing(limit - 1, each, **engine)._check_wait()
    with pytest.raises(Overloaded, match=f"{limit} requests run and wait"):
        queueing(limit, each, **engine)._check_wait()


def test_a_report_tells_tiers_calls_limit_and_pace_and_is_no_longer_for_many_adapters() -> None:
    def told(held: int) -> dict[str, Any]:
        keys = [AdapterKey(f"adapter-{i}", "1") for i in range(held)]
        replica = queueing(20, 4.0)
        replica._server = SimpleNamespace(ongoing=0, ongoing_by={"one": 12, "other": 8})
        replica._engine.counters = SimpleNamespace(resident=keys)
        replica._adapters = SimpleNamespace(resident=keys)
        replica._on_disk = b""

        async def resident() -> bytes:
            return holdings(map(str, keys))

        replica._node_cache = SimpleNamespace(holdings=resident)
        found: dict[str, Any] = asyncio.run(replica.record_routing_stats())
        return found

    few, many = told(2), told(10_000)
    assert few["device"] == few["host"] == few["disk"] == holdings(["adapter-0@1", "adapter-1@1"])
    assert (few["calls"], few["limit"]) == ({"one": 12, "other": 8}, 16 + 64)
    assert 2 ** (few["pace"] / 4) == pytest.approx(10.0, rel=0.1)
    assert len(pickle.dumps(few)) == len(pickle.dumps(many)) < 4096


def test_who_names_adapters_gets_the_error() -> None:
    adapters = Adapters(b=AdapterUnavailable("down", adapter="b"))
    with pytest.raises(AdapterUnavailable, match="'b'"):
        mix(replace(CALL, routed=False), adapters)
    assert adapters.patient == {True}
    assert mix(replace(CALL, adapters=()), Adapters()) == ({}, ())


@pytest.fixture
def replica() -> Iterator[Any]:
    """One whose model counts."""
    made: Any = object.__new__(LoraModel.func_or_class)
    config = EngineConfig(max_batch=16, max_model_len=1 << 12, adapter_bytes=1 << 12, device="cpu")
    made._engine = MultiLoraEngine(*counting.load(), config)
    made._adapters, made._adapter_wait_s, made._first_token_s, made._streams = Adapters(), 1.0, 60.0, 0
    yield made
    made._engine.close()


@pytest.mark.parametrize("begun", [False, True])
def test_a_refusal_says_whose_it_is(begun: bool, replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r7"))
    monkeypatch.setattr(deployments.model.serve, "get_replica_context", lambda: here)

    async def answer(*_: Any, **__: Any) -> AsyncGenerator[Chunk]:
        if begun:
            yield Chunk("b", (98,))
        raise Overloaded("full", retry_after_s=2)

    monkeypatch.setattr(replica._engine, "stream", answer)
    heard = []

    async def listen() -> None:
        async for item in replica.generate(replace(CALL, adapters=())):
            heard.append(item)  # noqa: PERF401 (what came before the error counts)

    with pytest.raises(Overloaded) as refused:
        asyncio.run(listen())
    assert refused.value.replica == "r7" and heard == [Begun(Admitted(1), Chunk("b", (98,)))] * begun


def said(replica: Any, calls: int, *, whole: bool) -> list[list[Any]]:
    """What a replica says to as many calls at once of 200 tokens each."""
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    call = GenerateCall(Prompt(text="a"), (), sampling, whole=whole)

    async def one() -> list[Any]:
        return [item async for item in replica.generate(call)]

    async def run() -> list[list[Any]]:
        return await asyncio.gather(*(one() for _ in range(calls)))

    return asyncio.run(run())


def test_a_whole_answer_is_a_message_or_two_and_a_streams_are_fewer_the_more_there_are(
    replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.model, "_KEPT_S", 60.0)
    replica._first_token_s = 240.0
    shorts = said(replica, 3, whole=True)
    assert [(type(item), item.chunk.finish_reason) for [item] in shorts] == [(Begun, "length")] * 3
    assert shorts[0][0].chunk.kept_s > 0
    monkeypatch.setattr(deployments.model, "_KEPT_S", 0.0)
    (begun, rest), *_ = wholes = said(replica, 3, whole=True)
    assert [len(items) for items in wholes] == [2] * 3
    assert shorts[0][0].chunk.text == begun.chunk.text + rest.text and begun.chunk.kept_s == 0
    assert (begun.admitted, begun.chunk.text[0], rest.finish_reason) == (Admitted(1), "b", "length")
    [alone] = said(replica, 1, whole=False)
    assert replica._streams == 0
    many = said(replica, 16, whole=False)
    for items in (alone, *many):
        assert isinstance(items[0], Begun)
        chunks = [items[0].chunk, *items[1:]]
        assert sum(len(chunk.token_ids) for chunk in chunks) == 200
        assert Chunk.joined(chunks).text == begun.chunk.text + rest.text
    assert sum(map(len, many)) < 16 * 200 / 2
    gaps = []
    for replica._streams in (1, 2, 16):
        gaps.append(replica._gap())
    assert gaps[0] == 0 < gaps[1] < gaps[2]


def test_several_answers_to_one_prompt_go_on_where_each_was_left(replica: Any) -> None:
    sampling = SamplingParams(max_tokens=5, logprobs=0)
    choices = (Choice(0), Choice(2, (98, 99)))
    call = GenerateCall(Prompt(text="a"), (), sampling, choices=choices, tells_prompt=True)

    def listen(call: GenerateCall) -> list[Any]:
        async def run() -> list[Any]:
            return [item async for item in replica.generate(call)]

        return asyncio.run(run())

    begun, *rest = listen(call)
    assert begun.admitted.prompt == ((97, b"a"),)
    said = {index: [one for one in (begun.chunk, *rest) if one.index == index] for index in (0, 2)}
    assert {index: Chunk.joined(chunks).text for index, chunks in said.items()} == {0: "bcdef", 2: "def"}
    assert all(chunks[-1].finish_reason == "length" for chunks in said.values())
    assert [one.own.token for one in Chunk.joined(said[2]).logprobs] == [b"d", b"e", b"f"]
    with pytest.raises(InvalidRequest) as refused:
        listen(replace(call, choices=tuple(map(Choice, range(16 + 256 + 1)))))
    assert refused.value.param == "n"


def test_a_replica_that_is_to_go_ends_with_its_last_answer() -> None:
    replica: Any = object.__new__(LoraModel.func_or_class)
    ended: list[str] = []
    replica._engine = SimpleNamespace(close=lambda: ended.append("engine"))

    class Server:
        ongoing = 1

        async def drained(self) -> None:
            ended.append("answers")

    replica._server = Server()
    asyncio.run(replica.__del__())
    assert ended == ["answers", "engine"]
    replica._server.ongoing = 0
    assert replica.__del__() is None and ended[2:] == ["engine"]


def test_a_replica_knows_in_which_of_its_tiers_adapters_are() -> None:
    replica: Any = object.__new__(LoraModel.func_or_class)
    replica._adapters = SimpleNamespace(resident=[A.key, B.key])
    replica._engine = SimpleNamespace(counters=SimpleNamespace(resident=[tuple(A.key)]), close=lambda: None)
    assert replica._tiers(CALL) == {}, "nobody asked"
    assert replica._tiers(replace(CALL, tells_tiers=True)) == {A.key: "device", B.key: "host", C.key: None}
