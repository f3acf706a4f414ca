import math

import pytest

from lorauter.routing import (
    AdapterUtility,
    AdapterWeight,
    Retrieved,
    RetrievedTask,
    RoutingConfig,
    RoutingOptions,
    TaskScore,
    compose,
)

PAPER = RoutingConfig(preset="paper", top_k=3, temperature=0.2, num_tasks=10)
UTILITY = RoutingConfig(composition="utility", top_k=3, temperature=0.2, softening=1, num_tasks=10)
VERSIONS = {name: f"v-{name}" for name in "abcd"}
ADAPTERS = (AdapterUtility("a", 0.9), AdapterUtility("b", 0.5), AdapterUtility("c", 0.3), AdapterUtility("d", 0.1))


def decide(*retrieved: tuple[str, float, str], config: RoutingConfig = PAPER, **options: float):
    """By tasks, given as name, cosine and adapters."""
    tasks = tuple(RetrievedTask(name, score, tuple(adapters.split())) for name, score, adapters in retrieved)
    return compose(Retrieved(tasks), RoutingOptions(**options), config, catalog_version="0a1b", versions=VERSIONS)


def decide_by_utility(
    config: RoutingConfig = UTILITY, *, familiarity=1.0, probability=1.0, stranger=False, adapters=ADAPTERS, **options
):
    """By utility, for a query of one task that has no adapter of its own."""
    task = RetrievedTask("t", 0.5, (), probability)
    retrieved = Retrieved((task,), adapters, familiarity, stranger)
    return compose(retrieved, RoutingOptions(**options), config, catalog_version="0a1b", versions=VERSIONS)


def weights(decision) -> dict[str, float]:
    return {adapter.name: adapter.weight for adapter in decision.adapters}


def softmax(temperature: float, **scores: float) -> dict[str, float]:
    parts = {name: math.exp(score / temperature) for name, score in scores.items()}
    return {name: part / sum(parts.values()) for name, part in parts.items()}


# By the tasks' scores


def test_weights_are_the_softmax_of_the_scores() -> None:
    decision = decide(("t", 0.9, "a"), ("u", 0.5, "b"), ("v", 0.3, "c"))
    parts = [math.exp(score / 0.2) for score in (0.9, 0.5, 0.3)]
    assert list(weights(decision)) == ["a", "b", "c"]
    assert list(weights(decision).values()) == pytest.approx([part / sum(parts) for part in parts])
    assert weights(decide(("t", 0.9, "a"), ("u", 0.5, "b")))["a"] == pytest.approx(0.8807970779778823)


def test_reranked_tasks_are_weighted_by_the_logarithm_of_their_probability() -> None:
    config = RoutingConfig(preset="paper", rerank=True, top_k=3, temperature=0.5)
    chances = {"a": 0.5, "b": 0.25, "c": 0.125, "d": 0.0}
    tasks = tuple(RetrievedTask(f"t{name}", 0.9, (name,), chance) for name, chance in chances.items())
    got = weights(compose(Retrieved(tasks), RoutingOptions(), config, catalog_version="0a1b", versions=VERSIONS))
    assert got == pytest.approx({"a": 16 / 21, "b": 4 / 21, "c": 1 / 21})
    assert weights(
        compose(Retrieved(tasks[3:]), RoutingOptions(), config, catalog_version="0a1b", versions=VERSIONS)
    ) == {"d": 1}


@pytest.mark.parametrize(
    ("temperature", "weight"), [(0.1, 1 / (1 + math.e)), (100, 1 / (1 + math.exp(0.001))), (1e-6, 0)]
)
def test_the_temperature_of_the_request_comes_before_the_routers(temperature, weight) -> None:
    retrieved = [("t", 0.5, "a"), ("u", 0.4, "b")]
    assert weights(decide(*retrieved))["b"] == pytest.approx(1 / (1 + math.exp(0.5)))
    assert weights(decide(*retrieved, temperature=temperature)).get("b", 0) == pytest.approx(weight, abs=1e-12)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6, 0.2, 100])
@pytest.mark.parametrize("scores", [(1.0, 1.0, 1.0), (1.0, -1.0, 0.0), (-1.0, -1.0, -0.999), (0.3, 0.2, 0.1)])
def test_weights_sum_to_one_and_none_is_negative(scores, temperature) -> None:
    useful = tuple(AdapterUtility(name, score) for name, score in zip("abc", scores, strict=True))
    soft = UTILITY.model_copy(update={"temperature": temperature, "softening": 2.0})
    for decision in (
        decide(*zip("tuv", scores, "abc", strict=True), temperature=temperature),
        decide_by_utility(adapters=useful, temperature=temperature),
        decide_by_utility(soft, adapters=useful),
    ):
        got = weights(decision)
        assert sum(got.values()) == pytest.approx(1)
        assert all(0 < weight <= 1 for weight in got.values())


