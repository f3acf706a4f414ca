"""Limits: the buckets, and what a replica asks of the actor that holds them, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from deployments.calls import Refused, Taken, Want
from deployments.limits import LimitsActor, SharedLimits, TokenBuckets
from lorauter.errors import ServiceUnavailable


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Buckets(TokenBuckets):
    """One at a time."""

    def one(self, name: str, amount: float, per_minute: int) -> float:
        took = self.take([Want(name, amount, per_minute)])
        return took.wait_s if isinstance(took, Refused) else 0.0


def test_a_minutes_worth_and_no_more(clock: Clock) -> None:
    buckets = Buckets(clock)
    assert [buckets.one("a", 1, 3) for _ in range(3)] == [0, 0, 0]
    assert buckets.one("a", 1, 3) == pytest.approx(20)
    assert buckets.one("b", 1, 3) == 0
    clock.now += 19
    assert buckets.one("a", 1, 3) == pytest.approx(1)
    clock.now += 1.001
    assert buckets.one("a", 1, 3) == 0
    clock.now += 10_000
    assert [buckets.one("a", 1, 3) for _ in range(4)][:3] == [0, 0, 0]


def test_over_any_time_no_more_than_the_limit_passes(clock: Clock) -> None:
    buckets = Buckets(clock)
    passed = 0
    for _ in range(600):
        passed += buckets.one("a", 7, 60) == 0
        clock.now += 0.5
    assert passed * 7 <= 60 + 60 * 5
    assert passed * 7 > 60 * 5 - 7


def test_what_is_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt(clock: Clock) -> None:
    buckets = Buckets(clock)
    assert buckets.one("a", 150, 100) == 0
    assert buckets.one("a", 150, 100) == pytest.approx(90)
    clock.now += 89
    assert 0 < buckets.one("a", 150, 100) < 1.1
    clock.now += 1.01
    assert buckets.one("a", 150, 100) == 0


def test_what_is_given_back_fills_no_further_than_full(clock: Clock) -> None:
    buckets = Buckets(clock)
    buckets.one("a", 10, 100)
    buckets.settle(Want("a", -500, 100))
    assert buckets.one("a", 100, 100) == 0
    assert buckets.one("a", 1, 100) > 0


def test_a_lower_limit_counts_at_once(clock: Clock) -> None:
    buckets = Buckets(clock)
    assert buckets.one("a", 1, 1000) == 0
    assert [buckets.one("a", 1, 2) for _ in range(2)] == [0, 0]
    assert buckets.one("a", 1, 2) > 0


def test_what_is_wanted_together_is_taken_up_to_what_is_not_there(clock: Clock) -> None:
    buckets = Buckets(clock)
    wants = [Want("a requests", 1, 2), Want("a tokens", 60, 100)]
    assert buckets.take(wants) == Taken((1, 40))
    assert buckets.take(wants) == Refused(1, pytest.approx(12))
    assert buckets.take(wants) == Refused(0, pytest.approx(30)), "a request that was refused its tokens is one too"
    assert buckets.one("a tokens", 40, 100) == 0


class Actor:
    """The actor behind its handle: each call takes a turn of the loop; some fail."""

    def __init__(self, *errors: Exception) -> None:
        self.calls: list[Sequence[Any]] = []
        self._errors = list(errors)
        self._body = LimitsActor()

    @property
    def count(self) -> Any:
        return self

    async def remote(self, operations: Sequence[Any]) -> Any:
        self.calls.append(operations)
        await asyncio.sleep(0)
        if self._errors:
            raise self._errors.pop(0)
        return await self._body.count(operations)


def limits(monkeypatch: pytest.MonkeyPatch, actor: Actor) -> SharedLimits:
    monkeypatch.setattr("deployments.limits.serve.get_deployment_actor", lambda name: actor)
    monkeypatch.setattr("deployments.limits._PAUSE_S", 0)
    return SharedLimits()


def test_what_comes_together_is_one_call_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor()
    shared = limits(monkeypatch, actor)

    async def ask() -> list[Any]:
        takes = [shared.take([Want(name, 1, 2)]) for name in "aab"]
        answers = await asyncio.gather(*takes)
        await shared.settle(Want("b", 1, 2))
        return [*answers, await shared.take([Want("b", 1, 2)])]

    assert [isinstance(answer, Taken) for answer in asyncio.run(ask())] == [True, True, True, False]
    assert [len(call) for call in actor.calls] == [3, 2]


def test_an_actor_that_has_died_is_asked_anew_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor(ActorDiedError(), ActorDiedError())
    assert asyncio.run(limits(monkeypatch, actor).take([Want("a", 1, 3)])) == Taken((2.0,))
    assert len(actor.calls) == 3
    with pytest.raises(ServiceUnavailable, match="try again"):
        asyncio.run(limits(monkeypatch, Actor(*[ActorDiedError()] * 6)).take([Want("a", 1, 3)]))
