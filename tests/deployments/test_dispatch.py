"""Which replica a call goes to, by what replicas report and what was sent from here; with replicas that only count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import ray

import deployments.dispatch
from deployments.adapter_cache import CacheSpec
from deployments.calls import GenerateCall, Prompt
from deployments.config import CacheSettings
from deployments.dispatch import Dispatch
from deployments.placement import report
from deployments.replicas import Replica
from lorauter.engine.types import SamplingParams
from lorauter.errors import Overloaded
from lorauter.routing import AdapterWeight

SPEC = CacheSpec("s3://bucket/a", CacheSettings())
_numbers = iter(range(1, 10**6))


class FakeReplicas:
    """Replicas that note what is sent to them."""

    def __init__(self, name: str = "here", **reports: dict[str, Any]) -> None:
        self.name = name
        self.reports = reports
        self.ongoing = dict.fromkeys(reports, 0)
        self.sent: list[tuple[str, str, Any]] = []
        self.listeners: list[Callable[[Sequence[Replica]], None]] = []

    def listen(self, listener: Callable[[Sequence[Replica]], None]) -> None:
        self.listeners.append(listener)
        self.tell()

    def tell(self) -> None:
        for listener in self.listeners:
            listener([Replica(name, f"node-of-{name}", raw) for name, raw in self.reports.items()])

    async def arrived(self) -> None:
        assert self.reports

    def call_of(self, replica: str, method: str, call: GenerateCall) -> str:
        self.ongoing[replica] += 1
        self.sent.append((replica, method, call))
        return replica


class FakeCache:
    """A node's cache that keeps what it was told of."""

    def __init__(self) -> None:
        self.told: list[list[tuple[str, str]]] = []
        self.prefetch = self

    def remote(self, keys: list[tuple[str, str]]) -> None:
        self.told.append(keys)


def holds(*adapters: str, **more: Any) -> dict[str, Any]:
    return report([f"{name}@1" for name in adapters], (), (), 0.0, **more)


def wants(*adapters: str, avoid: tuple[str, ...] = ()) -> GenerateCall:
    mixture = tuple(AdapterWeight(name, "1", 1.0) for name in adapters)
    return GenerateCall(Prompt(text="x"), mixture, SamplingParams(), number=next(_numbers), avoid=avoid)


def run(scenario: Callable[[Dispatch, FakeReplicas], Awaitable[None]], **reports: dict[str, Any]) -> None:
    async def whole() -> None:
        replicas = FakeReplicas(**reports)
        made: Any = replicas
        await scenario(Dispatch(made, SPEC, batch=8), replicas)

    asyncio.run(whole())


@pytest.fixture(autouse=True)
def _no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_actor(name: str, namespace: str) -> Any:
        raise ValueError(name)

    monkeypatch.setattr(ray, "get_actor", no_actor)


def refusal(replica: str | None, retry_after_s: float = 60.0) -> Overloaded:
    return Overloaded(f"{replica} is full", retry_after_s=retry_after_s, replica=replica)


def test_a_call_goes_to_the_replica_that_holds_its_adapters() -> None:
    async def scenario(dispatch: Dispatch, replicas: FakeReplicas) -> None:
        call = wants("b")
        assert await dispatch.send(call) == "r1"
        assert replicas.sent == [("r1", "generate", call)]

    run(scenario, r0=holds("a"), r1=holds("b"), r2=holds())


def test_who_has_another_version_has_nothing() -> None:
    async def scenario(dispatch: Dispatch, replicas: FakeReplicas) -> None:
        assert await dispatch.send(wants("a")) == "new"

    run(scenario, old=report(["a@0"], (), (), 0.0), new=holds("a"))


def test_queues_count_what_replicas_say_and_what_was_sent() -> None:
    async def scenario(dispatch: Dispatch, replicas: FakeReplicas) -> None:
        assert dispatch.placement.look() == {"r0": 24, "r1": 0}
        assert await dispatch.send(wants("a")) == "r1", "r0 says it is full"
        replicas.ongoing = {"r0": 2, "r1": 1}
        assert dispatch.placement.look() == {"r0": 26, "r1": 1}, "two were sent since it said so"
        replicas.reports["r0"] = holds("a", calls={"here": 2, "elsewhere": 18})
        replicas.tell()
        assert dispatch.placement.look() == {"r0": 20, "r1": 1}, "they are among those it tells of"
        replicas.ongoing["r0"] = 0
        assert dispatch.placement.look() == {"r0": 18, "r1": 1}, "and have ended"
        replicas.tell()
        assert dispatch.placement.look() == {"r0": 18, "r1": 1}, "an old report is no news"
        replicas.ongoing["r0"] = 30
        replicas.reports["r0"] = holds("a")
        replicas.tell()
        assert dispatch.placement.look()["r0"] == 30, "whatever it says, those from here are there"

    run(scenario, r0=holds("a", calls={"elsewhere": 24}), r1=holds("a"))


def test_what_a_late_report_counts_and_has_ended_is_nobody_elses() -> None:
    """Who asks in bursts is not refused for requests that were answered before the report of them came."""

    async def scenario(dispatch: Dispatch, replicas: FakeReplicas) -> None:
        for _ in range(12):
            await dispatch.send(wants("a"))
        replicas.ongoing["r0"] = 0
        replicas.reports["r0"] = holds("a", calls={"here": 12}, limit=16)
        replicas.tell()
        assert dispatch.placement.look() == {"r0": 0}
        for _ in range(12):
            dispatch.check()
            await dispatch.send(wants("a"))
        replicas.reports["r0"] = holds("a", calls={"here": 12, "elsewhere": 1}, limit=16)
        replicas.tell()
        assert dispatch.placement.look() == {"r0": 13}
        replicas.ongoing["r0"] = 0
        replicas.reports["r0"] = holds("b", calls={"here": 12, "elsewhere": 1}, limit=16)
        replicas.tell()
        assert dispatch.placement.look() == {"r0": 1}

    run(scenario, r0=holds("a", limit=16))