def test_an_adapter_of_two_tasks_gets_the_sum_and_may_come_first() -> None:
    got = weights(decide(("t", 0.5, "a"), ("u", 0.45, "b"), ("v", 0.45, "b")))
    parts = [1, math.exp(-0.25), math.exp(-0.25)]
    assert got == pytest.approx({"b": (parts[1] + parts[2]) / sum(parts), "a": 1 / sum(parts)})
    assert list(got) == ["b", "a"]


def test_a_task_lends_its_best_adapter_only() -> None:
    assert weights(decide(("t", 0.5, "a b c"))) == {"a": 1}


@pytest.mark.parametrize(("options", "lenders"), [({}, "abc"), ({"top_k": 1}, "a"), ({"top_k": 4}, "abcd")])
def test_the_nearest_top_k_tasks_that_have_an_adapter_lend(options, lenders) -> None:
    retrieved = [("s", 0.99, ""), ("t", 0.9, "a"), ("u", 0.8, "b"), ("v", 0.7, ""), ("w", 0.6, "c"), ("x", 0.5, "d")]
    assert "".join(weights(decide(*retrieved, **options))) == lenders


@pytest.mark.parametrize("config", [PAPER, UTILITY, RoutingConfig()])
@pytest.mark.parametrize("retrieved", [[], [("t", 0.9, ""), ("u", 0.5, "")]])
def test_without_adapters_the_base_model_answers(retrieved, config) -> None:
    decision = decide(*retrieved, config=config)
    assert decision.adapters == ()
    assert [task.name for task in decision.tasks] == [name for name, _, _ in retrieved]
    assert decision.confidence == 0


def test_a_decision_reports_the_nearest_tasks_though_farther_ones_lend() -> None:
    config = RoutingConfig(preset="paper", num_tasks=2)
    decision = decide(("t", 0.9, ""), ("u", 0.8, ""), ("v", 0.1, "a"), config=config)
    assert decision.tasks == (TaskScore("t", 0.9, 0), TaskScore("u", 0.8, 0))
    assert weights(decision) == {"a": 1}


# By the adapters' utilities


@pytest.mark.parametrize(("options", "used"), [({}, "abc"), ({"top_k": 1}, "a"), ({"top_k": 9}, "abcd")])
def test_weights_are_the_softmax_of_the_utilities_of_the_most_useful(options, used) -> None:
    got = weights(decide_by_utility(**options))
    assert got == pytest.approx(softmax(0.2, **{a.name: a.utility for a in ADAPTERS if a.name in used}))
    assert "".join(got) == used


@pytest.mark.parametrize(
    ("familiarity", "softening", "temperature"),
    [(0.5, 1, 0.1), (0.0, 1, 0.1), (1.0, 4, 0.1), (0.5, 4, 0.2), (0.0, 4, 0.4), (0.75, 100, 0.1 * 10**0.5)],
)
def test_the_temperature_rises_as_the_query_is_less_familiar(familiarity, softening, temperature) -> None:
    config = UTILITY.model_copy(update={"temperature": 0.1, "softening": softening})
    utilities = {"a": 1.0, "b": 0.7, "c": 0.2}
    adapters = tuple(AdapterUtility(name, utility) for name, utility in utilities.items())
    expected = {name: weight for name, weight in softmax(temperature, **utilities).items() if weight >= 0.01}
    total = sum(expected.values())
    got = weights(decide_by_utility(config, familiarity=familiarity, adapters=adapters))
    assert got == pytest.approx({name: weight / total for name, weight in expected.items()})


def test_adapters_that_would_weigh_next_to_nothing_are_left_out() -> None:
    adapters = (AdapterUtility("a", 1.0), AdapterUtility("b", 0.55), AdapterUtility("c", 0.5))
    config = UTILITY.model_copy(update={"temperature": 0.1, "softening": 1.0})
    kept = softmax(0.1, a=1.0, b=0.55)
    assert softmax(0.1, a=1.0, b=0.55, c=0.5)["c"] < 0.01
    assert weights(decide_by_utility(config, adapters=adapters)) == pytest.approx(kept)


