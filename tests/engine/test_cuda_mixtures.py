"""What GPU kernels read of rows' mixtures, on a CPU: tables that follow adapters wherever they are."""

import numpy as np
import pytest
import torch

from lorauter.engine.slots import Group, Part, Placed

pytest.importorskip("triton")
from lorauter.engine import cuda_mixtures

GROUPS = [
    Group(("q_proj", "v_proj"), 8, (8, 4)),
    Group(("o_proj",), 8, (8,)),
    Group(("gate_proj", "up_proj"), 8, (8, 4)),
]
A, B = ("a", "1"), ("b", "1")


class Table(cuda_mixtures.CudaMixtures):
    """Whose changes a step's graph would write."""

    def of_step(self, rows):
        found = super().of_step(rows)
        weights, own = self.flats
        changes = np.empty((2, len(self.changes)), np.int32)
        self.changes.copy(*changes)
        self.changes.clear()
        assert len({*changes[0]}) == len(changes[0])  # what is written at once has no order
        for place, value in changes.T.tolist():
            if place < len(weights):
                weights[place] = value
            else:
                own[place - len(weights)] = value
        return found


@pytest.fixture
def table():
    return Table(GROUPS, 2, torch.zeros(4096), rows=4)


def placed(key, slot, start, rank=20):
    return Placed(key, slot, {"q_proj": Part(start, start + 2 * rank * 8, rank)})


def tiles(table, first="q_proj"):
    """The tiles in use of a group: place of A, columns, slot."""
    group = table.of_group[first]
    return [tuple(group.tiles[[0, 2, 3], i].tolist()) for i in range(int(group.starts[-1]))]


def test_tiles_are_those_of_the_adapters_in_use_in_the_order_of_their_keys(table):
    a, b = placed(A, 5, 0), placed(B, 3, 1024, rank=4)
    table.assign(0, [(b, 0.5)])
    table.assign(1, [(a, 1.0), (b, 2.0)])
    assert table.of_step({0, 1}) is table
    assert tiles(table) == [(0, 16, 5), (16 * 2 * 8, 4, 5), (1024, 4, 3)]
    assert table.weights[:2, [5, 3]].tolist() == [[0.0, 0.5], [1.0, 2.0]]
    assert table.active == {"q_proj"}
    table.assign(1, ())
    assert table.of_step({1}) is None
    assert tiles(table) == [(1024, 4, 3)]
    assert table.weights[1].abs().sum() == 0
    table.assign(0, ())
    table.of_step({0})
    assert (tiles(table), table.active) == ([], frozenset())


def test_tiles_lie_by_group_and_target_whatever_each_adapter_has(table):
    both = Placed(A, 0, {"q_proj": Part(0, 640, 20), "v_proj": Part(2000, 2100, 3), "o_proj": Part(2200, 2300, 17)})
    other = Placed(B, 1, {"v_proj": Part(3000, 3100, 16), "o_proj": Part(3500, 3600, 1)})
    table.assign(2, [(other, 1.0), (both, 1.0)])
    table.of_step({2})
    assert tiles(table) == [(0, 16, 0), (16 * 2 * 8, 4, 0), (2000, 3, 0), (3000, 16, 1)]
    assert table.of_group["q_proj"].starts.tolist() == [0, 2, 4]
    assert tiles(table, "o_proj") == [(2200, 16, 0), (2200 + 16 * 2 * 8, 1, 0), (3500, 1, 1)]
    assert table.of_group["o_proj"].tiles[1, :3].tolist() == [2300, 2300 + 16 * 2 * 8, 3600]
    assert table.active == {"q_proj", "o_proj"}


def test_an_adapter_named_twice_has_both_weights(table):
    a = placed(A, 5, 0)
    table.assign(0, [(a, 0.25), (a, 0.5)])
    table.of_step({0})
    assert table.weights[0, 5] == 0.75


def test_an_adapter_that_comes_back_elsewhere_is_read_there(table):
    """Also where no step lies between its leaving and its coming back."""
    table.assign(0, [(placed(A, 5, 0), 1.0)])
    table.of_step({0})
    table.change({1: [(placed(A, 9, 2048), 1.0)], 0: ()})
    table.of_step({1})
    assert tiles(table)[0] == (2048, 16, 9)
    assert table.weights[1, 9] == 1.0
    assert table.weights[0].abs().sum() == 0


