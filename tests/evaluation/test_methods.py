"""Which adapters each method takes, in each regime."""

import json
from dataclasses import replace

import pytest

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.catalog import build_catalog
from lorauter.catalog.shown import Help, ShownExamples
from lorauter.encoder import HashingEncoder
from lorauter.errors import ConfigError, InvalidRequest
from lorauter.evaluation.composing import ComposedFor, read_composed
from lorauter.evaluation.methods import COMPOSED, EXAMPLES, LORAHUB, METHODS, decide
from lorauter.evaluation.rows import DecisionRow, ScoredRow, check_unique
from lorauter.routing import RoutingConfig, RoutingOptions
from lorauter.routing.router import Router
from lorauter.tasks import Example

WORDS = {"sums": "add two numbers", "verses": "rhyme a stanza", "rain": "forecast the clouds", "cats": "purring pets"}
ENCODER = HashingEncoder()


@pytest.fixture
def tasks(make_task):
    """Each with words of its own, and a query of them."""
    made = [make_task(name, *(f"{words} {name}{i}" for i in range(3)), domain=name) for name, words in WORDS.items()]
    return [replace(task, test=(Example(f"{WORDS[task.name]} now", "an answer"),)) for task in made]


@pytest.fixture
def catalog(tasks, make_adapter, tmp_path):
    """All tasks, each with the adapter of its name."""
    repository = AdapterRepository(MemoryStore())
    for name in WORDS:
        repository.push(make_adapter(tmp_path, name))
    return build_catalog(tasks, ENCODER, repository=repository)


def mixtures(rows):
    """`{(method, regime, task): adapters}`."""
    return {(row["method"], row["regime"], row["task"]): row["adapters"] for row in rows}


def decided(tasks, catalog, *methods, **options):
    return list(decide(tasks, catalog, ENCODER, dict.fromkeys(methods), **options))


def test_rows_are_those_of_the_other_steps(tasks, catalog) -> None:
    rows = decided(tasks, catalog, *METHODS)
    check_unique(row["id"] for row in rows)
    for row in rows:
        assert DecisionRow.from_json(row, source="").question.input == row["input"]
        assert ScoredRow.from_json(row, source="").target == "an answer"
        assert sum(row["adapters"].values()) == pytest.approx(1) or not row["adapters"]
    assert {row["regime"] for row in rows if row["method"] in ("base", "oracle")} == {"in-domain"}
    mixed = {(row["method"], row["mixing"]) for row in rows if row["mixing"] != "outputs"}
    assert mixed == {("loraretriever-fusion", "matrices"), ("arrow", "arrow"), ("spectr", "spectr")}
    assert len(rows) == 4 * (2 + 3 * (len(METHODS) - 2))


def test_methods_that_do_not_look_at_the_query(tasks, catalog) -> None:
    of = mixtures(decided(tasks, catalog, "base", "oracle", "uniform", "random"))
    assert of["base", "in-domain", "sums"] == {}
    assert of["oracle", "in-domain", "sums"] == {"sums": 1}
    assert of["uniform", "in-domain", "sums"] == dict.fromkeys(WORDS, 1 / 4)
    assert of["uniform", "OOD", "sums"] == pytest.approx(dict.fromkeys(WORDS.keys() - {"sums"}, 1 / 3))
    assert all(len(of["random", regime, name]) == 1 for regime in ("in-domain", "OOD") for name in WORDS)
    assert all(name not in of["random", "semi-OOD", name] for name in WORDS)


def test_lorahub_takes_a_tasks_weights_with_its_own_adapter_only_where_it_is_in_the_pool(tasks, catalog) -> None:
    weights = {(name, own): {name if own else "cats": 0.5, "rain": -1.25} for name in WORDS for own in (True, False)}
    of = mixtures(decided(tasks, catalog, LORAHUB, lorahub=weights))
    assert of[LORAHUB, "in-domain", "sums"] == {"sums": 0.5, "rain": -1.25}
    assert of[LORAHUB, "semi-OOD", "sums"] == of[LORAHUB, "OOD", "sums"] == {"cats": 0.5, "rain": -1.25}
    del weights["verses", False]
    assert len(decided(tasks, catalog, LORAHUB, lorahub=weights, regimes=["in-domain"])) == 4
    with pytest.raises(ConfigError, match="no LoraHub weights for task 'verses'"):
        decided(tasks, catalog, LORAHUB, lorahub=weights)
    with pytest.raises(ConfigError, match="no LoraHub weights for task"):
        decided(tasks, catalog, LORAHUB)


def test_token_routers_choose_among_all_that_is_allowed(tasks, catalog) -> None:
    of = mixtures(decided(tasks, catalog, "arrow", "spectr"))
    for method in ("arrow", "spectr"):
        assert set(of[method, "in-domain", "sums"]) == set(WORDS)
        assert set(of[method, "OOD", "sums"]) == set(WORDS) - {"sums"}


def test_retrieval_takes_the_own_adapter_while_it_is_there(tasks, catalog) -> None:
    methods = ("loraretriever-selection", "loraretriever-mixture", "paper", "default")
    of = mixtures(decided(tasks, catalog, *methods))
    for name in WORDS:
        assert of["loraretriever-selection", "in-domain", name] == {name: 1}
        for method in methods:
            in_domain = of[method, "in-domain", name]
            assert in_domain[name] == max(in_domain.values())
            assert name not in of[method, "semi-OOD", name]
            assert name not in of[method, "OOD", name]
    assert set(of["loraretriever-mixture", "in-domain", "sums"].values()) == {1 / 3}


