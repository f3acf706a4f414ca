"""What adapters are worth for many queries at once."""

import numpy as np
import pytest

from lorauter.routing.worth import KnownTask, Worths


def known(name: str, **worths: tuple[float, float]) -> KnownTask:
    """A task whose adapters are worth so much, and so much more for a query that is of it."""
    worth, more = zip(*worths.values(), strict=True) if worths else ((), ())
    return KnownTask(name, tuple(worths), worth, more, None, (), None)


TASKS = [
    known("sums", own=(1.0, 0.5), other=(0.5, 0.0)),
    known("none"),
    known("poems", made=(1.5, 0.5), own=(0.2, 0.0)),
]


def test_worths_are_summed_by_the_chances_of_tasks_and_what_was_composed_serves_its_own_task_alone() -> None:
    worths = Worths([4, 5, 9], TASKS, {"made"})
    assert worths.names == ["made", "other", "own"]
    own, kindred = np.array([[0.5, 0.2, 0.1], [0.0, 0.0, 1.0]]), np.array([[0.1, 0.0, 0.1], [0.0, 0.0, 0.0]])
    expected = worths.expected(own, kindred)
    np.testing.assert_allclose(expected[0], [0.1 * 2.0, 0.6 * 0.5, 0.6 * 1.0 + 0.5 * 0.5 + 0.2 * 0.2])
    np.testing.assert_allclose(expected[1], [2.0, 0.0, 0.2])
    for n in range(2):
        assert worths.expected(own[n : n + 1], kindred[n : n + 1]).tolist() == expected[n : n + 1].tolist()
    before = expected[0].copy()
    worths.correct(expected[0], 2, 0.1, 0.1, np.array([1.0, -0.1]))
    np.testing.assert_allclose(expected[0] - before, [0.1, 0.0, -0.02], atol=1e-12)


@pytest.mark.parametrize("tasks", [[], [known("none")]])
def test_tasks_without_adapters_are_worth_nothing(tasks) -> None:
    shape = (2, len(tasks))
    assert Worths(range(len(tasks)), tasks, ()).expected(np.ones(shape), np.ones(shape)).shape == (2, 0)
