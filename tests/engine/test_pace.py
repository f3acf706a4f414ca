"""What an engine's steps say about how many requests it may hold."""

import pytest

from lorauter.engine.pace import Pace
from lorauter.errors import Overloaded


def learnt(max_batch=8, max_slowdown=2.0, **steps):
    pace = Pace(max_batch, max_slowdown)
    pace.answered(100, 50)
    for rows, seconds in steps.items():
        pace.step(int(rows[1:]), 0, seconds)
    return pace


def admits(pace):
    """The largest number of requests that is not refused."""
    requests = 1
    while requests < 100:
        try:
            pace.check(requests + 1)
        except Overloaded:
            break
        requests += 1
    return requests


def test_nothing_known_refuses_nobody():
    assert admits(Pace(8, 2.0)) == 100


def test_without_a_bound_nobody_is_refused():
    assert admits(learnt(max_slowdown=None, d1=1.0, d8=8.0)) == 100


def test_batching_that_costs_nothing_leaves_room_for_a_queue():
    pace = learnt(d1=0.1, d8=0.1)
    assert pace.seconds(1) == pace.seconds(8) == pytest.approx(5.0)
    assert pace.seconds(16) == pytest.approx(10.0)
    assert admits(pace) == 16


def test_between_what_was_seen_a_step_is_in_proportion():
    pace = learnt(d1=0.1, d5=0.3)
    assert pace.seconds(3) == pytest.approx(10.0)
    assert admits(pace) == 3


def test_one_size_alone_promises_nothing_of_batching():
    pace = learnt(d2=0.2)
    assert [pace.seconds(n) for n in (1, 2, 4)] == pytest.approx([5.0, 10.0, 20.0])


def test_one_slow_step_changes_little():
    pace = learnt(d1=0.1, d2=0.12, d4=0.16, d8=0.24)
    before = admits(pace)
    for rows, seconds in ((1, 0.1), (2, 0.12), (4, 0.16), (8, 0.24)) * 20:
        pace.step(rows, 0, seconds)
    pace.step(8, 0, 60.0)
    assert admits(pace) >= before - 1


def test_each_row_beside_takes_in_a_prompt_meanwhile():
    pace = learnt(d1=0.1, d2=0.1, d4=0.1)
    pace.step(0, 200, 2.0)
    pace.step(2, 100, 1.1)
    assert pace.seconds(1) == pytest.approx(5 + 1, rel=0.01)
    assert pace.seconds(4) == pytest.approx(5 + 4, rel=0.01)


def test_the_newest_steps_and_answers_count_most():
    pace = learnt(d1=0.1)
    for _ in range(100):
        pace.step(1, 0, 0.2)
        pace.answered(0, 10)
    assert pace.seconds(1) == pytest.approx(2.0, rel=0.05)


def test_the_first_step_of_its_size_does_not_count():
    pace = learnt(d1=9.0)
    pace.step(1, 0, 0.1)
    assert pace.seconds(1) == pytest.approx(5.0)


def test_the_refusal_says_when_to_come_again():
    with pytest.raises(Overloaded, match=r"4 requests run or wait.*2.5 times") as caught:
        learnt(d1=0.1, d5=0.25).check(5)
    assert caught.value.retry_after_s == pytest.approx(50 * 0.2125)
