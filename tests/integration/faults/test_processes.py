"""Processes and nodes that die under load: no answer is lost, doubled or wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.integration


async def until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.02)


def test_a_replica_whose_engine_is_killed_while_streaming(cluster: Any, clients: Any, stories: Any) -> None:
    """It ends with its engine's process; what it was saying goes on, exactly, on the other one."""

    async def run() -> Any:
        async with clients.asking(stories, 4) as count:
            await until(lambda: count.right >= 4 and count.under_way >= 3)
            replica = cluster.replicas("LoraModel")[0]
            [engine] = [child for child in replica.children() if "lorauter.engine.child" in child.cmdline()]
            engine.kill()
            await until(lambda: not replica.is_running())
            right = count.right
            await until(lambda: count.right >= right + 6)
        return count

    asyncio.run(run()).assert_all_right(at_least=10)


def test_a_replica_killed_before_the_first_token(cluster: Any, clients: Any, unseen: Any) -> None:
    """Requests that wait for their adapters there are sent to the other one; its engine's process ends with it."""
    questions = unseen(4)

    async def run() -> Any:
        with cluster.s3:
            cluster.s3.delay_s = 0.5
            asking = asyncio.create_task(clients.ask_all(questions))
            await asyncio.sleep(0.7)
            assert not asking.done()
            replica = cluster.replicas("LoraModel")[0]
            children = replica.children()
            assert any("lorauter.engine.child" in child.cmdline() for child in children)
            replica.kill()
            await until(lambda: not any(child.is_running() for child in children), 5)
            return await asking

    asyncio.run(run()).assert_all_right(at_least=4)


@pytest.mark.parametrize("deployment", ["QueryEmbedder", "TaskRetriever"])
def test_a_routing_replica_killed(cluster: Any, clients: Any, routed: Any, deployment: str) -> None:
    """Queries wait for its successor."""

    async def run() -> Any:
        async with clients.asking(routed, 3) as count:
            await until(lambda: count.right >= 3)
            [replica] = cluster.replicas(deployment)
            replica.kill()
            await asyncio.sleep(0.5)
            right = count.right
            await until(lambda: count.right >= right + 6)
        return count

    asyncio.run(run()).assert_all_right(at_least=9)


def test_an_ingress_replica_killed_while_streaming(cluster: Any, clients: Any, stories: Any) -> None:
    """It holds the clients' streams: they see theirs break, none ends short; all others are served by its successor."""

    async def run() -> Any:
        async with clients.asking(stories, 4) as count:
            await until(lambda: count.right >= 4 and count.under_way >= 3)
            [router] = cluster.replicas("Router")
            router.kill()
            right = count.right
            await until(lambda: count.right >= right + 6)
        return count

    count = asyncio.run(run())
    assert (count.duplicated, count.wrong) == ([], [])
    failed = [*count.lost, *count.told]
    assert 1 <= len(failed) <= 4, failed
    assert all(how.startswith(("RemoteProtocolError", "ReadError", "500 ")) for how in failed), failed


def test_node_caches_killed_while_they_fetch(cluster: Any, clients: Any, unseen: Any) -> None:
    questions = unseen(6)

    async def run() -> Any:
        with cluster.s3:
            cluster.s3.delay_s = 0.3
            asking = asyncio.create_task(clients.ask_all(questions))
            await asyncio.sleep(0.5)
            caches = cluster.processes("AdapterCache")
            assert caches
            for cache in caches:
                cache.kill()
            return await asking

    asyncio.run(run()).assert_all_right(at_least=6)


def test_a_whole_node_killed(cluster: Any, clients: Any, stories: Any) -> None:
    """The other node takes over what its replica was saying, and a new node serves again."""

    async def run() -> Any:
        async with clients.asking(stories, 4) as count:
            await until(lambda: count.right >= 4 and count.under_way >= 3)
            cluster.kill_node(cluster.replicas("LoraModel")[0])
            right = count.right
            await until(lambda: count.right >= right + 6)
        return count

    try:
        asyncio.run(run()).assert_all_right(at_least=10)
    finally:  # the other tests need two nodes
        cluster.add_node()
    cluster.wait_until_whole()
    asyncio.run(clients.ask_all(stories)).assert_all_right(at_least=4)
