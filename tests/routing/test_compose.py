import math

import pytest

from lorauter.routing import RetrievedTask, RoutingConfig, RoutingOptions, TaskScore, compose

CONFIG = RoutingConfig(top_k=3, temperature=0.2, num_tasks=10)


def decide(*retrieved: tuple[str, float, str], config: RoutingConfig = CONFIG, **options: float):
    tasks = [RetrievedTask(name, score, tuple(adapters.split())) for name, score, adapters in retrieved]
    return compose(tasks, RoutingOptions(**options), config, catalog_version="0a1b")


def weights(decision) -> dict[str, float]:
    return {adapter.name: adapter.weight for adapter in decision.adapters}


def test_weights_are_the_softmax_of_the_scores() -> None:
    decision = decide(("t", 0.9, "a"), ("u", 0.5, "b"), ("v", 0.3, "c"))
    parts = [math.exp(score / 0.2) for score in (0.9, 0.5, 0.3)]
    assert list(weights(decision)) == ["a", "b", "c"]
    assert list(weights(decision).values()) == pytest.approx([part / sum(parts) for part in parts])
    assert weights(decide(("t", 0.9, "a"), ("u", 0.5, "b")))["a"] == pytest.approx(0.8807970779778823)


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
    got = weights(decide(*zip("tuv", scores, "abc", strict=True), temperature=temperature))
    assert sum(got.values()) == pytest.approx(1)
    assert all(0 <= weight <= 1 for weight in got.values())


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


@pytest.mark.parametrize("retrieved", [[], [("t", 0.9, ""), ("u", 0.5, "")]])
def test_without_adapters_the_base_model_answers(retrieved) -> None:
    decision = decide(*retrieved)
    assert decision.adapters == ()
    assert [task.name for task in decision.tasks] == [name for name, _, _ in retrieved]


def test_a_decision_reports_the_nearest_tasks_though_farther_ones_lend() -> None:
    config = RoutingConfig(num_tasks=2)
    decision = decide(("t", 0.9, ""), ("u", 0.8, ""), ("v", 0.1, "a"), config=config)
    assert decision.tasks == (TaskScore("t", 0.9), TaskScore("u", 0.8))
    assert weights(decision) == {"a": 1}


def test_a_decision_as_json() -> None:
    assert decide(("t", 0.5, "a"), ("u", 0.25, "")).to_json() == {
        "catalog_version": "0a1b",
        "tasks": [{"name": "t", "score": 0.5}, {"name": "u", "score": 0.25}],
        "adapters": [{"name": "a", "weight": 1.0}],
    }
