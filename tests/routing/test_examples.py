"""Which examples go before a query: the nearest of a task beyond doubt that they help, and no others'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.scope import ScopedOptions
from lorauter.adapters import AdapterRepository, MemoryStore
from lorauter.catalog import Catalog, build_catalog, with_scores, with_shown, with_tasks, without_tasks
from lorauter.catalog.shown import Help, ShownExamples
from lorauter.encoder import HashingEncoder
from lorauter.errors import ConfigError
from lorauter.routing import Router, RoutingConfig, RoutingDecision, RoutingOptions

ENCODER = HashingEncoder()
FILMS = ["was this film good", "is the film worth seeing", "who plays in the film", "was the film too long"]
QUERY = "was the film good"
NO, MIXED, BASE = Help(None, -0.1, 0.1), Help("mixture", 0.4, 0.1), Help("base", 0.5, 0.1)
OTHERS = RoutingOptions(exclude_adapters=frozenset({"films"}))


def shown(own: Help | None = MIXED, others: Help = BASE, tokens: tuple[int, ...] = (10, 20, 30, 40)) -> ShownExamples:
    return ShownExamples(3, own, others, tokens)


@pytest.fixture
def catalog(tmp_path: Path, make_adapter: Callable[..., Any], make_task: Callable[..., Any]) -> Catalog:
    """Films and news have adapters of their own, law has none; all of them are tried on everything."""
    repository = AdapterRepository(MemoryStore())
    for name in ("films", "news"):
        repository.push(make_adapter(tmp_path / "pushed", name))
    tasks = [
        make_task("films", *FILMS),
        make_task("news", "which section of the news", "sort this news article"),
        make_task("law", "does the contract bind the tenant", "may the landlord end the contract"),
    ]
    scores = {task.name: {name: {0: 0.5, 1: 0.5} for name in ("films", "news")} for task in tasks}
    return with_scores(build_catalog(tasks, ENCODER, repository=repository), scores)


def decide(
    catalog: Catalog, options: RoutingOptions | None = None, query: str = QUERY, **config: Any
) -> RoutingDecision:
    config = {"examples": 2, "examples_sure": 0.0, "fallback": False, **config}
    [decision] = Router(catalog, ENCODER, RoutingConfig(**config)).route([query], options)
    return decision


def places(decision: RoutingDecision) -> list[int]:
    return [turn.place for turn in decision.examples]


def test_the_nearest_examples_of_the_first_task_are_shown(catalog: Catalog) -> None:
    helped = with_shown(catalog, {"films": shown()})
    decision = decide(helped)
    assert decision.tasks[0].name == "films"
    similar = ENCODER.encode(FILMS) @ ENCODER.encode([QUERY])[0]
    assert places(decision) == sorted(range(4), key=lambda place: -similar[place])[:2]
    assert [(t.input, t.target) for t in decision.examples] == [(FILMS[p], "films answer") for p in places(decision)]
    assert decision.to_json()["shown"] == {"task": "films", "places": sorted(places(decision)), "by": "mixture"}
    assert decision.adapters == decide(helped, examples=0).adapters, "the mixture is the same"


def test_a_request_asks_for_as_many_as_it_wants(catalog: Catalog) -> None:
    helped = with_shown(catalog, {"films": shown()})
    assert len(places(decide(helped, RoutingOptions(examples=4)))) == 4
    assert len(places(decide(helped, RoutingOptions(examples=1), examples=0))) == 1
    for nobody_asks in (decide(helped, RoutingOptions(examples=0)), decide(helped, examples=0)):
        assert nobody_asks.shown is None and "shown" not in nobody_asks.to_json()


def test_as_many_are_shown_as_it_was_found_out_with(catalog: Catalog) -> None:
    assert len(places(decide(with_shown(catalog, {"films": shown()}), examples=None))) == shown().count
    assert decide(catalog, examples=None).shown is None, "of a task that was not asked there is nothing to say"
    assert decide(with_shown(catalog, {"films": shown()}), RoutingOptions(preset="paper")).shown is None


def test_the_base_model_alone_answers_where_that_is_better_and_its_mixture_is_kept(catalog: Catalog) -> None:
    helped = with_shown(catalog, {"films": shown()})
    decision, without = decide(helped, OTHERS), decide(helped, OTHERS, examples=0)
    assert (decision.adapters, decision.unshown) == ((), without.adapters) and without.adapters
    assert decision.to_json()["shown"]["by"] == "base"
    assert places(decision.with_examples(1, "no_room")) == places(decision)[:1]
    assert decision.with_examples(1, "no_room").adapters == ()
    back = decision.with_examples(0, "no_room")
    assert (back.adapters, back.unshown, back.examples) == (without.adapters, (), ())
    assert back.to_json()["shown"] == {"places": [], "why": "no_room"}
    assert decision.with_examples(2, "no_room") == decision


@pytest.mark.parametrize(
    ("of", "options", "config", "why"),
    [
        (None, RoutingOptions(), {}, "unchecked"),
        (shown(own=None), RoutingOptions(), {}, "unchecked"),  # its own adapter came later
        (shown(own=NO), RoutingOptions(), {}, "no_help"),  # an adapter of its own that is sharp
        (shown(others=NO), OTHERS, {}, "no_help"),
        (
            shown(),
            RoutingOptions(),
            {"examples_sure": 0.99, "query": "zebra", "preset": "paper"},
            "unsure",
        ),
        (shown(), RoutingOptions(), {"examples_tokens": 9}, "too_long"),
    ],
)
def test_why_none_is_shown(
    catalog: Catalog, of: ShownExamples | None, options: RoutingOptions, config: dict[str, Any], why: str
) -> None:
    decision = decide(catalog if of is None else with_shown(catalog, {"films": of}), options, **config)
    assert decision.examples == ()
    assert decision.to_json()["shown"] == {"places": [], "why": why}
    assert decision.adapters, "the mixture answers"


def test_they_take_so_many_tokens_at_most_the_nearest_first(catalog: Catalog) -> None:
    everything = decide(with_shown(catalog, {"films": shown()}), RoutingOptions(examples=4))
    nearest = places(everything)
    tokens = [0] * 4
    for rank, place in enumerate(nearest):
        tokens[place] = (100, 50, 200, 1)[rank]
    limited = with_shown(catalog, {"films": shown(tokens=tuple(tokens))})
    assert places(decide(limited, RoutingOptions(examples=4), examples_tokens=160)) == nearest[:2]


def test_an_excluded_task_shows_nothing(catalog: Catalog) -> None:
    helped = with_shown(catalog, {"films": shown(), "news": shown(tokens=(1, 1)), "law": shown(tokens=(1, 1))})
    decision = decide(helped, RoutingOptions(exclude_tasks=frozenset({"films"})))
    assert decision.tasks[0].name != "films"
    assert not set(FILMS) & {turn.input for turn in decision.examples}


def test_turns_of_other_tenants_tasks_are_never_used(catalog: Catalog) -> None:
    """Though the caller's adapters were tried on them, and rank there; whatever it asks."""
    helps = {name: shown(MIXED, MIXED, (1,) * (4 if name == "films" else 2)) for name in ("films", "news", "law")}
    helped = with_shown(catalog, helps)
    inputs = {entry.name: {example.input for example in entry.task.validation} for entry in helped.tasks}
    router = Router(helped, ENCODER, RoutingConfig(examples=2, examples_sure=0, fallback=False))
    asked = [{}, {"allow_adapters": frozenset({"films"})}, {"preset": "paper"}, {"exclude_tasks": frozenset({"news"})}]
    owned = {("news",): "news", ("n*", "x"): "news", ("law",): "law", (): None, ("x*",): None}  # law has no adapter
    texts = [QUERY, *(text for of in inputs.values() for text in of)]
    reasons = set()
    for options in asked:
        for permitted, own in owned.items():
            scoped = ScopedOptions.of(RoutingOptions(examples=4, **options), permitted)
            for decision in router.route(texts, scoped):
                assert {turn.input for turn in decision.examples} <= inputs.get(own or "", set())
                reasons.add(decision.shown and (bool(decision.examples), decision.shown.why))
    assert {(True, None), (False, "not_yours")} <= reasons, "own ones are shown, and others' were at hand"


