import time
from dataclasses import dataclass

import numpy as np
import pytest

from lorauter.catalog.rerank import Ranking, Reranker, softmax
from lorauter.encoder import normalised


@dataclass
class World:
    """Tasks as clouds of embeddings, with words of their own among common ones.

    Attributes:
        noise: distance of an example from its task's centre.
        own: chance that a word is one of the task's.
    """

    tasks: int
    dimension: int = 32
    noise: float = 1.0
    own: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.centres = normalised(self.random.standard_normal((self.tasks, self.dimension)).astype(np.float32))

    def embed(self, task: int) -> np.ndarray:
        noise = self.random.standard_normal(self.dimension) * self.noise / self.dimension**0.5
        return normalised((self.centres[task] + noise).astype(np.float32))

    def text(self, task: int) -> str:
        words = [
            f"own{task}x{self.random.integers(8)}"
            if self.random.random() < self.own
            else f"w{self.random.integers(99)}"
            for _ in range(8)
        ]
        return " ".join(words)

    def examples(self, *numbers: int) -> tuple[list[np.ndarray], list[list[str]]]:
        """Of each task that many."""
        embeddings = [np.stack([self.embed(task) for _ in range(n)]) for task, n in enumerate(numbers)]
        return embeddings, [[self.text(task) for _ in range(n)] for task, n in enumerate(numbers)]


def rank(reranker: Reranker, examples, embedding, text: str, tasks=None) -> Ranking:
    tasks = np.arange(len(examples)) if tasks is None else np.asarray(tasks)
    centroids = normalised(np.stack([rows.mean(axis=0) for rows in examples]))
    return reranker.rank(embedding, text, tasks, (centroids @ embedding)[tasks])


def assert_sound(ranking: Ranking, size: int) -> None:
    assert ranking.logits.shape == (size,)
    assert np.isfinite(ranking.logits).all()
    assert softmax(ranking.logits).sum() == pytest.approx(1)
    assert 0 <= ranking.familiarity <= 1


def test_the_own_task_wins_where_tasks_are_apart() -> None:
    world = World(8, noise=0.5)
    examples, texts = world.examples(*[10] * 8)
    reranker = Reranker.fit(examples, texts)
    for task in [*range(8)] * 5:
        chances = softmax(rank(reranker, examples, world.embed(task), world.text(task)).logits)
        assert chances.argmax() == task
        assert chances[task] > 0.8


@pytest.mark.parametrize("told_by", ["words", "embeddings"])
def test_either_words_or_embeddings_alone_tell_tasks_apart(told_by) -> None:
    world = World(6, noise=0.7, own=0.6) if told_by == "words" else World(6, noise=0.7, own=0.0)
    if told_by == "words":
        world.centres[:] = world.centres[0]
    examples, texts = world.examples(*[20] * 6)
    reranker = Reranker.fit(examples, texts)
    right = [rank(reranker, examples, world.embed(t), world.text(t)).logits.argmax() == t for t in [*range(6)] * 20]
    assert np.mean(right) > 0.9


def test_the_discriminant_is_fishers_with_a_shrunken_covariance() -> None:
    """Two points differ in their scores for a task by as much as in their log-densities under a shared Gaussian."""
    examples, texts = World(3, dimension=4).examples(5, 9, 7)
    reranker = Reranker.fit(examples, texts)
    means = [rows.mean(axis=0).astype(np.float64) for rows in examples]
    covariance = sum((rows - mean).T @ (rows - mean) for rows, mean in zip(examples, means, strict=True)) / (21 - 3)
    covariance = 0.7 * covariance + 0.3 * np.trace(covariance) / 4 * np.eye(4)
    query = np.array([0.3, -0.2, 0.9, 0.1])
    densities = np.array([-0.5 * (query - m) @ np.linalg.solve(covariance, query - m) for m in means])
    scores = reranker.discriminant @ query + reranker.bias
    np.testing.assert_allclose(scores - scores[0], densities - densities[0], rtol=1e-3, atol=1e-3)


