import numpy as np
import pytest

from lorauter.catalog.whitening import Whitening


def make_states(seed: int, *sizes: int, layers: int = 2, d: int = 12) -> list[np.ndarray]:
    """Of tasks: clouds of unequal directions around means of their own, far from the origin."""
    random = np.random.default_rng(seed)
    spread = random.uniform(0.1, 3, (layers, d))
    return [
        (5 + random.standard_normal((1, layers, d)) + spread * random.standard_normal((size, layers, d))).astype(
            np.float16
        )
        for size in sizes
    ]


def similarity(whitening: Whitening, states: np.ndarray, tasks: list[np.ndarray]) -> np.ndarray:
    means = np.stack([task.mean(axis=0, dtype=np.float64) for task in tasks])
    return whitening.similarities(states, whitening.centred(means))


def by_formula(states: np.ndarray, tasks: list[np.ndarray], seen: list[np.ndarray], share: np.ndarray) -> np.ndarray:
    """The module's formula, word by word, with an inverse square root; `share` is each layer's of the identity."""
    found = []
    for layer in range(states.shape[1]):
        rows = np.concatenate(seen)[:, layer].astype(np.float64)
        mean = rows.mean(axis=0)
        values, vectors = np.linalg.eigh(0.9 * (rows - mean).T @ (rows - mean) + share[layer] * np.eye(rows.shape[1]))
        root = vectors / np.sqrt(values) @ vectors.T

        def whitened(x: np.ndarray, mean: np.ndarray = mean, root: np.ndarray = root) -> np.ndarray:
            z = (x - mean) @ root
            return z / np.linalg.norm(z, axis=-1, keepdims=True)

        means = np.stack([task[:, layer].mean(axis=0, dtype=np.float64) for task in tasks])
        found.append(whitened(states[:, layer].astype(np.float64)) @ whitened(means).T)
    return np.mean(found, axis=0)


def shares(states: list[np.ndarray]) -> np.ndarray:
    rows = np.concatenate(states).astype(np.float64)
    return 0.1 * ((rows - rows.mean(axis=0)) ** 2).sum(axis=(0, 2)) / rows.shape[2]


def test_similarities_are_cosines_of_whitened_states() -> None:
    tasks, queries = make_states(0, 9, 7, 30), make_states(1, 5)[0]
    found = similarity(Whitening.fit(tasks), queries, tasks)
    np.testing.assert_allclose(found, by_formula(queries, tasks, tasks, shares(tasks)), atol=1e-4)


@pytest.mark.parametrize("gone", [[1], [0, 2], [3], [0, 1, 2]])
def test_a_whitening_without_tasks_is_the_one_that_has_never_seen_them(gone) -> None:
    tasks, queries = make_states(0, 9, 1, 30, 6, 8), make_states(1, 5)[0]
    left = [task for i, task in enumerate(tasks) if i not in gone]
    together = Whitening.fit(tasks).without(np.concatenate([tasks[i] for i in gone]))
    one_by_one = Whitening.fit(tasks)
    for i in gone:
        one_by_one = one_by_one.without(tasks[i])
    expected = by_formula(queries, left, left, shares(tasks))
    assert abs(expected - similarity(Whitening.fit(tasks), queries, left)).max() > 0.01
    for whitening in (together, one_by_one):
        np.testing.assert_allclose(similarity(whitening, queries, left), expected, atol=2e-3)
    assert together.added.shape[2] <= min(12, sum(len(tasks[i]) for i in gone))


def test_a_whitening_keeps_what_would_leave_it_nothing() -> None:
    [task] = make_states(0, 4)
    whitening = Whitening.fit([task])
    assert whitening.without(task) is whitening
    assert whitening.without(task[:0]) is whitening


def test_states_that_are_all_the_same_are_like_nothing() -> None:
    same = np.ones((3, 2, 4), np.float16)
    assert not similarity(Whitening.fit([same, same]), same, [same, same]).any()


def test_a_task_that_is_alone_is_like_nothing() -> None:
    alone, other = make_states(0, 9, 7)
    found = similarity(Whitening.fit([alone, other]).without(other), other, [alone])
    assert abs(found).max() < 0.01


def test_it_is_read_as_it_was_written() -> None:
    tasks = make_states(0, 9, 7)
    whitening = Whitening.fit(tasks)
    again = Whitening.from_arrays(whitening.arrays())
    np.testing.assert_array_equal(similarity(again, tasks[0], tasks), similarity(whitening, tasks[0], tasks))
    with pytest.raises(KeyError):
        Whitening.from_arrays({"mean": whitening.mean})
