"""LoraHub's weights are searched once for each task with and without its own adapters, and kept in a file."""

import json

import pytest
import torch

from lorauter.catalog.scoring import LikelihoodScorer
from lorauter.errors import ConfigError, InvalidRequest
from lorauter.evaluation import weighing
from lorauter.evaluation.answering import adapters_in
from lorauter.evaluation.weighing import read_weights, weigh, weights_for
from lorauter.tasks import Example, Task

pytest.importorskip("nevergrad")

TASKS = [
    Task("one", "tests", "em", (Example("cat", "CAT"), Example("a dog", "A DOG"))),
    Task("two", "tests", "em", (Example("1", "one"),)),
]
POOL = ["one", "x", "y"]
OWN = {"one": ["one"], "two": []}


@pytest.fixture(autouse=True)
def _one_thread():
    """The model is far too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load(tmp_path, make_adapter):
    for name in POOL:
        make_adapter(tmp_path / "adapters", name)
    make_adapter(tmp_path / "adapters", "huge", fill=1e10, targets=("q_proj", "k_proj"))
    return adapters_in(tmp_path / "adapters")


@pytest.fixture
def scorer(decoder, codec, load):
    return LikelihoodScorer(decoder, codec, load, TASKS)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "new" / "lorahub.jsonl"


def search(scorer, load, output, **given):
    seen = []
    settings = {"own": OWN, "budget": 6, "progress": lambda *counts: seen.append(counts), **given}
    weigh(TASKS, POOL, scorer, load, output, **settings)
    return seen


def test_each_task_is_searched_with_its_own_adapters_and_without(scorer, load, output) -> None:
    assert search(scorer, load, output) == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    found = read_weights(output)
    assert {key: set(weights) for key, weights in found.items()} == {
        ("one", True): {"one", "x", "y"},
        ("one", False): {"x", "y"},
        ("two", True): {"one", "x", "y"},
        ("two", False): {"one", "x", "y"},
    }
    examples = [("one", 0), ("one", 1)]
    best = scorer.score_mixture([(scorer.pack(load(n)), w) for n, w in found["one", True].items()], examples)
    assert sum(best) > sum(scorer.score_mixture([], examples)), "nothing better than the base model was found"


def test_a_search_that_was_cut_off_goes_on(scorer, load, output, monkeypatch) -> None:
    search(scorer, load, output)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:-9])
    searched, original = [], weighing._search
    monkeypatch.setattr(weighing, "_search", lambda *args: (searched.append(args[1].name), original(*args))[1])
    search(scorer, load, output)
    assert searched == ["two", "two"]
    assert output.read_bytes() == whole
    search(scorer, load, output)
    assert searched == ["two", "two"] and output.read_bytes() == whole


def test_weights_that_break_the_model_are_not_chosen(scorer, load, output) -> None:
    weigh(TASKS[:1], ["huge", "x"], scorer, load, output, own=OWN, budget=8)
    weights = read_weights(output)["one", False]
    scorer.score_mixture([(scorer.pack(load(name)), weight) for name, weight in weights.items()], [("one", 0)])


def test_a_pool_of_nothing_is_the_base_model(scorer, load, output) -> None:
    weigh(TASKS[:1], ["one"], scorer, load, output, own=OWN, budget=2)
    assert read_weights(output)["one", False] == {}


def test_many_adapters_are_drawn_from_the_own_ones_always_among_them() -> None:
    pool = [f"a{i}" for i in range(50)]
    drawn = weighing._candidates(pool, ["a7", "a3"], "task", with_own=True)
    assert len(drawn) == 20 and {"a3", "a7"} <= set(drawn)
    foreign = weighing._candidates(pool, ["a7", "a3"], "task", with_own=False)
    assert len(foreign) == 20 and not {"a3", "a7"} & set(foreign)
    assert foreign == weighing._candidates(pool[::-1], ["a3", "a7"], "task", with_own=False)
    assert foreign != weighing._candidates(pool, ["a7", "a3"], "other task", with_own=False)


@pytest.mark.parametrize(
    "row",
    [
        {"task": "one", "own": True},
        {"task": 1, "own": True, "weights": {}},
        {"task": "one", "own": 1, "weights": {}},
        {"task": "one", "own": True, "weights": ["x"]},
        {"task": "one", "own": True, "weights": {"x": "1"}},
        {"task": "one", "own": True, "weights": {"x": float("nan")}},
    ],
)
def test_a_malformed_row_is_refused_by_its_line(tmp_path, row) -> None:
    path = tmp_path / "lorahub.jsonl"
    path.write_text(json.dumps({"task": "one", "own": False, "weights": {"x": 1}}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InvalidRequest, match=r"lorahub\.jsonl, line 2: a row is"):
        read_weights(path)


def test_weights_that_were_not_searched_are_asked_for() -> None:
    weights = {("one", True): {"x": 0.5}}
    assert weights_for(weights, "one", with_own=True) == {"x": 0.5}
    for task, with_own in (("one", False), ("two", True)):
        with pytest.raises(ConfigError, match=f"task '{task}'; 'lorauter eval lorahub' searches") as caught:
            weights_for(weights, task, with_own=with_own)
        assert caught.value.setting == "lorahub"