def test_it_beats_the_nearest_centroid_where_the_noise_has_a_direction() -> None:
    world = World(10, noise=0.5, own=0.0)
    direction = world.random.standard_normal(32).astype(np.float32) / 32**0.5

    def bent(rows):
        return normalised((rows + 2 * world.random.standard_normal((len(rows), 1)) * direction).astype(np.float32))

    examples, texts = world.examples(*[20] * 10)
    examples = [bent(rows) for rows in examples]
    reranker = Reranker.fit(examples, texts)
    centroids = normalised(np.stack([rows.mean(axis=0) for rows in examples]))
    nearest, reranked = [], []
    for task in [*range(10)] * 20:
        (query,) = bent(world.embed(task)[None])
        nearest.append((centroids @ query).argmax() == task)
        reranked.append(rank(reranker, examples, query, world.text(task)).logits.argmax() == task)
    assert np.mean(reranked) > np.mean(nearest) + 0.05


@pytest.mark.parametrize("noise", [0.8, 1.6, 3.0])
def test_probabilities_are_calibrated(noise) -> None:
    world = World(12, noise=noise, own=0.08)
    examples, texts = world.examples(*[20] * 12)
    reranker = Reranker.fit(examples, texts)
    sure, right = [], []
    for task in [*range(12)] * 50:
        chances = softmax(rank(reranker, examples, world.embed(task), world.text(task)).logits)
        sure.append(chances.max())
        right.append(chances.argmax() == task)
    assert np.mean(sure) == pytest.approx(np.mean(right), abs=0.1)
    upper = np.array(sure) >= np.median(sure)
    assert np.mean(np.array(sure)[upper]) == pytest.approx(np.mean(np.array(right)[upper]), abs=0.12)


def test_a_query_is_less_familiar_with_its_task_taken_out() -> None:
    world = World(15, noise=1.0)
    examples, texts = world.examples(*[12] * 15)
    reranker = Reranker.fit(examples, texts)
    known, unknown = [], []
    for task in [*range(15)] * 20:
        query, text = world.embed(task), world.text(task)
        others = np.delete(np.arange(15), task)
        known.append(rank(reranker, examples, query, text).familiarity)
        unknown.append(rank(reranker, examples, query, text, others).familiarity)
    assert np.mean(np.array(known) > np.array(unknown)) > 0.95
    assert np.mean(known) > 0.8
    assert np.mean(unknown) < 0.2
    assert np.mean(np.array(unknown) < reranker.stranger) < 0.1
    assert np.mean(np.array(known) < reranker.stranger) < 0.01


def test_the_fit_is_the_same_to_the_byte_and_does_not_touch_what_it_is_given() -> None:
    examples, texts = World(9).examples(*[7] * 9)
    before = [rows.copy() for rows in examples]
    one = Reranker.fit(examples, texts).arrays()
    two = Reranker.fit([rows.copy() for rows in examples], [list(task) for task in texts]).arrays()
    assert set(one) == set(two)
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name
        assert one[name].dtype == two[name].dtype
    for rows, original in zip(examples, before, strict=True):
        np.testing.assert_array_equal(rows, original)


def test_it_is_the_same_after_it_was_taken_apart() -> None:
    world = World(9)
    examples, texts = world.examples(*range(1, 10))
    reranker = Reranker.fit(examples, texts)
    again = Reranker.from_arrays(reranker.arrays())
    assert again.stranger == reranker.stranger
    for task in range(9):
        query, text = world.embed(task), world.text(task)
        one, two = rank(reranker, examples, query, text), rank(again, examples, query, text)
        np.testing.assert_array_equal(one.logits, two.logits)
        assert one.familiarity == two.familiarity
    arrays = reranker.arrays()
    del arrays["lexicon_starts"]
    with pytest.raises(KeyError, match="lexicon_starts"):
        Reranker.from_arrays(arrays)


