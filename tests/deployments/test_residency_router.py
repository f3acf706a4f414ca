"""The shell around the policy, with Serve's real base class and hand-written replicas; integration has the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from deployments.adapter_cache import CacheSpec
from deployments.calls import GenerateCall, Prompt
from deployments.config import CacheSettings
from deployments.placement import placement_of, report
from deployments.residency_router import ResidencyRouter, residency_routing
from lorauter.engine.types import SamplingParams
from lorauter.routing import AdapterWeight

SPEC = CacheSpec("s3://bucket/a", CacheSettings())
DEPLOYMENT = DeploymentID("LoraModel", "lorauter")
Scenario = Callable[[ResidencyRouter, list[Any]], Coroutine[Any, Any, None]]


class FakeReplica:
    """A running replica as Serve's routers see it."""

    max_ongoing_requests = 8

    def __init__(self, name: str, *, device: tuple[str, ...] = (), queue: int = 0) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.node_id = f"node-of-{name}"
        self.routing_stats = report([f"{name}@1" for name in device], (), (), 0.0)
        self.queue = queue
        self.error: Exception | None = None

    async def get_queue_len(self, *, deadline_s: float) -> int:
        if self.error is not None:
            raise self.error
        return self.queue


class FakeCache:
    """A node's cache that keeps what it was told of."""

    def __init__(self) -> None:
        self.told: list[list[tuple[str, str]]] = []
        self.prefetch = self

    def remote(self, keys: list[tuple[str, str]]) -> None:
        self.told.append(keys)


def pending(*adapters: str, avoid: tuple[str, ...] = (), number: int = 0) -> PendingRequest:
    mixture = tuple(AdapterWeight(name, "1", 1.0) for name in adapters)
    call = GenerateCall(Prompt(text="x"), mixture, SamplingParams(), number=number, avoid=avoid)
    return PendingRequest([call], {}, RequestMetadata("request", "internal"))


