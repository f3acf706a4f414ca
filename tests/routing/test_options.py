import json
import math

import pytest
from pydantic import ValidationError

from lorauter.routing import RoutingConfig, RoutingOptions


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 0),
        ("top_k", 65),
        ("top_k", 1.5),
        ("top_k", "three"),
        ("temperature", 0),
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "warm"),
    ],
)
@pytest.mark.parametrize("kind", [RoutingConfig, RoutingOptions])
def test_a_wrong_value_is_refused_by_its_field(kind, field, value) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**{field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (RoutingConfig, "num_tasks", 0),
        (RoutingConfig, "num_tasks", 1001),
        (RoutingConfig, "topk", 3),
        (RoutingConfig, "preset", "papers"),
        (RoutingConfig, "preset", None),
        (RoutingConfig, "preset", ["paper"]),
        (RoutingConfig, "candidates", 0),
        (RoutingConfig, "candidates", 1001),
        (RoutingConfig, "composition", "adapters"),
        (RoutingConfig, "selection", "best"),
        (RoutingConfig, "softness", 2),
        (RoutingConfig, "softening", 0.99),
        (RoutingConfig, "softening", 100.1),
        (RoutingConfig, "softening", math.nan),
        (RoutingConfig, "softening", None),
        (RoutingConfig, "rerank", None),
        (RoutingConfig, "fallback", "maybe"),
        (RoutingOptions, "preset", "papers"),
        (RoutingConfig, "exclude_tasks", []),
        (RoutingOptions, "num_tasks", 3),
        (RoutingOptions, "top_k", "3"),
        (RoutingOptions, "top_k", True),
        (RoutingOptions, "temperature", "0.2"),
        (RoutingOptions, "exclude_tasks", "sst2"),
        (RoutingOptions, "allow_adapters", "sst2"),
    ],
)
def test_what_only_one_of_them_refuses(kind, field, value) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**{field: value})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_the_papers_recipe_is_a_preset() -> None:
    paper = RoutingConfig(preset="paper")
    assert (paper.rerank, paper.composition, paper.fallback) == (False, "tasks", False)
    assert (paper.top_k, paper.temperature) == (3, 0.2)


def test_what_is_given_comes_before_the_preset_and_the_rest_is_the_default() -> None:
    given = {"top_k": 5, "temperature": 0.7, "softening": 1.5, "rerank": True, "composition": "utility"}
    changed = RoutingConfig(preset="paper", **given)
    assert changed.model_dump(include=set(given)) == given
    assert changed.fallback is False
    assert RoutingConfig(preset="paper", num_tasks=3).model_copy(update={"num_tasks": 10}) == RoutingConfig(
        preset="paper"
    )
    assert RoutingConfig(preset="default") == RoutingConfig() != RoutingConfig(preset="paper")
    assert RoutingConfig(preset="paper").num_tasks == RoutingConfig().num_tasks


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_configuration_survives_json(preset) -> None:
    for config in (RoutingConfig(preset=preset), RoutingConfig(preset=preset, softening=1, rerank=False)):
        assert RoutingConfig.model_validate_json(config.model_dump_json()) == config
        assert RoutingConfig(**config.model_dump()) == config


def test_an_item_of_a_wrong_type_is_refused() -> None:
    with pytest.raises(ValidationError, match="exclude_tasks"):
        RoutingOptions.model_validate_json('{"exclude_tasks": [1]}')


@pytest.mark.parametrize("kind", [RoutingConfig, RoutingOptions])
def test_the_limits_themselves_are_taken_and_nothing_can_be_changed_later(kind) -> None:
    for top_k, temperature in ((1, 1e-6), (64, 100)):
        values = kind(top_k=top_k, temperature=temperature)
        assert (values.top_k, values.temperature) == (top_k, temperature)
    with pytest.raises(ValidationError):
        values.top_k = 2


def test_options_come_out_of_json() -> None:
    text = json.dumps({"top_k": 2, "temperature": 1, "exclude_tasks": ["a", "a"], "allow_adapters": []})
    options = RoutingOptions.model_validate_json(text)
    assert options == RoutingOptions(
        top_k=2, temperature=1.0, exclude_tasks=frozenset({"a"}), allow_adapters=frozenset()
    )
    assert RoutingOptions.model_validate_json(options.model_dump_json()) == options


@pytest.mark.parametrize(
    ("excluded", "allowed", "free"),
    [
        ((), None, "abc"),
        (("a",), None, "bc"),
        ((), ("a", "b"), "ab"),
        (("a",), ("a", "b"), "b"),
        ((), (), ""),
        (("none",), ("a", "none"), "a"),
    ],
)
def test_which_adapters_may_be_used(excluded, allowed, free) -> None:
    options = RoutingOptions(
        exclude_adapters=frozenset(excluded), allow_adapters=None if allowed is None else frozenset(allowed)
    )
    assert "".join(filter(options.allows, "abc")) == free


def test_names_come_in_any_collection_and_none_excludes_nothing() -> None:
    assert RoutingOptions(exclude_tasks=None, exclude_adapters=None) == RoutingOptions()
    assert RoutingOptions(exclude_tasks=["a", "b"], allow_adapters=("c",)).exclude_tasks == {"a", "b"}
