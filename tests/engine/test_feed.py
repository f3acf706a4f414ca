"""Feeding: never idle, the same every time, and one request's trouble is its own."""

import threading
from dataclasses import replace

import pytest
import torch

from lorauter.engine import Completion, GenerationRequest, SamplingParams
from lorauter.engine.feed import feed
from lorauter.errors import ContextLengthExceeded, InvalidRequest


def requests(count=40, adapters=lambda i: ()):
    draw = torch.Generator().manual_seed(3)
    return [
        GenerationRequest(
            tuple(torch.randint(256, (3 + i % 7,), generator=draw).tolist()),
            adapters(i),
            SamplingParams(max_tokens=1 + (7 * i) % 19, temperature=1.0, seed=i),
        )
        for i in range(count)
    ]


def texts(outcomes):
    return [outcome.result.text for outcome in outcomes]


@pytest.fixture
def engine(start, pool):
    return start(pool.decoder("llama"), max_queue=4, max_model_len=64)


def test_the_answers_are_those_of_generate_in_order_and_timed(engine) -> None:
    asked = requests()
    outcomes = feed(engine, asked)
    assert texts(outcomes) == [completion.text for completion in engine.generate(asked)]
    assert all(outcome.seconds > 0 for outcome in outcomes)


def test_what_was_asked_before_is_of_no_effect(pool, engine) -> None:
    """Tokens depend on the sizes of steps by rounding: where a prefix is found or an adapter is, steps are others."""
    prompt = tuple(range(40))
    mixtures = [pool.mix((("attention", 1.0),)), pool.mix((("patterns", 0.5),)), ()]
    asked = [GenerationRequest((*prompt, i), mixtures[i % 3], SamplingParams(max_tokens=3)) for i in range(9)]
    counted = []
    for before in ([], asked[:1], asked[3:5], asked):
        engine.generate(before)
        reused, loads = engine.scheduler.reused, engine.slots.counters.misses
        feed(engine, asked)
        counted.append((engine.scheduler.reused - reused, engine.slots.counters.misses - loads))
    assert counted == [counted[0]] * 4
    assert counted[0][0] > 0
    assert counted[0][1] == 2


def test_no_more_run_than_fit_and_never_fewer_while_any_are_left(engine) -> None:
    ended, taken, running = 0, 0, []

    def taking():
        nonlocal taken
        for request in requests():
            taken += 1
            yield request

    def tell(outcome):
        nonlocal ended
        running.append(taken - ended)
        ended += 1

    feed(engine, taking(), tell)
    assert running == [4] * 37 + [3, 2, 1]


def test_a_request_that_fails_is_an_outcome_among_the_others(engine) -> None:
    asked = requests(8)
    asked[1] = replace(asked[1], prompt=(1,) * 64)
    asked[2] = InvalidRequest("known before")
    outcomes = feed(engine, asked)
    assert [type(outcome.result) for outcome in outcomes] == [
        *[Completion, ContextLengthExceeded, InvalidRequest],
        *[Completion] * 5,
    ]
    assert feed(engine, []) == []
    assert len(feed(engine, asked[1:3])) == 2


def test_whatever_a_request_does_as_it_is_submitted_is_an_outcome_too(engine, monkeypatch) -> None:
    asked, submit = requests(8), engine.submit

    def submitted(request, sink):
        if request is asked[3]:
            raise TypeError("odd")
        return submit(request, sink)

    monkeypatch.setattr(engine, "submit", submitted)
    ended = [type(outcome.result) for outcome in feed(engine, asked)]
    assert ended == [*[Completion] * 3, TypeError, *[Completion] * 4]


def test_what_the_requests_raise_comes_out_once_all_that_ran_has_ended(engine) -> None:
    def breaking():
        yield from requests(6)
        raise KeyError("broken")

    with pytest.raises(KeyError):
        feed(engine, breaking())
    assert engine.load == (0, 0)
    assert len(feed(engine, requests(3))) == 3


def test_an_engine_that_ends_is_noticed(engine) -> None:
    def closing():
        yield from requests(6)
        threading.Thread(target=engine.close).start()
        yield from requests(1000)

    with pytest.raises(RuntimeError):
        feed(engine, closing())


def test_what_the_caller_raises_when_told_comes_out(engine) -> None:
    def tell(outcome):
        raise KeyError("told")

    with pytest.raises(KeyError, match="told"):
        feed(engine, requests(9), tell)
    assert engine.load == (0, 0)
    assert len(feed(engine, requests(3))) == 3
