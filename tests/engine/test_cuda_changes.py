"""Changes go with a step as far as it has room for them, with a stand-in for the kernel (test_cuda_kernels.py)."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from lorauter.engine import cuda_changes
from lorauter.engine.cuda_changes import Changes, Pending


@pytest.fixture
def flats(monkeypatch):
    """Three tensors, which a stand-in for the kernel writes to."""

    def write(flats, where, values, count):
        whole = torch.cat(flats)
        most = len(where) if count is None else int(count)
        whole[where[:most].long()] = values[:most]
        for flat, part in zip(flats, whole.split([len(flat) for flat in flats]), strict=True):
            flat.copy_(part)

    monkeypatch.setattr(cuda_changes.kernels, "write_changes", write)
    return torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)


def pending(values):
    result = Pending()
    result.add(values)
    return result


def test_what_is_new_goes_with_a_step(flats):
    changes = Changes(flats, pending({1: 10, 8: 80}))
    changes.pending.add_run(4, [40, 50])
    assert changes.third == 6
    places, values = np.full(5, -1, np.int32), np.full(5, -1, np.int32)
    assert changes.put(places, values) == 4
    assert (places.tolist(), values.tolist()) == ([1, 8, 4, 5, -1], [10, 80, 40, 50, -1])
    assert len(changes.pending) == 4  # until the step is launched
    changes.pending.clear()
    changes.written(torch.from_numpy(places), torch.from_numpy(values), torch.tensor([4]))
    assert [flat.tolist() for flat in flats] == [[0, 10, 0, 0], [40, 50], [0, 0, 80]]
    assert changes.put(places, values) == 0


def test_what_it_has_no_room_for_is_written_at_once(flats):
    changes = Changes(flats, pending({place: place + 1 for place in range(9)}))
    places = np.full(8, -1, np.int32)
    assert changes.put(places, places.copy()) == 0
    assert not len(changes.pending)
    assert [flat.tolist() for flat in flats] == [[1, 2, 3, 4], [5, 6], [7, 8, 9]]


def test_what_could_not_be_written_is_still_to_be(flats, monkeypatch):
    changes = Changes(flats, pending({1: 10}))
    with monkeypatch.context() as patch:
        patch.setattr(cuda_changes, "to_device", lambda *_: pytest.fail("no memory"))
        with pytest.raises(pytest.fail.Exception, match="no memory"):
            changes.write()
    changes.write()
    assert flats[0].tolist() == [0, 10, 0, 0]
    assert not len(changes.pending)


def test_where_nothing_is_new_nothing_is_written(flats, monkeypatch):
    monkeypatch.setattr(cuda_changes.kernels, "write_changes", None)
    Changes(flats, Pending()).write()
