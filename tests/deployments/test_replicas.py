"""Which replicas there are, as Serve tells, and calls to them, by real servers; without a Serve."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError
from ray.serve._private.common import DeploymentID, DeploymentTargetInfo, ReplicaID, RunningReplicaInfo

import deployments.replicas
from deployments.replicas import Replica, Replicas, ReplicaServer
from deployments.retries import answered
from lorauter.errors import AdapterNotFound, Overloaded

DEPLOYMENT = DeploymentID("LoraModel", "lorauter")


class Counts:
    """What Serve would scale by."""

    def __init__(self) -> None:
        self.queued = 0
        self.running: Counter[str] = Counter()

    def inc_num_queued_requests(self) -> None:
        self.queued += 1

    def dec_num_queued_requests(self) -> None:
        self.queued -= 1

    def inc_num_running_requests_for_replica(self, replica: ReplicaID) -> None:
        self.running[replica.unique_id] += 1

    def dec_num_running_requests_for_replica(self, replica: ReplicaID) -> None:
        self.running[replica.unique_id] -= 1


class World:
    """Serve's word on who is there, and replicas that say their names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = Counts()
        self.servers: dict[str, ReplicaServer] = {}
        self.hang = asyncio.Event()
        self._infos: dict[str, RunningReplicaInfo] = {}
        self._told: Callable[[Any], None] = lambda _: None
        monkeypatch.setattr(ray, "get_actor", lambda *_, **__: None)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_actor_id=lambda: "me"))
        monkeypatch.setattr(deployments.replicas, "_node_ip", lambda: "127.0.0.1")
        monkeypatch.setattr(deployments.replicas, "_serves_counts", lambda _: self.counts)
        monkeypatch.setattr(deployments.replicas, "LongPollClient", self._polls)

    def _polls(self, controller: Any, listeners: dict[Any, Callable[[Any], None]], **__: Any) -> None:
        [((_, deployment), self._told)] = listeners.items()
        assert deployment == DEPLOYMENT

    def replicas(self, most: int = 100) -> Replicas:
        handle: Any = SimpleNamespace(deployment_id=DEPLOYMENT)
        return Replicas(handle, most=most)

    async def start(self, name: str, **report: Any) -> None:
        async def whoami() -> str:
            return name

        async def stream() -> AsyncGenerator[str]:
            yield name
            await self.hang.wait()
            yield "end"

        async def fetch() -> None:
            raise RayTaskError("fetch", "where it was", AdapterNotFound("gone", adapter="a")).as_instanceof_cause()

        self.servers[name] = ReplicaServer("LoraModel", {"whoami": whoami, "stream": stream, "fetch": fetch})
        metadata = await self.servers[name].metadata()
        self._infos[name] = RunningReplicaInfo(
            ReplicaID(name, DEPLOYMENT), f"node-of-{name}", None, None, name, 5, False, [], report, metadata
        )

    def tell(self, *names: str) -> None:
        self._told(DeploymentTargetInfo(True, [self._infos[name] for name in names]))


def run(monkeypatch: pytest.MonkeyPatch, scenario: Callable[[World], Awaitable[None]]) -> None:
    async def whole() -> None:
        world = World(monkeypatch)
        async with asyncio.timeout(20):
            await scenario(world)
        for server in world.servers.values():
            server._server.close()
        await asyncio.sleep(0.02)

    asyncio.run(whole())


def test_a_replica_knows_how_many_calls_it_has_of_each_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        await world.start("r0")
        senders = []
        for _ in range(2):
            senders.append(world.replicas())
            world.tell("r0")
        one, two = senders
        streams = [await sender.call("stream") for sender in (one, one, two)]
        assert [await anext(stream) for stream in streams] == ["r0"] * 3
        assert one.name != two.name
        assert world.servers["r0"].ongoing_by == {one.name: 2, two.name: 1}
        streams[0].cancel()
        world.hang.set()
        for stream in streams[1:]:
            assert [item async for item in stream] == ["end"]
        await world.servers["r0"].drained()
        assert world.servers["r0"].ongoing_by == {}

    run(monkeypatch, scenario)