def test_a_requests_own_temperature_is_taken_as_it_is() -> None:
    config = UTILITY.model_copy(update={"softening": 3.0})
    unknown = {"familiarity": 0.0}
    assert weights(decide_by_utility(config, **unknown)) != pytest.approx(softmax(0.2, a=0.9, b=0.5, c=0.3))
    own = weights(decide_by_utility(config, **unknown, temperature=0.4))
    assert own == pytest.approx(softmax(0.4, a=0.9, b=0.5, c=0.3))


def test_how_sure_the_first_task_is_does_not_change_the_weights() -> None:
    """The utilities are expected over the tasks already."""
    config = UTILITY.model_copy(update={"softening": 2.0})
    assert weights(decide_by_utility(config, probability=0.1)) == weights(decide_by_utility(config, probability=0.9))


@pytest.mark.parametrize("composition", ["utility", "tasks"])
@pytest.mark.parametrize(
    ("fallback", "stranger", "answered_by_base"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_the_base_model_answers_strangers_if_it_is_to(composition, fallback, stranger, answered_by_base) -> None:
    config = UTILITY.model_copy(update={"composition": composition, "fallback": fallback})
    retrieved = Retrieved((RetrievedTask("t", 0.5, ("a",), 0.8),), ADAPTERS, 0.5, stranger)
    decision = compose(retrieved, RoutingOptions(), config, catalog_version="0a1b", versions=VERSIONS)
    assert (decision.adapters == ()) == answered_by_base
    assert [task.name for task in decision.tasks] == ["t"]
    assert decision.confidence == pytest.approx(0.4)


def test_the_confidence_is_the_probability_of_the_first_task_and_of_any() -> None:
    tasks = tuple(RetrievedTask(name, 0.5, (), chance) for name, chance in (("t", 0.6), ("u", 0.3), ("v", 0.1)))
    for num_tasks in (1, 3):
        config = RoutingConfig(num_tasks=num_tasks)
        decision = compose(
            Retrieved(tasks, (), 0.5), RoutingOptions(), config, catalog_version="0a1b", versions=VERSIONS
        )
        assert decision.confidence == pytest.approx(0.3)
        assert [task.probability for task in decision.tasks] == [0.6, 0.3, 0.1][:num_tasks]


def test_a_decision_as_json() -> None:
    tasks = (RetrievedTask("t", 0.5, ("a",), 0.75), RetrievedTask("u", 0.25, (), 0.25))
    decision = compose(Retrieved(tasks, (), 0.5), RoutingOptions(), PAPER, catalog_version="0a1b", versions=VERSIONS)
    assert decision.adapters == (AdapterWeight("a", "v-a", 1.0),)
    assert decision.to_json() == {
        "catalog_version": "0a1b",
        "tasks": [
            {"name": "t", "score": 0.5, "probability": 0.75},
            {"name": "u", "score": 0.25, "probability": 0.25},
        ],
        "adapters": [{"name": "a", "version": "v-a", "weight": 1.0}],
        "confidence": 0.375,
    }


@pytest.mark.parametrize(
    ("constrain", "answers", "stranger", "held"),
    [
        (True, ("yes", "no"), False, "t"),
        (True, {"type": "object"}, False, "t"),
        (True, None, False, None),
        (True, ("yes", "no"), True, None),
        (False, ("yes", "no"), False, None),
    ],
)
def test_an_answer_is_held_to_its_likeliest_tasks_answers_where_that_is_asked(
    constrain, answers, stranger, held
) -> None:
    tasks = (RetrievedTask("t", 0.5, ("a",), 0.75, answers), RetrievedTask("u", 0.5, ("b",), 0.25, ("other",)))
    retrieved, options = Retrieved(tasks, ADAPTERS, 0.5, stranger), RoutingOptions(constrain=constrain)
    decision = compose(retrieved, options, UTILITY, catalog_version="0a1b", versions=VERSIONS)
    assert decision.answers == (answers if held else None)
    told = decision.to_json()
    assert told.get("constrained", "not asked") == (held if constrain else "not asked")
    assert told.keys() - {"constrained"} == {"catalog_version", "tasks", "adapters", "confidence"}


def test_nothing_holds_an_answer_where_no_task_is_found() -> None:
    decision = compose(Retrieved(), RoutingOptions(constrain=True), UTILITY, catalog_version="0a1b", versions=VERSIONS)
    assert (decision.answers, decision.to_json()["constrained"]) == (None, None)
