"""A large pool is narrowed by what is cheap: weights first, then likelihoods on few examples."""

import random
from statistics import fmean

import numpy as np
import pytest
import torch

from lorauter.adapters.weights import LoraWeights, ModelShape
from lorauter.catalog.alike import kin, sketch, twins
from lorauter.catalog.match import MatchConfig, Matching
from lorauter.catalog.scores import Evaluation, Failed, ScoreTable
from lorauter.catalog.screen import screen
from lorauter.engine.slots import pack_weights
from lorauter.errors import CatalogError
from lorauter.tasks import Example, Task

SHAPE = ModelShape((), 6, {"q_proj": (48, 48), "v_proj": (48, 24), "down_proj": (64, 48)})


def adapter(seed, rank=8, targets=("q_proj", "v_proj"), layers=range(6)):
    """`{(layer, target): (A, B)}`."""
    draw = torch.Generator().manual_seed(seed)

    def side(*shape):
        return torch.randn(*shape, generator=draw)

    pairs = {}
    for layer in layers:
        for target in targets:
            inputs, outputs = SHAPE.linears[target]
            pairs[layer, target] = side(rank, inputs), side(outputs, rank)
    return pairs


def noisy(pairs, share, seed=99):
    draw = torch.Generator().manual_seed(seed)
    return {
        where: tuple(side + share * side.std() * torch.randn(side.shape, generator=draw) for side in pair)
        for where, pair in pairs.items()
    }


def turned(pairs):
    """The same change by other factors."""
    draw = torch.Generator().manual_seed(5)
    found = {}
    for where, (a, b) in pairs.items():
        q = torch.linalg.qr(torch.randn(a.shape[0], a.shape[0], generator=draw))[0]
        found[where] = q @ a, b @ q.T
    return found


def wider(pairs):
    """The same change with a larger rank."""
    return {where: (torch.cat([a, a]), torch.cat([b / 2, b / 2], 1)) for where, (a, b) in pairs.items()}


def sketches(**adapters):
    return {
        name: sketch(
            pack_weights(LoraWeights(name, "1", "", pairs), SHAPE, torch.float32, max_rank=64, pin=False), SHAPE
        )
        for name, pairs in adapters.items()
    }


def test_who_computes_the_same_is_a_twin_whatever_its_factors_are() -> None:
    own = adapter(0)
    found = twins(
        sketches(
            a=own,
            b=turned(own),
            c=wider(own),
            d=noisy(own, 0.01),
            e={where: (a, 1.2 * b) for where, (a, b) in own.items()},
            f=adapter(1),
            g={where: (-a, b) for where, (a, b) in own.items()},
            h={where: (a, 0 * b) for where, (a, b) in own.items()},
            i={where: (a, 0 * b) for where, (a, b) in adapter(2).items()},
            j=turned(adapter(1)),
        )
    )
    assert found == {**dict.fromkeys("abcd", "a"), "e": "e", "f": "f", "g": "g", "h": "h", "i": "h", "j": "f"}


def test_the_first_that_is_given_stands_for_its_twins() -> None:
    own = adapter(0)
    assert twins(sketches(z=own, a=turned(own))) == {"z": "z", "a": "z"}
    assert (twins({}), kin({})) == ({}, {})


def test_descent_shows_through_noise_cuts_and_scaling() -> None:
    own, other = adapter(0), adapter(1)
    found = kin(
        sketches(
            a=own,
            b=noisy(own, 0.5),
            c={where: (a, 3 * b) for where, (a, b) in own.items()},
            d={where: pair for where, pair in own.items() if where[0] % 2},
            e={where: (a[:4], b[:, :4]) for where, (a, b) in own.items()},
            f=other,
            g=adapter(2, targets=("q_proj", "down_proj")),
            h=adapter(3),
        )
    )
    assert found == {**dict.fromkeys("abcde", "a"), "f": "f", "g": "g", "h": "h"}


def test_many_are_compared_block_by_block(monkeypatch) -> None:
    many = sketches(**{f"a{i:02}": noisy(adapter(i % 5), 0.005, seed=i) for i in range(23)})
    whole = twins(many), kin(many)
    monkeypatch.setattr("lorauter.catalog.alike._BLOCK", 4)
    assert (twins(many), kin(many)) == whole
    assert whole[0] == whole[1] == {f"a{i:02}": f"a{i % 5:02}" for i in range(23)}


# --- a pool of which a few fit each task


NAMES = [f"{number:04x}" for number in random.Random(0).sample(range(1 << 16), 400)]
TASKS = [Task(f"t{i}", "tests", "em", tuple(Example(f"question {k}", "answer") for k in range(20))) for i in range(6)]