def test_the_order_of_the_candidates_does_not_matter() -> None:
    world = World(9)
    examples, texts = world.examples(*[5] * 9)
    reranker = Reranker.fit(examples, texts)
    query, text = world.embed(3), world.text(3)
    one = rank(reranker, examples, query, text)
    two = rank(reranker, examples, query, text, np.arange(9)[::-1])
    np.testing.assert_allclose(two.logits[::-1], one.logits, rtol=1e-5)
    assert two.familiarity == pytest.approx(one.familiarity, rel=1e-5)
    few = rank(reranker, examples, query, text, [3, 7])
    np.testing.assert_allclose(few.logits, one.logits[[3, 7]], rtol=1e-5)


@pytest.mark.parametrize(
    "numbers", [(1,), (2,), (20,), (1, 1), (1, 2), (1,) * 12, (2,) * 12, (1, 1, 30), (3, 1, 20, 7, 2), (5, 6)]
)
def test_any_numbers_of_tasks_and_examples_will_do(numbers) -> None:
    world = World(len(numbers), noise=0.4)
    examples, texts = world.examples(*numbers)
    reranker = Reranker.fit(examples, texts)
    assert all(np.isfinite(array).all() for array in reranker.arrays().values())
    right = 0
    for task in range(len(numbers)):
        ranking = rank(reranker, examples, world.embed(task), world.text(task))
        assert_sound(ranking, len(numbers))
        right += ranking.logits.argmax() == task
    assert right >= 0.75 * len(numbers)


@pytest.mark.parametrize("each", [1, 2, 3])
def test_few_examples_do_not_make_it_too_sure(each) -> None:
    """With one or two examples a task nothing, or hardly anything, tells how far examples lie from their task."""
    world = World(10, noise=1.5, own=0.05)
    examples, texts = world.examples(*[each] * 10)
    reranker = Reranker.fit(examples, texts)
    sure, right = [], []
    for task in [*range(10)] * 40:
        chances = softmax(rank(reranker, examples, world.embed(task), world.text(task)).logits)
        sure.append(chances.max())
        right.append(chances.argmax() == task)
    assert np.mean(right) > 0.35
    assert np.mean(sure) < np.mean(right) + 0.3


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: np.zeros_like(rows),
        lambda rows: np.ones_like(rows) / rows.shape[1] ** 0.5,
        lambda rows: np.repeat(rows[:1], len(rows), axis=0),
    ],
    ids=["zero", "all the same", "the same within a task"],
)
@pytest.mark.parametrize("text", ["...", "the same everywhere", ""])
def test_degenerate_examples_never_make_nan(change, text) -> None:
    world = World(5)
    examples, texts = world.examples(*[6] * 5)
    examples, texts = [change(rows) for rows in examples], [[text] * 6 for _ in texts]
    reranker = Reranker.fit(examples, texts)
    assert all(np.isfinite(array).all() for array in reranker.arrays().values())
    for query in (world.embed(0), np.zeros(32, np.float32), -examples[0][0]):
        for words in ("...", world.text(0), text):
            assert_sound(rank(reranker, examples, query, words), 5)
            assert_sound(rank(reranker, examples, query, words, [2]), 1)


def test_it_fits_fifty_tasks_in_seconds() -> None:
    examples, texts = World(50, dimension=384).examples(*[20] * 50)
    started = time.perf_counter()
    Reranker.fit(examples, texts)
    assert time.perf_counter() - started < 15


def test_the_softmax() -> None:
    np.testing.assert_allclose(softmax(np.log([1.0, 2.0, 5.0])), [0.125, 0.25, 0.625])
    np.testing.assert_allclose(softmax(np.array([1e6, 0.0, -1e6])), [1, 0, 0])
    np.testing.assert_allclose(softmax(np.array([[0.0, 0.0], [1e300, -1e300]])), [[0.5, 0.5], [1, 0]])