def test_a_tenant_gets_its_own(catalog: Catalog) -> None:
    helped = with_shown(catalog, {"films": shown()})
    for permitted in (("films",), ("f*",), ("*",)):
        assert places(decide(helped, ScopedOptions.of(RoutingOptions(), permitted)))


def test_what_is_known_is_stored_and_stays_as_long_as_the_examples(
    catalog: Catalog, tmp_path: Path, make_task: Callable[..., Any]
) -> None:
    helped = with_shown(catalog, {"films": shown()})
    assert helped.version != catalog.version
    helped.save(tmp_path / "catalog")
    loaded = Catalog.load(tmp_path / "catalog")
    assert [entry.shown for entry in loaded.entries] == [shown(), None, None]
    assert decide(loaded) == decide(helped)
    kept = without_tasks(loaded, ["law"])
    assert kept.entries[0].shown == shown()
    assert with_tasks(kept, [make_task("films", *FILMS)], ENCODER).entries[0].shown == shown()
    assert with_tasks(kept, [make_task("films", *FILMS[:3])], ENCODER).entries[0].shown is None


def test_what_is_said_has_to_fit(catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match="no task called drama"):
        with_shown(catalog, {"drama": shown()})
    with pytest.raises(ConfigError, match="'news' has 2 examples, and 4 were shown"):
        with_shown(catalog, {"news": shown()})
