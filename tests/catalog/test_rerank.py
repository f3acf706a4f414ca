import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from lorauter.catalog.lexicon import grams_of, idf_of
from lorauter.catalog.rerank import Candidates, Ranking, Reranker, softmax
from lorauter.catalog.sample import Sample
from lorauter.catalog.whitening import Whitening
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


@dataclass
class Fitted:
    """A reranker that is fitted to tasks, and these."""

    examples: list[np.ndarray]
    texts: list[list[str]]
    among: Callable[[np.ndarray], np.ndarray] = lambda cosines: cosines  # how near tasks are, as a search sees it
    states: Sequence[np.ndarray] = ()

    def __post_init__(self) -> None:
        self.grams = [tuple(map(grams_of, task)) for task in self.texts]
        idf = idf_of(ids for task in self.grams for ids in task)
        self.all = Candidates.of(self.examples, self.grams, idf, self.states)
        names = tuple(map(str, range(len(self.examples))))
        sample = Sample(names, (0,) * len(names), tuple(self.examples), tuple(self.grams), tuple(self.states))
        self.reranker = Reranker.fit(sample, self)

    def places(self, names: Sequence[str]) -> np.ndarray:
        return np.array(list(map(int, names)))

    def nearest(self, queries: np.ndarray, depth: int) -> np.ndarray:
        return np.argsort(-self.among(queries @ self.all.centroids.T), axis=1)[:, :depth]

    def candidates(self, places: np.ndarray) -> Candidates:
        words = [self.all.words[place] for place in places]
        states = None if self.all.states is None else self.all.states[places]
        return Candidates(self.all.centroids[places], self.all.lengths[places], words, states)

    def rank(self, embedding: np.ndarray, text: str, tasks: Sequence[int] | None = None) -> Ranking:
        places = np.arange(len(self.examples)) if tasks is None else np.asarray(tasks)
        return rank(self.reranker, embedding, text, self.candidates(places))


def rank(
    reranker: Reranker,
    embedding: np.ndarray,
    text: str,
    candidates: Candidates,
    state: np.ndarray | None = None,
    whitening: Whitening | None = None,
) -> Ranking:
    """Of one query."""
    states = None if state is None else state[None]
    found = reranker.rank(embedding[None], [text], candidates, None, states, whitening)
    return Ranking(*(None if of is None else of[0] for of in vars(found).values()))


def assert_sound(ranking: Ranking, size: int) -> None:
    assert ranking.logits.shape == (size,)
    assert np.isfinite(ranking.logits).all()
    assert softmax(ranking.logits).sum() == pytest.approx(1)
    assert 0 <= ranking.familiarity <= 1


def test_the_own_task_wins_where_tasks_are_apart() -> None:
    world = World(8, noise=0.5)
    examples, texts = world.examples(*[10] * 8)
    fitted = Fitted(examples, texts)
    for task in [*range(8)] * 5:
        chances = softmax(fitted.rank(world.embed(task), world.text(task)).logits)
        assert chances.argmax() == task
        assert chances[task] > 0.8


@pytest.mark.parametrize("told_by", ["words", "embeddings"])
def test_either_words_or_embeddings_alone_tell_tasks_apart(told_by) -> None:
    world = World(6, noise=0.7, own=0.6) if told_by == "words" else World(6, noise=0.7, own=0.0)
    if told_by == "words":
        world.centres[:] = world.centres[0]
    examples, texts = world.examples(*[20] * 6)
    fitted = Fitted(examples, texts)
    right = [fitted.rank(world.embed(t), world.text(t)).logits.argmax() == t for t in [*range(6)] * 20]
    assert np.mean(right) > 0.9