def test_settings_of_ones_own_decide_as_the_router_does(tasks, catalog) -> None:
    config = RoutingConfig(composition="tasks", top_k=2, temperature=1.0, fallback=False)
    of = mixtures(decide(tasks, catalog, ENCODER, {"mine": config}, regimes=["OOD"]))
    for task in tasks:
        options = RoutingOptions(exclude_tasks=frozenset({task.name}), exclude_adapters=frozenset({task.name}))
        (decision,) = Router(catalog, ENCODER, config).route([task.test[0].input], options)
        assert of["mine", "OOD", task.name] == {adapter.name: adapter.weight for adapter in decision.adapters}
        assert len(decision.adapters) == 2


def test_validation_asks_what_the_catalog_has_not_seen(tasks, catalog) -> None:
    more = [replace(task, validation=(*task.validation, Example(f"{task.name} new", "n"))) for task in tasks]
    rows = decided(more, catalog, "base", split="validation")
    assert [row["input"] for row in rows] == [f"{task.name} new" for task in tasks]


def test_an_id_changes_with_what_the_answer_depends_on(tasks, catalog) -> None:
    changed = [replace(task, test=(Example("another question", "an answer"),)) for task in tasks]
    before, again, after = (decided(of, catalog, "uniform") for of in (tasks, tasks, changed))
    assert before == again
    assert not {row["id"] for row in before} & {row["id"] for row in after}


def test_what_is_unknown_is_refused(tasks, catalog, make_task) -> None:
    with pytest.raises(ConfigError, match="'nonsense' is none of base"):
        decided(tasks, catalog, "nonsense")
    with pytest.raises(ConfigError, match="'other' is not in the catalog"):
        decided([make_task("other")], catalog, "base")
    with pytest.raises(ConfigError, match="'sideways'"):
        decided(tasks, catalog, "base", regimes=["sideways"])


def test_compositions_answer_their_own_tasks_without_what_the_regime_takes_away(tasks, catalog, tmp_path) -> None:
    versions = catalog.adapters

    def made(task, regime, *sources):
        of = {name: versions[name] for name in sources}
        return ComposedFor(f"{task}.composed.{regime}", regime, task, of, tmp_path)

    composed = [
        made("sums", "in-domain", *WORDS),
        made("sums", "semi-OOD", "rain", "cats"),
        made("cats", "semi-OOD", "sums", "rain"),
    ]
    rows = mixtures(decided(tasks, catalog, COMPOSED, "default", composed=composed))
    assert max(rows[COMPOSED, "in-domain", "sums"].items(), key=lambda item: item[1])[0] == "sums.composed.in-domain"
    semi = rows[COMPOSED, "semi-OOD", "sums"]
    assert max(semi, key=semi.__getitem__) == "sums.composed.semi-OOD"
    assert "sums" not in semi
    for (method, regime, task), mixture in rows.items():
        if method == COMPOSED and regime == "OOD":
            assert mixture == rows["default", "OOD", task]
        if method == COMPOSED and regime == "semi-OOD":
            assert not {f"{other}.composed.semi-OOD" for other in WORDS if other != task} & mixture.keys()


def test_examples_are_shown_where_they_help_in_the_regime(tasks, catalog) -> None:
    entries = {entry.name: entry for entry in catalog.entries}

    def shown(own, others):
        made = {name: ShownExamples(1, own, others, (1,) * entry.examples) for name, entry in entries.items()}
        return {name: replace(one, own=None) if not entries[name].declared else one for name, one in made.items()}

    no, base = Help(None, 0.0, 1.0), Help("base", 1.0, 0.0)
    helped = {"in-domain": shown(no, no), "semi-OOD": shown(None, base)}
    rows = list(decided(tasks, catalog, EXAMPLES, "default", helped=helped))
    by = {}
    for row in rows:
        by.setdefault((row["method"], row["regime"]), []).append(row)
    assert not any("examples" in row for key, of in by.items() for row in of if key != (EXAMPLES, "semi-OOD"))
    semi = [row for row in by[EXAMPLES, "semi-OOD"] if "examples" in row]
    assert semi and all(row["adapters"] == {} for row in semi), "the base model alone answers"
    for row in semi:
        [example] = row["examples"]
        place = catalog.place(row["task"])
        known = catalog.tasks[place].task.validation[example["place"]]
        assert (example["input"], example["target"]) == (known.input, known.target)
    assert by[EXAMPLES, "OOD"] and [row["adapters"] for row in by[EXAMPLES, "OOD"]] == [
        row["adapters"] for row in by["default", "OOD"]
    ]


def test_compositions_are_read_as_they_were_written(tmp_path) -> None:
    with pytest.raises(InvalidRequest, match="holds no compositions"):
        read_composed(tmp_path)
    rows = [
        {"name": "a.composed.in-domain", "regime": "in-domain", "task": "a", "folder": "made/x", "holds": holds,
         "sources": [{"name": "b", "version": "1", "weights": [1.0]}]}
        for holds in (True, False)
    ]  # fmt: skip
    (tmp_path / "composed.json").write_text(json.dumps(rows))
    [read] = read_composed(tmp_path)
    assert (read.name, read.sources, read.folder) == ("a.composed.in-domain", {"b": "1"}, tmp_path / "made/x")
