"""Memory that steps take turns with: no step's tokens are lost to a later one. With a stand-in for CUDA's events."""

import pytest
import torch

from lorauter.engine.cuda_flights import StagingRing

CPU = torch.device("cpu")


class Event:
    """Happens when it is waited for."""

    def __init__(self):
        self.waits = 0
        self.happened = False

    def record(self):
        self.happened = False

    def query(self):
        return self.happened

    def synchronize(self):
        self.waits += 1
        self.happened = True


@pytest.fixture
def ring(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return StagingRing(6, 3, CPU)


def tokens(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_numbers_go_where_a_step_reads_them(ring):
    staging, there = ring.take(), torch.full((6,), -1, dtype=torch.int32)
    staging.numbers[:] = [3, 1, 4, 1, 5, 9]
    staging.send(there[:4])
    assert there.tolist() == [3, 1, 4, 1, -1, -1]


def test_a_step_brings_its_tokens_or_some_of_them_and_is_waited_for_once(ring):
    flight = ring.take().launched(tokens(5, 6, 7), None, [0, 2])
    assert not flight.computed
    assert flight.wait() == flight.wait() == [5, 7]
    assert flight.computed
    assert flight.done.waits == 1


def test_memory_is_used_again_once_its_tokens_are_taken_and_none_are_lost(ring):
    first = ring.take()
    flights = [first.launched(tokens(0, 0), None, None)]
    while (staging := ring.take()) is not first:
        flights.append(staging.launched(tokens(len(flights), 1), None, None))
    assert [flight.done.waits for flight in flights] == [1] + [0] * (len(flights) - 1)
    first.launched(tokens(8, 9), None, None)
    assert [flight.wait() for flight in flights] == [[0, 0], *([place, 1] for place in range(1, len(flights)))]