def test_the_discriminant_is_fishers_with_a_shrunken_covariance() -> None:
    """Two points differ in their scores for a task by as much as in their log-densities under a shared Gaussian."""
    examples, texts = World(3, dimension=4).examples(5, 9, 7)
    fitted = Fitted(examples, texts)
    means = [rows.mean(axis=0).astype(np.float64) for rows in examples]
    covariance = sum((rows - mean).T @ (rows - mean) for rows, mean in zip(examples, means, strict=True)) / (21 - 3)
    covariance = 0.7 * covariance + 0.3 * np.trace(covariance) / 4 * np.eye(4)
    query = np.array([0.3, -0.2, 0.9, 0.1], np.float32)
    densities = np.array([-0.5 * (query - m) @ np.linalg.solve(covariance, query - m) for m in means])
    alone = replace(fitted.reranker, coefficients=np.array([1.0, 0.0, 0.0]))
    scores = rank(alone, query, "", fitted.candidates(np.arange(3))).logits
    np.testing.assert_allclose(scores - scores[0], densities - densities[0], rtol=1e-3, atol=1e-3)


def test_it_beats_the_nearest_centroid_where_the_noise_has_a_direction() -> None:
    world = World(10, noise=0.5, own=0.0)
    direction = world.random.standard_normal(32).astype(np.float32) / 32**0.5

    def bent(rows):
        return normalised((rows + 2 * world.random.standard_normal((len(rows), 1)) * direction).astype(np.float32))

    examples, texts = world.examples(*[20] * 10)
    examples = [bent(rows) for rows in examples]
    fitted = Fitted(examples, texts)
    centroids = normalised(np.stack([rows.mean(axis=0) for rows in examples]))
    nearest, reranked = [], []
    for task in [*range(10)] * 20:
        (query,) = bent(world.embed(task)[None])
        nearest.append((centroids @ query).argmax() == task)
        reranked.append(fitted.rank(query, world.text(task)).logits.argmax() == task)
    assert np.mean(reranked) > np.mean(nearest) + 0.05


@pytest.mark.parametrize("noise", [0.8, 1.6, 3.0])
def test_probabilities_are_calibrated(noise) -> None:
    world = World(12, noise=noise, own=0.08)
    examples, texts = world.examples(*[20] * 12)
    fitted = Fitted(examples, texts)
    sure, right = [], []
    for task in [*range(12)] * 50:
        chances = softmax(fitted.rank(world.embed(task), world.text(task)).logits)
        sure.append(chances.max())
        right.append(chances.argmax() == task)
    assert np.mean(sure) == pytest.approx(np.mean(right), abs=0.1)
    upper = np.array(sure) >= np.median(sure)
    assert np.mean(np.array(sure)[upper]) == pytest.approx(np.mean(np.array(right)[upper]), abs=0.12)


def test_a_query_is_less_familiar_with_its_task_taken_out() -> None:
    world = World(15, noise=1.0)
    examples, texts = world.examples(*[12] * 15)
    fitted = Fitted(examples, texts)
    known, unknown = [], []
    for task in [*range(15)] * 20:
        query, text = world.embed(task), world.text(task)
        others = np.delete(np.arange(15), task)
        known.append(fitted.rank(query, text).familiarity)
        unknown.append(fitted.rank(query, text, others).familiarity)
    assert np.mean(np.array(known) > np.array(unknown)) > 0.95
    assert np.mean(known) > 0.8
    assert np.mean(unknown) < 0.2
    assert np.mean(np.array(unknown) < fitted.reranker.stranger) < 0.1
    assert np.mean(np.array(known) < fitted.reranker.stranger) < 0.01


def test_the_fit_is_the_same_however_many_threads_there_are() -> None:
    world = StatesWorld(5, width=576)
    embeddings, texts = world.examples(*[10] * 5)
    states = [np.stack([world.state(task) for _ in range(10)]) for task in range(5)]
    fits = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            fits.append(Fitted(embeddings, texts, states=states).reranker.arrays())
    assert fits[0].keys() == fits[1].keys()
    for name, array in fits[0].items():
        assert array.tobytes() == fits[1][name].tobytes(), name


