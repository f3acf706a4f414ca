import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from lorauter.catalog.lexicon import Texts, Words, WordTable, grams_of, idf_of, similarities

TASKS = [
    ["Is this film good? It was great.", "Is this film bad? It was slow, so slow."],
    ["Translate to English: Zwei Hunde spielen.", "Translate to English: Eine Katze schläft.", "Translate: Ja!"],
    ["Sort the numbers 3, 1, 2"],
]


@dataclass
class Lexicon:
    """Tasks' words, weighted by how rare they are in all of them."""

    tasks: list[list[str]]

    def __post_init__(self) -> None:
        grams = [[grams_of(text) for text in task] for task in self.tasks]
        self.idf = idf_of(ids for task in grams for ids in task)
        self.words = [Words.of(task, self.idf) for task in grams]

    def similarity(self, text: str, tasks: Iterable[int] = range(3)) -> np.ndarray:
        words, grams = [self.words[task] for task in tasks], grams_of(text)
        found = similarities(grams, words, self.idf)
        if words:
            [table] = WordTable(words, self.idf).similarities(Texts.one(grams))
            np.testing.assert_allclose(table, found, rtol=1e-6)
            assert table.dtype == found.dtype
        return found


def grams(text: str) -> set[str]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return {*words, *(f"{a} {b}" for a, b in pairwise(words))}


def naive_similarity(text: str) -> list[float]:
    """The same with dictionaries: words and word pairs, each once a text, and no hashing."""
    texts = [text for task in TASKS for text in task]
    seen = Counter(gram for other in texts for gram in grams(other))

    def vector(text: str) -> dict[str, float]:
        weights = {gram: math.log((1 + len(texts)) / (1 + seen[gram])) + 1 for gram in grams(text)}
        length = math.sqrt(sum(weight**2 for weight in weights.values()))
        return {gram: weight / length for gram, weight in weights.items()}

    query, found = vector(text), []
    for task in TASKS:
        total: Counter[str] = Counter()
        for example in task:
            total.update(vector(example))
        length = math.sqrt(sum(value**2 for value in total.values()))
        found.append(sum(query.get(gram, 0) * value / length for gram, value in total.items()))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "Is this film good? It was great.",
        "TRANSLATE to english: zwei Katze",
        "the the the numbers",
        "of words, that no task has: one",
        "?",
        "quite unheard of",
    ],
)
def test_the_similarity_is_the_cosine_of_tf_idf(text, monkeypatch) -> None:
    shared = Lexicon(TASKS).similarity(text)
    np.testing.assert_allclose(shared, naive_similarity(text), atol=0.06)  # words may share a bucket
    monkeypatch.setattr("lorauter.catalog.lexicon._BUCKETS", 65521)  # none do
    got = Lexicon(TASKS).similarity(text)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, naive_similarity(text), atol=1e-5)


def test_it_is_one_for_a_tasks_only_text_and_does_not_depend_on_the_other_tasks_asked_about() -> None:
    lexicon = Lexicon(TASKS)
    assert lexicon.similarity(TASKS[2][0], [2]) == pytest.approx(1)
    every = lexicon.similarity("Is this film English")
    np.testing.assert_array_equal(lexicon.similarity("Is this film English", np.array([2, 0])), every[[2, 0]])
    assert lexicon.similarity("Is this film English", []).shape == (0,)


@pytest.mark.parametrize("text", ["...", ".", "_", "\u200b", "\x00", "", " \n", "🙂", "東京"])
def test_a_text_of_hardly_anything_is_similar_to_nothing(text) -> None:
    np.testing.assert_array_less(np.abs(Lexicon(TASKS).similarity(text)), 0.2)
    own = Lexicon([[text], ["quite another text"]]).similarity(text, [0, 1])
    assert own[0] == pytest.approx(1 if text.strip() else 0)
    assert own[1] == 0
    assert Lexicon([[text]]).similarity("a word", [0]).shape == (1,)


def test_only_the_head_of_a_long_text_counts() -> None:
    lexicon = Lexicon(TASKS)
    head = "film " * 2000
    np.testing.assert_array_equal(lexicon.similarity(head + "numbers"), lexicon.similarity(head))
    assert lexicon.similarity(head[5:] + "numbers")[2] > lexicon.similarity(head)[2]


@pytest.mark.parametrize("unit", ["word ", "x", ".", "\n", "a."])
def test_a_huge_text_takes_no_longer_than_its_head(unit) -> None:
    lexicon = Lexicon(TASKS)
    text = unit * 4_000_000
    started = time.process_time()
    assert np.isfinite(lexicon.similarity(text)).all()
    assert np.isfinite(Lexicon([[text], ["b"]]).words[0].weights).all()
    assert time.process_time() - started < 1


def test_what_is_said_of_a_text_is_the_same_in_any_company() -> None:
    texts = ["", "Is this film good", "?", "quite unheard of", "Is this film good", "film " * 2000, ""]
    lexicon = Lexicon(TASKS)
    table, apart = WordTable(lexicon.words, lexicon.idf), Texts.taken_apart(texts)
    found = table.similarities(apart)
    for n, text in enumerate(texts):
        np.testing.assert_array_equal(apart.grams[apart.of == n], grams_of(text))
        np.testing.assert_array_equal(table.similarities(Texts.taken_apart([text])), found[n : n + 1])
    assert table.similarities(Texts.taken_apart([])).shape == (0, 3)


def test_what_is_kept_of_a_task_is_its_own_and_the_same_bytes() -> None:
    one, two = Lexicon(TASKS), Lexicon([list(task) for task in reversed(TASKS)])
    for mine, other in zip(one.words, reversed(two.words), strict=True):
        assert [array.tobytes() for array in mine] == [array.tobytes() for array in other]
        assert (mine.buckets.dtype, mine.weights.dtype) == (np.uint16, np.float32)
    assert one.idf.tobytes() == two.idf.tobytes()
