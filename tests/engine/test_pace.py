"""What an engine's steps say about how many requests it may hold."""

import random
from dataclasses import dataclass

import numpy as np
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


def test_company_outside_the_engine_does_not_pass_for_being_alone():
    pace = learnt(d1=0.1, d4=0.16)
    before = admits(pace)
    for _ in range(20):
        pace.step(1, 0, 0.15)
        pace.step(4, 0, 0.24)
    assert pace.seconds_alone < 0.6 * pace.seconds(1) + 0.4 * 5
    assert admits(pace) < before


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


def test_what_a_wait_is_by_steps_until_a_queue_was_seen():
    pace = learnt(max_batch=4, d1=0.1, d4=0.2)
    assert pace.turnover_s == pytest.approx(10 / 4)
    pace.ended(1, 3, 100.0)  # since when others waited is not known
    assert pace.turnover_s == pytest.approx(10 / 4)
    for second in range(5, 500, 5):  # two in five seconds, whatever the steps say
        pace.ended(2, 3, 100.0 + second)
    assert pace.turnover_s == pytest.approx(5 / 2, rel=0.05)
    pace.ended(1, 0, 601.0)
    before = pace.turnover_s
    pace.ended(1, 1, 900.0)  # in between nobody waited
    assert pace.turnover_s == before


@dataclass
class Machine:
    """An engine's steps on paper: seconds of a step, more for each decoding row, more for each prompt token."""

    step: float
    row: float
    prompt_token: float
    max_batch: int

    SIZES = ((60, 3), (90, 3), (60, 20), (80, 12), (100, 8), (70, 32))  # prompt, answer

    def serve(self, pace, arrivals, seconds):
        """Serve requests that `arrivals(held)` lets come before each step; returns their times."""
        draw, now, rows, waiting, times = random.Random(0), 0.0, [], [], []
        while now < seconds:
            for _ in range(arrivals(now, len(rows) + len(waiting))):
                try:
                    pace.check(len(rows) + len(waiting) + 1)
                except Overloaded:
                    continue
                prompt, answer = draw.choice(self.SIZES)
                waiting.append({"since": now, "prompt": prompt, "left": answer, "size": (prompt, answer)})
            while waiting and len(rows) < self.max_batch:
                rows.append(waiting.pop(0))
            if not rows:
                now += self.step
                continue
            decoding = sum(not row["prompt"] for row in rows)
            prompts = sum(row["prompt"] for row in rows)
            took = self.step + self.row * decoding + self.prompt_token * prompts
            took *= 1 + 0.1 * abs(draw.gauss(0, 1))
            pace.step(decoding, prompts, took)
            now += took
            for row in rows:
                row["prompt"], row["left"] = 0, row["left"] - 1
            for row in [row for row in rows if not row["left"]]:
                rows.remove(row)
                pace.answered(*row["size"])
                times.append(now - row["since"])
        return times

    def warm(self, max_slowdown):
        pace = Pace(self.max_batch, max_slowdown)
        self.serve(pace, lambda now, held: self.max_batch - held, 100 * self.step)
        return pace


@pytest.mark.parametrize(
    "machine", [Machine(0.022, 0.004, 6e-4, 16), Machine(0.03, 0.02, 2e-3, 8), Machine(6e-3, 1e-4, 2e-5, 32)]
)
def test_three_times_the_load_leaves_what_is_accepted_within_three_times_its_time(machine):
    seconds = 8000 * machine.step
    alone = machine.serve(machine.warm(None), lambda now, held: held == 0, seconds)
    pace = machine.warm(2.0)
    most = machine.serve(pace, lambda now, held: 64 - held, seconds)
    draw, next_at, rate = random.Random(1), [0.0], 3 * len(most) / seconds

    def arrivals(now, _):
        come = 0
        while next_at[0] <= now:
            next_at[0] += draw.expovariate(rate)
            come += 1
        return come

    times = machine.serve(pace, arrivals, seconds)
    assert np.percentile(times, 99) <= 3 * np.percentile(alone, 99)
    assert len(times) >= 0.75 * len(most)
    unbounded = machine.serve(machine.warm(None), lambda now, held: machine.max_batch - held, seconds)
    assert len(most) >= 0.65 * len(unbounded)
