import pytest

from lorauter.errors import InvalidRequest
from lorauter.evaluation.baselines import lorahub_weights

pytest.importorskip("nevergrad")

NAMES = [f"adapter-{i}" for i in range(6)]
BEST = dict(zip(NAMES, [1.0, 0.0, 0.0, -0.8, 0.0, 0.3], strict=True))


class Distance:
    """The loss: how far weights are from the best ones."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.asked: list[dict[str, float]] = []

    def __call__(self, weightings):
        self.calls.append(len(weightings))
        self.asked += weightings
        return [sum((w[name] - BEST[name]) ** 2 for name in NAMES) for w in weightings]


@pytest.mark.parametrize("workers", [1, 8])
def test_the_search_lowers_the_loss_within_its_budget_and_bounds(workers):
    loss = Distance()
    weights = lorahub_weights(NAMES, loss, budget=60, seed=0, workers=workers)
    assert list(weights) == NAMES
    found, zero = Distance()([weights, dict.fromkeys(NAMES, 0.0)])
    assert found < zero / 2
    assert loss.calls == ([1] * 60 if workers == 1 else [8] * 7 + [4])
    assert all(-1.5 <= weight <= 1.5 for asked in [*loss.asked, weights] for weight in asked.values())


def test_the_search_begins_with_no_adapter():
    loss = Distance()
    lorahub_weights(NAMES, loss, budget=3)
    assert loss.asked[0] == dict.fromkeys(NAMES, 0.0)


def test_the_same_seed_finds_the_same():
    runs = [lorahub_weights(NAMES, Distance(), budget=24, seed=seed, workers=6) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert lorahub_weights(NAMES, Distance(), seed=3) == lorahub_weights(NAMES, Distance(), seed=3)


def test_weights_that_change_nothing_are_drawn_to_0():
    # One candidate, indifferent loss: only the penalty speaks.
    assert abs(lorahub_weights(["a"], lambda weightings: [0.0] * len(weightings), budget=30)["a"]) < 0.1


@pytest.mark.parametrize(
    "candidates, options", [([], {}), (["a", "a"], {}), (["a"], {"budget": 0}), (["a"], {"workers": 0})]
)
def test_bad_input_is_refused(candidates, options):
    with pytest.raises(InvalidRequest):
        lorahub_weights(candidates, Distance(), **options)


@pytest.mark.parametrize("losses", [[], [float("nan")], [1.0, 2.0]])
def test_a_bad_loss_is_refused(losses):
    with pytest.raises(InvalidRequest, match="loss"):
        lorahub_weights(["a"], lambda _: losses)
