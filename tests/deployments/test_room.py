"""What waits for room in a cluster is told with what is free and who holds the rest."""

from collections.abc import Callable

import pytest

from deployments.room import Actor, Room, Watch

ANSWER = Actor("", "AnswerStage of the batch job 02", "02", {"CPU": 1.0}, placed=False)
MODEL = Actor("", "LoraModel of the service 'lorauter'", "01", {"CPU": 1.0}, placed=True)
FULL = Room((ANSWER, MODEL), ({"CPU": 0.25},), ({"CPU": 2.0},))


def mine(actor: Actor) -> bool:
    return actor.job == "02"


def test_the_line_names_what_is_wanted_what_is_free_and_who_could_give_it() -> None:
    line = FULL.shortage(mine)
    assert line is not None
    assert "1 of AnswerStage of the batch job 02 with 1 CPU" in line
    assert "free are 0.25 of 2 CPUs" in line
    assert "LoraModel of the service 'lorauter' (1 CPU)" in line
    assert "running tasks (0.75 CPUs)" in line
    assert "\n" not in line
    assert FULL.is_stuck(mine)
    assert Room((MODEL,), FULL.free, FULL.total).shortage(mine) is None
    assert Room((ANSWER, MODEL), FULL.free, FULL.total).shortage(lambda actor: actor.job == "01") is None


def test_free_resources_on_many_nodes_and_what_no_node_has() -> None:
    wants = Actor("", "AnswerStage", "02", {"CPU": 2.0, "GPU": 1.0}, placed=False)
    nodes = ({"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0})
    line = Room((wants,), nodes, nodes).shortage(mine)
    assert line is not None
    assert "free are 2 of 2 CPUs, at most 1 on one node, 1 of 1 GPU" in line
    assert "no node has 2 CPUs and 1 GPU" in line


def test_with_one_worker_at_work_nothing_is_stuck() -> None:
    placed = Actor("", ANSWER.label, "02", {"CPU": 1.0}, placed=True)
    room = Room((ANSWER, placed), FULL.free, FULL.total)
    assert room.shortage(mine) is not None
    assert not room.is_stuck(mine)


def test_what_there_is_room_for_is_only_late() -> None:
    waits = Actor("", ANSWER.label, "02", {"CPU": 1.0}, placed=False)
    others = Actor("", "LoraModel", "01", {"CPU": 1.0}, placed=False)
    nodes = ({"CPU": 1.0},), ({"CPU": 2.0},)
    assert Room((waits,), *nodes).shortage(mine) is None
    assert not Room((waits,), *nodes).is_stuck(mine)
    for first in (waits, others):  # which has the place
        line = Room((first, waits), *nodes).shortage(mine)
        assert line is not None
        assert "1 of AnswerStage of the batch job 02 with 1 CPU" in line


def test_holders_are_told_the_largest_first_and_no_more_than_some() -> None:
    many = tuple(Actor("", f"actor-{i}", "01", {"CPU": float(i)}, placed=True) for i in range(1, 10))
    line = Room((ANSWER, *many), ({"CPU": 0.0},), ({"CPU": 45.0},)).shortage(mine)
    assert line is not None
    assert "held by actor-9 (9 CPUs), actor-8 (8 CPUs)" in line
    assert "3 more" in line


@pytest.fixture
def watch() -> Callable[[list[tuple[float, Room]]], tuple[list[tuple[float, str]], list[float], Watch]]:
    def run(moments: list[tuple[float, Room]]) -> tuple[list[tuple[float, str]], list[float], Watch]:
        clock, told = [0.0], []
        watch = Watch(mine, lambda line: told.append((clock[0], line)), now=lambda: clock[0])
        waited = []
        for clock[0], room in moments:
            waited.append(watch.check(lambda room=room: room))
        return told, waited, watch

    return run


def test_a_watch_tells_after_ten_seconds_and_then_every_minute(watch) -> None:
    told, waited, seen = watch([(float(second), FULL) for second in range(100)])
    assert [at for at, _ in told] == [10.0, 70.0]
    assert waited[-1] >= 97
    assert not seen.hopeless


def test_who_may_have_what_nobody_is_known_to_hold_may_only_be_starting(watch) -> None:
    starting = Room((ANSWER, MODEL), ({"CPU": 0.5},), ({"CPU": 2.5},))
    assert starting.shortage(mine) is not None
    assert not FULL.may_be_starting(mine)
    told, _, _ = watch([(float(second), starting) for second in range(100)])
    assert [at for at, _ in told] == [60.0]


def test_a_watch_counts_from_when_it_got_stuck(watch) -> None:
    free = Room((MODEL,), FULL.free, FULL.total)
    told, waited, seen = watch([(float(t), FULL if t < 8 or t > 50 else free) for t in range(60)])
    assert told == []
    assert waited[40] == 0
    assert 6 <= waited[-1] <= 10
    assert seen.line is not None


def test_what_no_node_has_is_hopeless(watch) -> None:
    _, _, seen = watch([(3.0, Room((ANSWER,), ({"CPU": 0.5},), ({"CPU": 0.5},)))])
    assert seen.hopeless
