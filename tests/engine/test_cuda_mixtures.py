"""What GPU kernels read of rows' mixtures, on a CPU: tables that follow adapters wherever they are."""

import pytest
import torch

from lorauter.engine.slots import Group, Part, Placed

pytest.importorskip("triton")
from lorauter.engine import cuda_mixtures

GROUPS = [Group(("q_proj", "v_proj"), 8, (8, 4)), Group(("o_proj",), 8, (8,))]
A, B = ("a", "1"), ("b", "1")


@pytest.fixture
def table(monkeypatch):
    def write(flat, where, values):
        flat[where.long()] = values

    monkeypatch.setattr(cuda_mixtures.kernels, "write_pairs", write)
    return cuda_mixtures.CudaMixtures(GROUPS, 2, torch.zeros(4096), rows=4)


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
    table.assign(0, ())
    table.assign(1, [(placed(A, 9, 2048), 1.0)])
    table.of_step({1})
    assert tiles(table)[0] == (2048, 16, 9)
    assert table.weights[1, 9] == 1.0
    assert table.weights[0].abs().sum() == 0