@pytest.fixture
def route(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`route(scenario, *replicas)`: run `scenario(router, replicas)` with a router that knows the replicas."""

    def no_actor(name: str, namespace: str) -> Any:
        raise ValueError(name)

    monkeypatch.setattr(ray, "get_actor", no_actor)

    def run(
        scenario: Callable[[ResidencyRouter, list[Any]], Coroutine[Any, Any, None]], *replicas: FakeReplica
    ) -> None:
        async def whole() -> None:
            router = ResidencyRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
            router.initialize_state(**residency_routing(SPEC, batch=8).request_router_kwargs)
            router.update_replicas(list(replicas))  # type: ignore[arg-type]
            await asyncio.sleep(0.01)  # Serve asks for the queues
            await scenario(router, list(replicas))

        asyncio.run(whole())

    return run


def test_the_configuration_leads_serve_to_the_router() -> None:
    config = residency_routing(SPEC, batch=5)
    assert config.get_request_router_class() is ResidencyRouter
    assert config.request_router_kwargs == {"batch": 5, "caches": SPEC.prefix}


def test_a_call_goes_to_the_replica_that_holds_its_adapters(route: Callable[..., None]) -> None:
    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        request = pending("b")
        [first, *_] = await router.choose_replicas(replicas, request)
        assert first == [replicas[1]]
        assert request.routing_context.should_backoff, "or Serve asks full replicas again without a pause"

    route(scenario, FakeReplica("r0", device=("a",)), FakeReplica("r1", device=("b",)), FakeReplica("r2"))


def test_who_has_another_version_has_nothing(route: Callable[..., None]) -> None:
    old, new = FakeReplica("old"), FakeReplica("new")
    old.routing_stats, new.routing_stats = (report([f"a@{version}"], (), (), 0.0) for version in "01")

    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        assert (await router.choose_replicas(replicas, pending("a")))[0] == [new]

    route(scenario, old, new)


def test_queues_count_what_replicas_say_and_what_was_sent(route: Callable[..., None]) -> None:
    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        assert (await router.choose_replicas(replicas, pending("a")))[0] == [replicas[1]], "r0 says it is full"
        for _ in range(12):
            router.on_send_request(replicas[1].replica_id)
        router.replica_queue_len_cache.invalidate_key(replicas[1].replica_id)  # as it does after a while
        assert (await router.choose_replicas(replicas[1:], pending("a")))[0] == [replicas[2]]
        for _ in range(13):
            router.on_request_completed(replicas[1].replica_id, "internal")
        firsts = [(await router.choose_replicas(replicas[1:], pending("a")))[0][0] for _ in range(30)]
        assert set(map(id, firsts)) == set(map(id, replicas[1:])), "idle again, and both have it now"

    replicas = [FakeReplica("r0", device=("a",), queue=24), FakeReplica("r1", device=("a",)), FakeReplica("r2")]
    route(scenario, *replicas)


def test_a_refused_call_goes_to_the_next_and_others_hear_of_it(route: Callable[..., None]) -> None:
    """What the ingress notes of a refusal counts for all its calls, as it asks the same policy."""

    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        assert (await router.choose_replicas(replicas, pending("a")))[0] == [replicas[0]]
        assert (await router.choose_replicas(replicas, pending("a", avoid=("r0",))))[0] == [replicas[1]]
        placement = placement_of(str(DEPLOYMENT))
        assert placement is not None
        placement.refused("r0", time.monotonic() + 60)
        assert (await router.choose_replicas(replicas, pending("a")))[0] == [replicas[1]]

    route(scenario, FakeReplica("r0", device=("a",)), FakeReplica("r1"))


def test_who_waits_while_another_has_a_row_to_spare_is_told(route: Callable[..., None]) -> None:
    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        placement = placement_of(str(DEPLOYMENT))
        assert placement is not None
        for number in range(1, 11):
            request = pending("a", number=number)
            router.on_send_request(replicas[0].replica_id)
            router.on_request_routed(request, replicas[0].replica_id, None)
        assert placement.elsewhere(10, time.monotonic()) == ("r0",)
        for _ in range(2):
            router.on_request_completed(replicas[0].replica_id, "internal")
        router.replica_queue_len_cache.update(replicas[0].replica_id, 8)
        assert placement.elsewhere(10, time.monotonic()) == ()

    route(scenario, FakeReplica("r0", device=("a",)), FakeReplica("r1"))


def test_calls_of_one_request_are_sent_each_to_its_own_replica(route: Callable[..., None]) -> None:
    """Choices of one answer are asked for at once, and have their ingress request's id in common."""

    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        calls = [pending(name) for name in ("a", "b", "c", "a", "b", "c")]
        assert len({call.metadata.internal_request_id for call in calls}) == 1
        sent = await asyncio.wait_for(asyncio.gather(*map(router._choose_replica_for_request, calls)), 5)
        assert sent == [*replicas, *replicas]

    route(scenario, *[FakeReplica(f"r{i}", device=(name,)) for i, name in enumerate("abc")])


def test_queues_that_others_fill_are_known_by_the_reports(route: Callable[..., None]) -> None:
    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        placement = placement_of(str(DEPLOYMENT))
        assert placement is not None
        for queue in (30, 0):
            replicas[0].routing_stats = report(["a@1"], (), (), 0.0, queue=queue)
            router.update_replicas(replicas)
            assert placement.look() == {"r0": queue, "r1": 0}
        router.on_new_queue_len_info(replicas[0].replica_id, 30)
        router.update_replicas(replicas)
        assert placement.look() == {"r0": 30, "r1": 0}, "an old report is no news"

    route(scenario, FakeReplica("r0", device=("a",)), FakeReplica("r1"))


def test_other_calls_and_calls_without_adapters_go_to_any_two(route: Callable[..., None]) -> None:
    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        for request in (None, PendingRequest([], {}, RequestMetadata("request", "internal")), pending()):
            assert len(await router.choose_replicas(replicas, request)) == 2
        assert await router.choose_replicas([], pending("a")) == []

    route(scenario, *[FakeReplica(f"r{i}") for i in range(3)])


def test_the_chosen_replicas_node_is_told_which_adapters_will_be_wanted(
    route: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: dict[str, FakeCache] = {}

    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        monkeypatch.setattr(ray, "get_actor", lambda name, namespace: caches.setdefault(name, FakeCache()))
        await router.choose_replicas(replicas, pending("a"))
        await asyncio.sleep(0.05)  # it looks for the cache meanwhile
        request = pending("a", "c")
        for _ in range(3):  # as long as all replicas are full
            await router.choose_replicas(replicas, request)
        await router.choose_replicas(replicas, pending())

    route(scenario, FakeReplica("r0", device=("a",)), FakeReplica("r1"))
    assert {name: cache.told for name, cache in caches.items()} == {
        SPEC.prefix + "node-of-r0": [[("a", "1"), ("c", "1")]]
    }


def test_the_calls_of_a_replica_that_is_lost_are_broken_off_and_those_of_one_that_ends_are_not(
    route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ResidencyRouter._watch.__globals__, "_LOOK_AGAIN_S", 0.02)  # Serve may have copied the module
    broken = []

    async def scenario(router: ResidencyRouter, replicas: list[Any]) -> None:
        placement = placement_of(str(DEPLOYMENT))
        assert placement is not None
        for call, replica in enumerate(replicas):
            placement.sent(call, lambda call=call: broken.append(call))  # type: ignore[misc]
            router.on_request_routed(pending(number=call), replica.replica_id, None)
        placement.took(0, "r0")
        replicas[0].error = ActorUnavailableError("it does not answer now", b"x" * 16)
        router.update_replicas([replicas[2]])
        await asyncio.sleep(0.1)
        assert not broken, "one may answer again, and the other only takes no more"
        replicas[0].error = ActorDiedError()
        await asyncio.sleep(0.1)
        assert broken == [0]
        placement.left(1)
        await asyncio.sleep(0.05)
        assert not router._watches

    route(scenario, FakeReplica("r0"), FakeReplica("r1"), FakeReplica("r2"))