def test_the_fit_is_the_same_to_the_byte_and_does_not_touch_what_it_is_given() -> None:
    examples, texts = World(9).examples(*[7] * 9)
    before = [rows.copy() for rows in examples]
    one = Fitted(examples, texts).reranker.arrays()
    two = Fitted([rows.copy() for rows in examples], [list(task) for task in texts]).reranker.arrays()
    assert set(one) == set(two)
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name
        assert one[name].dtype == two[name].dtype
    for rows, original in zip(examples, before, strict=True):
        np.testing.assert_array_equal(rows, original)


def test_it_is_the_same_after_it_was_taken_apart() -> None:
    world = World(9)
    examples, texts = world.examples(*range(1, 10))
    fitted = Fitted(examples, texts)
    again = Reranker.from_arrays(fitted.reranker.arrays())
    assert again.stranger == fitted.reranker.stranger
    for task in range(9):
        query, text = world.embed(task), world.text(task)
        one, two = fitted.rank(query, text), rank(again, query, text, fitted.candidates(np.arange(9)))
        np.testing.assert_array_equal(one.logits, two.logits)
        assert one.familiarity == two.familiarity
    arrays = fitted.reranker.arrays()
    del arrays["idf"]
    with pytest.raises(KeyError, match="idf"):
        Reranker.from_arrays(arrays)


def test_it_is_the_same_where_tasks_beyond_its_sample_are_told_by_a_search() -> None:
    """A search that finds the tasks in another order, or a sample of all tasks in another, gives the same fit."""
    examples, texts = World(30, noise=1.2).examples(*[8] * 30)
    one, two = Fitted(examples, texts), Fitted(examples, texts, lambda cosines: -cosines)
    np.testing.assert_allclose(two.reranker.coefficients, one.reranker.coefficients, rtol=1e-4)
    np.testing.assert_allclose(two.reranker.familiar, one.reranker.familiar, rtol=1e-4, atol=1e-5)


def test_a_sample_of_many_tasks_gives_nearly_the_fit_of_all() -> None:
    world = World(300, noise=1.2)
    examples, texts = world.examples(*[8] * 300)
    whole = Fitted(examples, texts)
    part = list(range(0, 300, 2))
    sample = Sample(
        tuple(map(str, part)), (0,) * 150, tuple(examples[t] for t in part), tuple(whole.grams[t] for t in part)
    )
    sampled = Reranker.fit(sample, whole)
    tasks, agree, sure = whole.candidates(np.arange(300)), [], []
    for task in range(0, 300, 3):
        query, text = world.embed(task), world.text(task)
        one, two = (rank(of, query, text, tasks) for of in (whole.reranker, sampled))
        agree.append(one.logits.argmax() == two.logits.argmax())
        sure.append((softmax(one.logits).max(), softmax(two.logits).max(), one.familiarity, two.familiarity))
    assert np.mean(agree) > 0.9
    means = np.mean(sure, axis=0)
    assert means[0] == pytest.approx(means[1], abs=0.08)
    assert means[2] == pytest.approx(means[3], abs=0.08)