def test_each_of_two_senders_knows_from_the_first_report_what_the_other_has_there() -> None:
    async def scenario() -> None:
        senders: list[Any] = [FakeReplicas(name, r0=holds(limit=16), r1=holds(limit=16)) for name in ("one", "two")]
        one, two = (Dispatch(replicas, SPEC, batch=8) for replicas in senders)

        def report_of(replica: str) -> dict[str, Any]:
            return holds("a", calls={sender.name: sender.ongoing[replica] for sender in senders}, limit=16)

        def tell() -> None:
            for sender in senders:
                sender.reports = {replica: report_of(replica) for replica in ("r0", "r1")}
                sender.tell()

        senders[0].ongoing, senders[1].ongoing = {"r0": 10, "r1": 0}, {"r0": 6, "r1": 3}
        tell()
        assert one.placement.look() == two.placement.look() == {"r0": 16, "r1": 3}
        for dispatch, sender in zip((one, two), senders, strict=True):
            dispatch.check()  # no refusal while another replica has room
            assert await dispatch.send(wants()) == "r1"
            sender.ongoing["r1"] -= 1
        senders[0].ongoing["r0"] = 2
        assert one.placement.look() == {"r0": 8, "r1": 3}, "what has ended here is known at once"
        assert two.placement.look() == {"r0": 16, "r1": 3}, "what has ended there is with the next report"
        senders[1].ongoing["r1"] = 16
        tell()
        assert one.placement.look() == two.placement.look() == {"r0": 8, "r1": 16}
        senders[0].ongoing["r0"] = 10
        tell()
        for dispatch in (one, two):
            with pytest.raises(Overloaded, match="as many requests as it takes"):
                dispatch.check()

    asyncio.run(scenario())


def test_a_refused_call_goes_to_the_next_and_others_hear_of_it() -> None:
    async def scenario(dispatch: Dispatch, replicas: FakeReplicas) -> None:
        assert await dispatch.send(wants("a", avoid=("r0",))) == "r1"
        dispatch.check()
        assert dispatch.goes_on(refusal("r0"))
        assert await dispatch.send(wants("a")) == "r1"
        dispatch.check()
        assert not dispatch.goes_on(refusal("r1"))
        with pytest.raises(Overloaded, match="r1 is full") as caught:
            dispatch.check()
        assert caught.value.retry_after_s == 60.0
        assert not dispatch.goes_on(refusal(None)), "nobody says whose it is"

    run(scenario, r0=holds("a"), r1=holds())


def test_a_refusal_is_remembered_for_a_part_of_the_time_that_it_tells() -> None:
    async def scenario(dispatch: Dispatch, replicas: FakeReplicas) -> None:
        for name in ("r0", "r1"):
            dispatch.goes_on(refusal(name, 0.5))
        assert dispatch.placement.all_refuse(time.monotonic())
        await asyncio.sleep(0.05)
        dispatch.check()

    run(scenario, r0=holds(), r1=holds())


def test_nothing_is_routed_while_every_replica_has_as_many_as_it_takes() -> None:
    """By what they report of their limits, and what is known of their queues: nobody has to be asked."""

    async def scenario(dispatch: Dispatch, replicas: FakeReplicas) -> None:
        replicas.ongoing = {"r0": 12, "r1": 11}
        dispatch.check()
        with pytest.raises(Overloaded, match="as many requests as it takes"):
            dispatch.check(coming=1)
        replicas.ongoing["r1"] = 12
        with pytest.raises(Overloaded, match="as many requests as it takes"):
            dispatch.check()
        replicas.reports = {"r0": replicas.reports["r0"], "r2": {}}
        replicas.ongoing = {"r0": 12, "r2": 3}
        replicas.tell()
        dispatch.check(99)  # nothing is known of r2 yet

    run(scenario, r0=holds(limit=12), r1=holds(limit=12))


def test_a_call_that_waits_is_sent_where_a_row_is_free() -> None:
    async def scenario(dispatch: Dispatch, replicas: FakeReplicas) -> None:
        call = wants("a")
        assert await dispatch.send(call) == "r0"
        replicas.ongoing["r0"] = 9
        assert dispatch.elsewhere(call, 0.1) == ("r0",)
        replicas.ongoing = {"r0": 2, "r1": 2}
        assert dispatch.elsewhere(call, 0.4) == ()
        assert dispatch.elsewhere(call, 0.6) == ("r0",)
        dispatch.ended(call)
        assert dispatch.elsewhere(call, 0.6) == ()

    run(scenario, r0=holds("a"), r1=holds())


def test_a_replicas_node_is_told_which_adapters_are_wanted_there_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.dispatch, "_TOGETHER_S", 0.01)
    caches: dict[str, FakeCache] = {}

    async def scenario(dispatch: Dispatch, replicas: FakeReplicas) -> None:
        monkeypatch.setattr(ray, "get_actor", lambda name, namespace: caches.setdefault(name, FakeCache()))
        await dispatch.send(wants("a"))
        await asyncio.sleep(0.1)  # it looks for the cache meanwhile
        for _ in range(3):
            await dispatch.send(wants("a", "c"))
        await dispatch.send(wants())
        await asyncio.sleep(0.05)

    run(scenario, r0=holds("a", "c"))
    assert {name: cache.told for name, cache in caches.items()} == {
        SPEC.prefix + "node-of-r0": [3 * [("a", "1"), ("c", "1")]]
    }
