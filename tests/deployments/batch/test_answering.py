import threading
from dataclasses import replace

import pytest

from deployments.batch import answering
from deployments.batch.answering import Answering
from deployments.batch.config import BatchConfig
from deployments.batch.rows import SourceRow, Work, order_by_adapters
from lorauter.engine.types import Grammar
from lorauter.errors import InvalidRequest
from lorauter.routing import AdapterWeight, RoutingDecision, TaskScore
from lorauter.routing.examples import Shown
from lorauter.turns import ExampleTurns


@pytest.fixture
def make(echoing, adapters):
    return lambda **settings: Answering(echoing, adapters, BatchConfig.parse(settings))


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(answering, "_PATIENCE_S", (0, 0))


def routed(*mixtures, prompts=None):
    """Work whose rows go to these adapters."""
    rows = [SourceRow(i, {"prompt": prompts[i] if prompts else "ask"}) for i in range(len(mixtures))]
    decisions = [
        mixture
        if isinstance(mixture, Exception)
        else RoutingDecision("v", (), tuple(AdapterWeight(name, "1", 1.0) for name in mixture), 0.5)
        for mixture in mixtures
    ]
    return Work(0, rows, decisions, order_by_adapters(decisions))


def test_rows_are_answered_under_their_adapters_in_their_places(make) -> None:
    work = routed(("b",), (), ("a", "b"), ("b",))
    make().answer(work)
    assert [row["answer"] for row in work.results] == ["b", "", "a+b", "b"]
    assert all(row["error"] is None and row["finish_reason"] == "stop" for row in work.results)
    assert {(row["prompt_tokens"], row["completion_tokens"]) for row in work.results} == {(3, 2)}
    assert all(row["latency_s"] >= 0 for row in work.results)


def test_rows_with_the_same_adapters_meet_and_an_adapter_is_asked_for_once_for_many(make, echoing, adapters) -> None:
    work = routed(*[(name,) for _ in range(20) for name in ("a", "b", "c")])
    make().answer(work)
    assert echoing.served == [("a",)] * 20 + [("b",)] * 20 + [("c",)] * 20
    assert sorted(adapters.asked) == ["a", "b", "c"]


def test_whatever_is_wrong_with_a_row_is_in_its_error_and_in_no_other(make) -> None:
    work = routed(("a",), ("missing",), InvalidRequest("empty"), ("a",), prompts=["ask", "ask", "ask", "x" * 51])
    told = []
    make().answer(work, told.append)
    good, *bad = work.results
    assert (good["answer"], good["error"]) == ("a", None)
    assert [row["error"].split(":")[0] for row in bad] == ["AdapterNotFound", "InvalidRequest", "ContextLengthExceeded"]
    assert all(row["answer"] is None and row["latency_s"] is None for row in bad)
    assert bad[0]["adapters"] == [{"name": "missing", "version": "1", "weight": 1.0}]
    assert len(told) == 4
    assert {place: (status, body["error"]["code"]) for place, (status, body) in work.errors.items()} == {
        1: (404, "model_not_found"),
        2: (400, None),
        3: (400, "context_length_exceeded"),
    }


def test_a_mixture_goes_on_without_what_is_broken_and_not_without_what_is_gone(make) -> None:
    work = routed(("a", "broken"), ("a", "missing"), ("broken",))
    make().answer(work)
    good, gone, nothing = work.results
    assert (good["answer"], good["error"]) == ("a", None)
    assert good["adapters"] == [{"name": "a", "version": "1", "weight": 2.0}]
    assert good["left_out"] == [{"name": "broken", "version": "1", "cause": "rejected"}]
    assert gone["error"].startswith("AdapterNotFound")
    assert nothing["error"].startswith("AdapterRejected")
    assert gone["answer"] is gone["left_out"] is None


def test_answers_are_held_to_what_the_decision_says(make, echoing) -> None:
    work = routed(("a",), ("a",))
    held = replace(work.decisions[0], tasks=(TaskScore("t", 1.0, 1.0),), constrain=True, answers=("yes", "no"))
    work.decisions[0] = held
    make().answer(work)
    assert [sampling.grammar for sampling in echoing.sampled] == [Grammar("choice", '["yes", "no"]'), None]
    assert [row["constrained"] for row in work.results] == ["t", None]


def test_examples_go_before_a_lone_prompt_as_far_as_there_is_room(make, echoing) -> None:
    """Where the base model alone was to answer after them and there is room for none, the mixture does."""
    near, far = ExampleTurns(4, "q4", "a4"), ExampleTurns(2, "q2", "a2")
    shown = replace(routed(()).decisions[0], tasks=(TaskScore("t", 1.0, 1.0),), shown=Shown((near, far), "base"))
    shown = replace(shown, unshown=(AdapterWeight("a", "1", 1.0),))
    work = routed(*[()] * 4, prompts=["ask", "x" * 16, "x" * 22, "ask"])
    work.decisions = [shown] * 4
    work.rows[3] = SourceRow(3, {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ask"}]})
    make().answer(work)
    assert [row["error"] for row in work.results] == [None] * 4
    assert echoing.prompts == ["q2>a2>q4>a4>ask", "q4>a4>" + "x" * 16, "x" * 22, "s>ask"]
    assert [row["answer"] for row in work.results] == ["", "", "a", "a"]
    assert [row["shown"] for row in work.results] == [
        {"task": "t", "places": [2, 4], "by": "base"},
        {"task": "t", "places": [4], "by": "base"},
        {"places": [], "why": "no_room"},
        {"places": [], "why": "not_one_turn"},
    ]
    assert [row["prompt_tokens"] for row in work.results] == [15, 22, 22, 5]


def test_an_adapter_that_cannot_be_had_just_now_is_tried_again(make, adapters) -> None:
    work = routed(("flaky",))
    make().answer(work)
    assert (work.results[0]["answer"], adapters.asked) == ("flaky", ["flaky"] * 3)


def test_shards_of_several_threads_do_not_mix(make, echoing) -> None:
    works = [routed(*[(name,)] * 50) for name in "abcd"]
    shared = make()
    threads = [threading.Thread(target=shared.answer, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = sum(one != other for one, other in zip(echoing.served, echoing.served[1:], strict=False))
    assert changes == 3
    for work, name in zip(works, "abcd", strict=True):
        assert {row["answer"] for row in work.results} == {name}


def test_what_cannot_be_made_ready_stops_the_shard_and_loses_no_thread(make, adapters, monkeypatch) -> None:
    async def broken(key):
        raise KeyError("broken")

    monkeypatch.setattr(adapters, "get", broken)
    with pytest.raises(RuntimeError, match="broken"):
        make().answer(routed(("a",), ("b",)))