def test_the_order_of_the_candidates_does_not_matter() -> None:
    world = World(9)
    examples, texts = world.examples(*[5] * 9)
    fitted = Fitted(examples, texts)
    query, text = world.embed(3), world.text(3)
    one = fitted.rank(query, text)
    two = fitted.rank(query, text, np.arange(9)[::-1])
    np.testing.assert_allclose(two.logits[::-1], one.logits, rtol=1e-5, atol=1e-5)
    assert two.familiarity == pytest.approx(one.familiarity, rel=1e-5)
    few = fitted.rank(query, text, [3, 7])
    np.testing.assert_allclose(few.logits, one.logits[[3, 7]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "numbers", [(1,), (2,), (20,), (1, 1), (1, 2), (1,) * 12, (2,) * 12, (1, 1, 30), (3, 1, 20, 7, 2), (5, 6)]
)
def test_any_numbers_of_tasks_and_examples_will_do(numbers) -> None:
    world = World(len(numbers), noise=0.4)
    examples, texts = world.examples(*numbers)
    fitted = Fitted(examples, texts)
    assert all(np.isfinite(array).all() for array in fitted.reranker.arrays().values())
    right = 0
    for task in range(len(numbers)):
        ranking = fitted.rank(world.embed(task), world.text(task))
        assert_sound(ranking, len(numbers))
        right += ranking.logits.argmax() == task
    assert right >= 0.75 * len(numbers)


@pytest.mark.parametrize("each", [1, 2, 3])
def test_few_examples_do_not_make_it_too_sure(each) -> None:
    """With one or two examples a task nothing, or hardly anything, tells how far examples lie from their task."""
    world = World(10, noise=1.5, own=0.05)
    examples, texts = world.examples(*[each] * 10)
    fitted = Fitted(examples, texts)
    sure, right = [], []
    for task in [*range(10)] * 40:
        chances = softmax(fitted.rank(world.embed(task), world.text(task)).logits)
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
    fitted = Fitted(examples, texts)
    assert all(np.isfinite(array).all() for array in fitted.reranker.arrays().values())
    for query in (world.embed(0), np.zeros(32, np.float32), -examples[0][0]):
        for words in ("...", world.text(0), text):
            assert_sound(fitted.rank(query, words), 5)
            assert_sound(fitted.rank(query, words, [2]), 1)


def test_it_fits_fifty_tasks_in_seconds() -> None:
    examples, texts = World(50, dimension=384).examples(*[20] * 50)
    started = time.perf_counter()
    Fitted(examples, texts)
    assert time.perf_counter() - started < 15


def test_the_softmax() -> None:
    np.testing.assert_allclose(softmax(np.log([1.0, 2.0, 5.0])), [0.125, 0.25, 0.625])
    np.testing.assert_allclose(softmax(np.array([1e6, 0.0, -1e6])), [1, 0, 0])
    np.testing.assert_allclose(softmax(np.array([[0.0, 0.0], [1e300, -1e300]])), [[0.5, 0.5], [1, 0]])


# States


@dataclass
class StatesWorld(World):
    """Tasks with states too, of which the words say little: each task has directions of its own among many."""

    width: int = 60

    def state(self, task: int) -> np.ndarray:
        own = np.random.default_rng(1000 + task).standard_normal((2, self.width))
        noise = self.random.standard_normal((2, self.width))
        return (3 + 0.7 * own + noise).astype(np.float16)


def test_states_tell_tasks_apart_and_strangers_from_all_of_them() -> None:
    """A stranger is judged by a whitening without its task, in the fit as afterwards: its chances are what they say."""
    world = StatesWorld(12, noise=3.0, own=0.05)
    embeddings, texts = world.examples(*[20] * 12)
    states = [np.stack([world.state(task) for _ in range(20)]) for task in range(12)]
    fitted = Fitted(embeddings, texts, states=states)
    asked = [(task, world.embed(task), world.text(task), world.state(task)) for task in range(12) for _ in range(10)]
    by_states, all_tasks = fitted.reranker.by_states, np.arange(12)
    firsts, known, unknown, plain = [], [], [], []
    for task, embedding, text, state in asked:
        ranking = rank(fitted.reranker, embedding, text, fitted.candidates(all_tasks), state)
        firsts.append(ranking.logits.argmax() == task)
        known.append(ranking.familiarity)
        others = fitted.candidates(all_tasks[all_tasks != task])
        whitening = by_states.whitening.without(states[task])
        unknown.append(rank(fitted.reranker, embedding, text, others, state, whitening).familiarity)
        plain.append(fitted.rank(embedding, text).logits.argmax() == task)
    assert np.mean(firsts) > np.mean(plain) + 0.1
    assert np.mean(np.array(known)[:, None] > np.array(unknown)) > 0.9
    assert abs(np.mean(known) + np.mean(unknown) - 1) < 0.1
    assert np.mean(unknown) < 0.3


def test_what_is_known_of_candidates_says_what_they_say() -> None:
    world = StatesWorld(5)
    embeddings, texts = world.examples(*[8] * 5)
    states = [np.stack([world.state(task) for _ in range(8)]) for task in range(5)]
    fitted = Fitted(embeddings, texts, states=states)
    reranker, plain = fitted.reranker, fitted.candidates(np.arange(5))
    known = reranker.knowing(plain)
    without = reranker.by_states.whitening.without(states[1])
    embedding, text = world.embed(3), world.text(3)
    for state, whitening in ((None, None), (world.state(3), None), (world.state(3), without)):
        one, two = (rank(reranker, embedding, text, of, state, whitening) for of in (plain, known))
        for name in ("logits", "familiarity", "words", "cosines", *(["states"] if state is not None else [])):
            np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("remembered", [False, True])
def test_what_is_said_of_a_query_is_the_same_in_any_company(with_states, remembered) -> None:
    """And of some of the candidates what would be said if there were no others."""
    world = StatesWorld(7, dimension=384, width=96)
    embeddings, texts = world.examples(*[8] * 7)
    fitted = Fitted(embeddings, texts, states=[np.stack([world.state(t) for _ in range(8)]) for t in range(7)])
    every = fitted.candidates(np.arange(7))
    candidates = fitted.reranker.knowing(every) if remembered else every
    queries = np.stack([world.embed(n % 7) for n in range(11)])
    asked = ["", *(world.text(n % 7) for n in range(10))]
    states = np.stack([world.state(n % 7) for n in range(11)]) if with_states else None
    among = np.ones((11, 7), np.bool_)
    among[3, [0, 2]] = among[5, :6] = False
    whole = fitted.reranker.rank(queries, asked, candidates, None, states, None, among)
    for some in ([0], [3], [5, 3], [10, 2, 4, 5]):
        own = None if states is None else states[some]
        part = fitted.reranker.rank(queries[some], [asked[n] for n in some], candidates, None, own, None, among[some])
        for name, value in vars(part).items():
            np.testing.assert_array_equal(value, None if value is None else vars(whole)[name][some], err_msg=name)
    for n in (3, 5):
        left = np.flatnonzero(among[n])
        alone = rank(
            fitted.reranker, queries[n], asked[n], fitted.candidates(left), None if states is None else states[n]
        )
        np.testing.assert_allclose(whole.logits[n, left], alone.logits, rtol=1e-4, atol=1e-4)
        assert np.isneginf(np.delete(whole.logits[n], left)).all()
        assert whole.familiarity[n] == pytest.approx(alone.familiarity, rel=1e-4)


def test_without_states_nothing_else_changes() -> None:
    embeddings, texts = World(6).examples(*[8] * 6)
    states = [np.random.default_rng(task).standard_normal((8, 2, 16)).astype(np.float16) for task in range(6)]
    one, two = Fitted(embeddings, texts).reranker.arrays(), Fitted(embeddings, texts, states=states).reranker.arrays()
    assert {name for name in two if not name.startswith("by_states.")} == one.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name], err_msg=name)


def test_one_example_a_task_takes_what_other_catalogs_gave() -> None:
    embeddings, texts = World(5).examples(*[1] * 5)
    states = [np.random.default_rng(task).standard_normal((1, 2, 16)).astype(np.float16) for task in range(5)]
    fitted = Fitted(embeddings, texts, states=states)
    ranking = rank(fitted.reranker, embeddings[2][0], texts[2][0], fitted.candidates(np.arange(5)), states[2][0])
    assert ranking.logits.argmax() == 2
    assert np.isfinite([*ranking.logits, ranking.familiarity, *ranking.states]).all()
