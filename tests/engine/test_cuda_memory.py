"""How the memory of a GPU is shared out, by numbers alone."""

import pytest

from lorauter.engine.cuda_memory import owed

GIB = 1 << 30


@pytest.mark.parametrize(
    ("spare", "beside", "left"),
    [
        (0, 5 * GIB, 0),
        (2 * GIB, 0, 2 * GIB),
        (2 * GIB, 3 * GIB // 4, 2 * GIB),  # what the process has there itself
        (2 * GIB, 7 * GIB // 4, GIB),  # one of two is there
        (2 * GIB, 9 * GIB, 0),
    ],
)
def test_others_are_left_what_they_have_not_taken_yet(spare, beside, left):
    assert owed(spare, beside) == left
