"""An S3 server that is slow, fails, cuts answers off or is down, and a disk that is full."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import pytest

pytestmark = pytest.mark.integration


def test_a_slow_store_delays_and_harms_nothing(cluster: Any, clients: Any, unseen: Any, stories: Any) -> None:
    questions = unseen(3)
    with cluster.s3:
        cluster.s3.delay_s = 1.0
        asyncio.run(clients.ask_all([*questions, *stories[:2]])).assert_all_right(at_least=5)


def test_a_store_that_fails_every_fifth_call(cluster: Any, clients: Any, unseen: Any) -> None:
    questions, faults = unseen(10), cluster.s3.faults
    with cluster.s3:
        cluster.s3.failing = 0.2
        count = asyncio.run(clients.ask_all(questions))
    count.assert_sound()  # each adapter takes five calls: one that fails in every try is rare, and told
    assert count.right >= 9
    assert count.right + len(count.told) == 10
    assert cluster.s3.faults > faults


def test_a_store_that_cuts_answers_off_half_way(cluster: Any, clients: Any, unseen: Any) -> None:
    questions, faults = unseen(6), cluster.s3.faults
    with cluster.s3:
        cluster.s3.cutting = 0.3
        count = asyncio.run(clients.ask_all(questions))
    count.assert_sound()
    assert count.right >= 4
    assert count.right + len(count.told) == 6
    assert cluster.s3.faults > faults


def test_a_store_that_is_down(cluster: Any, clients: Any, unseen: Any, stories: Any, routed: Any) -> None:
    """What is cached is served; who needs more is told so, and served once the store is back."""
    new = unseen(2)
    asyncio.run(clients.ask_all([stories[2]] * 6))  # the mixture's adapters are on both nodes by now
    with cluster.s3:
        cluster.s3.down = True
        count = asyncio.run(clients.ask_all([*new, *stories]))
    count.assert_sound()
    assert count.right == len(stories)
    assert len(count.told) == 2
    assert all(message.startswith("503 adapter ") for message in count.told)
    asyncio.run(clients.ask_all(new)).assert_all_right(at_least=2)


def test_a_disk_that_is_full(cluster: Any, clients: Any, unseen: Any, stories: Any) -> None:
    """A limit on the size of files stands in for it: writes fail in the same places."""
    new = unseen(2)
    caches = cluster.processes("AdapterCache")
    before = [resource.prlimit(cache.pid, resource.RLIMIT_FSIZE) for cache in caches]
    for cache, (_, hard) in zip(caches, before, strict=True):
        resource.prlimit(cache.pid, resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        count = asyncio.run(clients.ask_all([*new, *stories]))
    finally:
        for cache, limits in zip(caches, before, strict=True):
            resource.prlimit(cache.pid, resource.RLIMIT_FSIZE, limits)
    count.assert_sound()
    assert count.right == len(stories)
    assert len(count.told) == 2
    assert all(message.startswith("503 adapter ") for message in count.told)
    asyncio.run(clients.ask_all(new)).assert_all_right(at_least=2)