def test_a_row_goes_to_another_at_once(table):
    table.change({0: [(placed(A, 5, 0), 1.0), (placed(B, 3, 1024), 2.0)]})
    table.of_step({0})
    table.change({0: [(placed(B, 3, 1024), 0.5)]})
    table.of_step({0})
    assert table.weights[0, [5, 3]].tolist() == [0.0, 0.5]
    assert tiles(table) == [(1024, 16, 3), (1024 + 16 * 2 * 8, 4, 3)]


@pytest.mark.parametrize("mixture", [(), [(placed(B, 3, 1024), 1.0)]])
def test_tiles_that_could_not_be_written_are_so_before_the_next_step(table, mixture, monkeypatch):
    table.assign(0, [(placed(A, 5, 0), 1.0)])
    table.of_step({0})
    table.assign(0, mixture)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_mixtures, "to_device", lambda *_: pytest.fail("no memory"))
        with pytest.raises(pytest.fail.Exception, match="no memory"):
            table.of_step({0})
    table.of_step({0})
    assert {slot for _, _, slot in tiles(table)} == {one.slot for one, _ in mixture}


def lists(table, row, first="gate_proj"):
    """A row's list: where each target's entries begin, and the entries: places of A and B, weight, columns."""
    group = table.of_group[first]
    numbers = group.own[row].tolist()
    ends = numbers[: len(group.group.targets) + 1]
    entries = [numbers[4 + 3 * i : 7 + 3 * i] for i in range(ends[-1])]
    weights = torch.tensor([meta >> 32 for _, _, meta in entries], dtype=torch.int32).view(torch.float32).tolist()
    return ends, [(a, b, weight, meta & 0xFF) for (a, b, meta), weight in zip(entries, weights, strict=True)]


def test_a_row_has_a_list_of_its_own_columns_but_for_queries_keys_and_values(table):
    both = Placed(A, 0, {"q_proj": Part(0, 0, 8), "gate_proj": Part(0, 640, 20), "up_proj": Part(2000, 2100, 3)})
    other = Placed(B, 1, {"up_proj": Part(3000, 3100, 8), "o_proj": Part(3500, 3600, 1)})
    table.assign(2, [(other, -0.5), (both, 1.5)])
    table.assign(1, [(other, 2.0), (other, 0.25)])
    table.of_step({1, 2})
    of_up = [(2000, 2100, 1.5, 3), (3000, 3100, -0.5, 8)]
    assert lists(table, 2) == (
        [0, 3, 5],
        [(0, 640, 1.5, 8), (8 * 16, 640 + 8 * 16, 1.5, 8), (16 * 16, 640 + 16 * 16, 1.5, 4), *of_up],
    )
    assert lists(table, 2, "o_proj") == ([0, 1], [(3500, 3600, -0.5, 1)])
    assert lists(table, 2, "q_proj") == ([0, 0, 0], [])
    assert lists(table, 1) == ([0, 0, 1], [(3000, 3100, 2.25, 8)])
    assert lists(table, 3) == ([0, 0, 0], [])
    assert table.entries([1, 2]) == 5 + 1
    table.assign(2, ())
    table.of_step({1})
    assert lists(table, 2) == ([0, 0, 0], [])


def test_a_row_of_many_columns_is_in_no_list(table):
    """Steps in which it is multiply all tiles with all tokens."""

    def of_gate(key, slot, rank=20):
        return Placed(key, slot, {"gate_proj": Part(0, 0, rank)})

    table.assign(1, [(of_gate(A, 5), 1.0)])
    table.assign(2, [(of_gate(A, 5), 0.0), (of_gate(B, 3, rank=8 * 33), 1.0)])
    table.of_step({1, 2})
    assert table.entries({1}) == table.entries({0, 1, 3}) == 3
    assert table.entries({0, 3}) == 0
    assert table.entries({1, 2}) == float("inf")
    assert lists(table, 2) == ([0, 0, 0], [])
    table.assign(2, [(of_gate(A, 5), 1e300)])  # more than its dtype has
    assert table.entries({1, 2}) == 3
    table.of_step({2})
    assert lists(table, 2)[1][0][2] == float("inf")
