import random
from itertools import pairwise

import pytest

from lorauter.engine.arena import ALIGNMENT, Stretches, aligned


@pytest.mark.parametrize("seed", range(5))
def test_stretches_never_overlap_and_all_comes_back(seed):
    draw = random.Random(seed)
    stretches, taken = Stretches(40 * ALIGNMENT), {}
    for _ in range(300):
        if taken and draw.random() < 0.45:
            start = draw.choice(list(taken))
            stretches.give_back(start, taken.pop(start))
        elif (start := stretches.take(size := draw.randint(1, 8 * ALIGNMENT))) is not None:
            taken[start] = size
        places = sorted((start, start + aligned(size)) for start, size in taken.items())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
        assert all(start % ALIGNMENT == 0 and end <= stretches.size for start, end in places)
    for start, size in taken.items():
        stretches.give_back(start, size)
    assert stretches.take(40 * ALIGNMENT) == 0
    assert stretches.take(1) is None


def test_the_smallest_stretch_that_fits_is_taken():
    stretches = Stretches(10 * ALIGNMENT)
    starts = [stretches.take(size * ALIGNMENT) for size in (4, 1, 2, 1, 2)]
    stretches.give_back(starts[0], 4 * ALIGNMENT)
    stretches.give_back(starts[2], 2 * ALIGNMENT)
    tried = stretches.copy()
    assert tried.take(2 * ALIGNMENT) == starts[2]
    assert stretches.take(2 * ALIGNMENT - 1) == starts[2]  # what was tried on a copy took nothing
    assert stretches.take(3 * ALIGNMENT) == starts[0]