def test_a_call_waits_for_a_replica_and_serve_hears_that_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        replicas = world.replicas()
        waiting = asyncio.ensure_future(replicas.call("whoami"))
        await asyncio.sleep(0.02)
        assert not waiting.done() and world.counts.queued == 1
        await world.start("r0")
        world.tell("r0")
        assert await (await waiting) == "r0"
        with pytest.raises(AdapterNotFound, match="gone"):  # an actor's, of which Ray makes something of its own
            await (await replicas.call("fetch"))
        assert world.counts.queued == 0 and world.counts.running == {"r0": 0}

    run(monkeypatch, scenario)


def test_calls_go_to_who_has_fewer_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        replicas = world.replicas(most=3)
        for name in ("r0", "r1"):
            await world.start(name)
        world.tell("r0", "r1")
        streams = [await replicas.call("stream") for _ in range(6)]
        assert Counter([await anext(stream) for stream in streams]) == {"r0": 3, "r1": 3}
        assert replicas.ongoing == {"r0": 3, "r1": 3} == world.counts.running
        with pytest.raises(Overloaded, match="LoraModel has 3 calls"):
            await replicas.call("whoami")
        world.hang.set()
        for stream in streams:
            assert [item async for item in stream] == ["end"]
        assert replicas.ongoing == {"r0": 0, "r1": 0} == world.counts.running

    run(monkeypatch, scenario)


def test_who_leaves_gets_no_new_calls_and_ends_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        replicas, heard = world.replicas(), list[Sequence[Replica]]()
        await world.start("old", calls={})
        world.tell("old")
        replicas.listen(heard.append)
        stream = await replicas.call("stream")
        assert await anext(stream) == "old"
        await world.start("new")
        world.tell("new")
        assert [await (await replicas.call("whoami")) for _ in range(4)] == ["new"] * 4
        server = world.servers["old"]
        assert server.ongoing == 1
        ending = asyncio.ensure_future(server.drained())
        await asyncio.sleep(0.02)
        assert not ending.done()
        world.hang.set()
        assert [item async for item in stream] == ["end"]
        await ending
        await asyncio.sleep(0.02)
        assert not server._server._callers, "nobody is connected to it any more"
        assert world.counts.running == {"old": 0, "new": 0}
        assert heard == [[Replica("old", "node-of-old", {"calls": {}})], [Replica("new", "node-of-new", {})]]

    run(monkeypatch, scenario)


def test_a_replica_that_does_not_say_where_it_listens_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(world: World) -> None:
        replicas = world.replicas()
        await world.start("r0")
        world._infos["r0"].replica_metadata.clear()
        world.tell("r0")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await replicas.call("whoami")
        assert world.counts.queued == 0

    run(monkeypatch, scenario)


def test_who_cannot_be_reached_gets_no_calls_until_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve tells of a death later, if it is one."""
    monkeypatch.setattr(deployments.replicas, "_FIRST_LOOK_S", 0.01)

    async def scenario(world: World) -> None:
        replicas, heard = world.replicas(), list[list[str]]()
        for name in ("dead", "cut"):
            await world.start(name)
        world.tell("dead", "cut")
        replicas.listen(lambda there: heard.append([replica.name for replica in there]))
        streams = [await replicas.call("stream") for _ in range(2)]
        for stream in streams:
            await anext(stream)
        dead, cut = (world.servers[name]._server for name in ("dead", "cut"))
        dead.close()
        await asyncio.sleep(0.02)
        assert heard[-1] == ["cut"]
        assert [await (await replicas.call("whoami")) for _ in range(5)] == ["cut"] * 5
        world.tell("dead", "cut")
        assert [await (await replicas.call("whoami")) for _ in range(5)] == ["cut"] * 5, "Serve does not know yet"
        for connection in list(cut._callers):
            connection.close()
        assert await answered(lambda: replicas.call("whoami"), timeout_s=10) == "cut", "it was waited for"
        assert list(replicas._lost) == ["dead"]
        world.tell("cut")
        await asyncio.sleep(0.1)
        assert not replicas._lost and not [count for count in world.counts.running.values() if count]

    run(monkeypatch, scenario)
