import math

import numpy as np
import pytest

from lorauter.catalog.utility import PRIOR_EXAMPLES, best_score, shrunken_scores, worths

SQUARE = np.eye(2, dtype=np.float32)


def near(*cosines: float) -> list[float]:
    """What two tasks of these cosines count for each other."""
    return [math.exp((cosine - 1) / 0.05) for cosine in cosines]


def test_a_score_is_shrunken_towards_what_similar_tasks_say_by_hand() -> None:
    centroids = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    scores = [
        {"a": {0: 1.0, 3: 0.5, 4: 0.0}, "b": {0: 0.2}},
        {"a": {0: 0.4, 1: 0.8}},
        {"a": {2: 0.1}, "b": {0: 0.9, 1: 0.7}},
    ]
    n01, n02, n12 = near(0.8, 0.6, 0.96)
    k = PRIOR_EXAMPLES
    expected = [
        [(3 * 0.5 + k * (n01 * 0.6 + n02 * 0.1) / (n01 + n02)) / (3 + k), (0.2 + k * 0.8) / (1 + k)],
        [(2 * 0.6 + k * (n01 * 0.5 + n12 * 0.1) / (n01 + n12)) / (2 + k), np.nan],
        [(0.1 + k * (n02 * 0.5 + n12 * 0.6) / (n02 + n12)) / (1 + k), (2 * 0.8 + k * 0.2) / (2 + k)],
    ]
    np.testing.assert_allclose(shrunken_scores(scores, ["a", "b"], centroids), expected, rtol=1e-5)


def test_nearer_tasks_say_more() -> None:
    angles = np.array([0, 0.3, 0.6])
    centroids = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    mine = {"a": {0: 0.5}}
    well_nearby = shrunken_scores([mine, {"a": {0: 1.0}}, {"a": {0: 0.0}}], ["a"], centroids)
    well_far_off = shrunken_scores([mine, {"a": {0: 0.0}}, {"a": {0: 1.0}}], ["a"], centroids)
    assert well_nearby[0, 0] > 0.7 > 0.3 > well_far_off[0, 0]


def test_more_examples_are_shrunken_less() -> None:
    other = {"a": dict.fromkeys(range(10), 0.0)}
    got = [shrunken_scores([{"a": dict.fromkeys(range(n), 1.0)}, other], ["a"], SQUARE)[0, 0] for n in (1, 4, 20, 1000)]
    assert got == pytest.approx([n / (n + PRIOR_EXAMPLES) for n in (1, 4, 20, 1000)])


def test_what_was_tried_nowhere_else_keeps_its_mean() -> None:
    assert shrunken_scores([{"a": {0: 1.0, 1: 0.5}}, {}], ["a"], SQUARE)[0, 0] == pytest.approx(0.75)
    assert shrunken_scores([{"a": {0: 0.25}}], ["a"], SQUARE[:1])[0, 0] == pytest.approx(0.25)


def test_what_was_not_tried_is_nan_and_unknown_adapters_are_no_column() -> None:
    got = shrunken_scores([{"a": {0: 1.0}, "ghost": {0: 1.0}, "b": {}}, {}], ["b", "a"], SQUARE)
    np.testing.assert_array_equal(got, [[np.nan, 1.0], [np.nan, np.nan]])
    assert shrunken_scores([{}, {}], [], SQUARE).shape == (2, 0)


def test_a_score_of_zero_is_not_the_same_as_untried() -> None:
    got = shrunken_scores([{"a": {0: 0.0}}, {"a": {0: 0.0}}, {}], ["a"], np.eye(3, dtype=np.float32))
    np.testing.assert_array_equal(got[:, 0], [0, 0, np.nan])


# Worths


@pytest.mark.parametrize(
    ("scores", "declared", "expected"),
    [
        ([0.8, 0.4], [False, False], [1, 0.5]),
        ([0.8, 0.6], [False, True], [1, 1.25]),
        ([0.8, 0.2], [False, True], [1, 0.75]),
        ([0.4, None], [False, True], [1, 1.5]),
        ([0.4, None], [False, False], [1, 1]),
        ([0.01, 0.0, None], [False, True, True], [0.2, 0.5, 1.5]),
        ([None, None, None], [True, True, False], [1, 0.5, 0.25]),
        ([], [], []),
    ],
)
def test_what_was_made_for_the_task_is_worth_half_as_much_again(scores, declared, expected) -> None:
    np.testing.assert_allclose(worths(scores, declared), expected)


@pytest.mark.parametrize(
    ("scores", "best"), [([0.3, None, 0.7], 0.7), ([0.01, 0.0], 0.05), ([None], 0.05), ([-3.0], 0.05), ([], 0.05)]
)
def test_the_best_score_is_never_next_to_nothing(scores, best) -> None:
    assert best_score(scores) == best