class Pool:
    """The fake scorer by likelihood: of each adapter noisy scores of known means, and a sketch that says its descent.

    Adapter i is of descent i // 4; of every tenth descent each is of use for one task; the first two of a descent
    compute the same.
    """

    def __init__(self, broken=(), dies_after=None):
        self.broken, self.asked, self.left = broken, [], dies_after
        self.descent = {name: i // 4 for i, name in enumerate(NAMES)}
        self.means = {}
        for i, name in enumerate(NAMES):
            draw = random.Random(name)
            for k, task in enumerate(TASKS):
                of_use = self.descent[name] % 10 == 0 and self.descent[name] // 10 % len(TASKS) == k
                self.means[name, task.name] = draw.uniform(-1.0, -0.3) if of_use else draw.uniform(-4.0, -2.0)
            if i % 4 == 1:
                for task in TASKS:
                    self.means[name, task.name] = self.means[NAMES[i - 1], task.name]

    def look(self, names):
        return {name: Failed("is corrupt") if name in self.broken else self.sketch(name) for name in names}

    def sketch(self, name):
        own = np.random.default_rng(self.descent[name]).normal(size=600)
        place = NAMES.index(name) % 4
        apart = 0.0 if place < 2 else 0.4
        return (own + apart * np.random.default_rng(1000 + NAMES.index(name)).normal(size=600)).astype(np.float32)

    def value(self, evaluation):
        noise = random.Random(f"{evaluation}").gauss(0, 0.4)
        return min(0.0, self.means[evaluation.adapter, evaluation.task] + noise)

    def score(self, evaluations):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.asked += evaluations
        return {evaluation: self.value(evaluation) for evaluation in evaluations}


def screened(scorer, **settings):
    return screen(TASKS, dict.fromkeys(NAMES, "1"), scorer, **settings)


def test_a_large_pool_is_narrowed_with_few_evaluations() -> None:
    scorer = Pool(broken=NAMES[2:3])
    found = screened(scorer)
    assert len(scorer.asked) == len(set(scorer.asked)) == found.matching.spent
    assert found.matching.spent <= 0.08 * len(NAMES) * len(TASKS) * 20
    assert found.matching.failures == {NAMES[2]: "is corrupt"}
    assert found.twins == {max(pair): min(pair) for pair in (sorted(NAMES[i : i + 2]) for i in range(0, len(NAMES), 4))}
    for task in TASKS:
        mine = found.shortlists[task.name]
        assert len(mine) == 12 and not {*mine} & found.twins.keys()
        best = max(scorer.means[name, task.name] for name in NAMES if name != NAMES[2])
        assert scorer.means[mine[0], task.name] > best - 0.2
        of_use = {d for d in range(100) if d % 10 == 0 and d // 10 % len(TASKS) == TASKS.index(task)}
        assert of_use <= {scorer.descent[name] for name in mine}


def test_the_choice_is_within_two_percent_of_trying_everything() -> None:
    scorer = Pool()
    chosen, best = [], []
    found = screened(scorer)

    def worth(name, task):
        return fmean(np.exp(scorer.value(Evaluation(name, task.name, i))) for i in range(20))

    for task in TASKS:
        chosen.append(worth(found.shortlists[task.name][0], task))
        best.append(max(worth(name, task) for name in NAMES if name not in found.twins))
    assert fmean(chosen) > 0.98 * fmean(best)


def test_who_is_favoured_is_tried_in_its_own_name_and_on_everything() -> None:
    twin, poor = NAMES[1], NAMES[7]
    found = screened(Pool(), favoured={"t3": [twin, poor]})
    assert {twin, poor} <= {*found.shortlists["t3"]} and len(found.shortlists["t3"]) == 14
    assert found.twins[NAMES[0]] == twin


@pytest.mark.parametrize("calls", [0, 2, 9])
def test_a_killed_screening_goes_on_where_it_was(tmp_path, calls) -> None:
    file, broken = tmp_path / "scores.jsonl", NAMES[5:6]
    whole = screened(Pool(broken))
    first = Pool(broken, dies_after=calls)
    with pytest.raises(KeyboardInterrupt):
        screened(first, table=ScoreTable(file))
    second = Pool(broken)
    resumed = screened(second, table=ScoreTable(file))
    assert (resumed.shortlists, resumed.twins) == (whole.shortlists, whole.twins)
    assert not {*first.asked} & {*second.asked}
    third = Pool(broken)
    assert screened(third, table=ScoreTable(file)).shortlists == whole.shortlists
    assert third.asked == []
    assert file.read_text().count("is corrupt") == 1
    with pytest.raises(CatalogError, match="was 1 and is 2"):
        screen(TASKS, dict.fromkeys(NAMES, "2"), Pool(), ScoreTable(file))


def test_variants_of_one_adapter_do_not_crowd_out_others() -> None:
    names = [f"a{i:02}" for i in range(40)]
    matching = Matching({"t": 20}, names, MatchConfig(min_candidates=6), kin=dict.fromkeys(names[:20], "a00"))
    while wanted := matching.next_round():
        matching.record({e: -float(e.adapter[1:]) for e in wanted})
    assert [match.name for match in matching.result()["t"]] == ["a00", *names[20:25]]
    alone = Matching({"t": 20}, names[:20], MatchConfig(min_candidates=6), kin=dict.fromkeys(names, "a00"))
    while wanted := alone.next_round():
        alone.record({e: -float(e.adapter[1:]) for e in wanted})
    assert [match.name for match in alone.result()["t"]] == names[:6]


def test_when_all_are_broken_the_shortlists_are_empty() -> None:
    found = screened(Pool(broken=NAMES))
    assert set(map(len, found.shortlists.values())) == {0} and len(found.matching.failures) == len(NAMES)


def test_matching_goes_on_with_the_shortlists_alone() -> None:
    among = {"t": ["c", "a"]}
    matching = Matching({"t": 4, "u": 4}, ["a", "b", "c"], MatchConfig(), among=among)
    asked = {(e.adapter, e.task) for e in matching.next_round()}
    assert asked == {("a", "t"), ("c", "t"), ("a", "u"), ("b", "u"), ("c", "u")}
    matching.record(dict.fromkeys(matching.next_round(), 0.5))
    assert [match.name for match in matching.result()["t"]] == ["a", "c"]
    assert matching.exhaustive == 24
