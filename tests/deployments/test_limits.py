from __future__ import annotations

import pytest

from deployments.limits import TokenBuckets


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_minutes_worth_and_no_more(clock: Clock) -> None:
    buckets = TokenBuckets(clock)
    assert [buckets.take("a", 1, 3) for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a", 1, 3) == pytest.approx(20)
    assert buckets.take("b", 1, 3) == 0
    clock.now += 19
    assert buckets.take("a", 1, 3) == pytest.approx(1)
    clock.now += 1.001
    assert buckets.take("a", 1, 3) == 0
    clock.now += 10_000
    assert [buckets.take("a", 1, 3) for _ in range(4)][:3] == [0, 0, 0]


def test_over_any_time_no_more_than_the_limit_passes(clock: Clock) -> None:
    buckets = TokenBuckets(clock)
    passed = 0
    for _ in range(600):
        passed += buckets.take("a", 7, 60) == 0
        clock.now += 0.5
    assert passed * 7 <= 60 + 60 * 5
    assert passed * 7 > 60 * 5 - 7


def test_what_is_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt(clock: Clock) -> None:
    buckets = TokenBuckets(clock)
    assert buckets.take("a", 150, 100) == 0
    assert buckets.take("a", 150, 100) == pytest.approx(90)
    clock.now += 89
    assert 0 < buckets.take("a", 150, 100) < 1.1
    clock.now += 1.01
    assert buckets.take("a", 150, 100) == 0


def test_what_is_given_back_fills_no_further_than_full(clock: Clock) -> None:
    buckets = TokenBuckets(clock)
    buckets.take("a", 10, 100)
    buckets.settle("a", -500, 100)
    assert buckets.take("a", 100, 100) == 0
    assert buckets.take("a", 1, 100) > 0


def test_a_lower_limit_counts_at_once(clock: Clock) -> None:
    buckets = TokenBuckets(clock)
    assert buckets.take("a", 1, 1000) == 0
    assert [buckets.take("a", 1, 2) for _ in range(2)] == [0, 0]
    assert buckets.take("a", 1, 2) > 0
