"""Tasks of words of their own are told apart without error; queries of none, or of two, are found out."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from fake_states import HashingStates

from lorauter.catalog.rerank import Reranker
from lorauter.encoder import HashingEncoder
from lorauter.errors import ConfigError, TaskError
from lorauter.evaluation import routing
from lorauter.evaluation.routing import (
    RememberingCatalogs,
    RememberingEncoder,
    ambiguous,
    area_under_curve,
    calibration_error,
    evaluate_routing,
    first_examples,
    queries_of,
    read_query_set,
    strangers,
    stress,
)
from lorauter.routing import RoutingConfig
from lorauter.tasks import Example

PAPER = RoutingConfig(preset="paper")
CONFIGS = pytest.mark.parametrize("config", [PAPER, RoutingConfig()], ids=["paper", "default"])
WORDS = {
    "sums": ("maths", "add these two numbers please"),
    "products": ("maths", "multiply both factors quickly"),
    "verses": ("poetry", "rhyme a short stanza"),
    "haiku": ("poetry", "seventeen syllables of autumn"),
    "rain": ("weather", "forecast tomorrow's clouds"),
}


class CountingEncoder(HashingEncoder):
    def __init__(self) -> None:
        super().__init__(256)
        self.seen: list[str] = []

    def encode(self, texts):
        self.seen += texts
        return super().encode(texts)


@pytest.fixture
def tasks(make_task):
    """Five tasks of three domains, each with words of its own, six examples and two queries."""
    return [
        replace(
            make_task(name, *(f"{words} {name}{i}" for i in range(6)), domain=domain),
            test=tuple(Example(f"{words} query{i}{name}", "") for i in range(2)),
        )
        for name, (domain, words) in WORDS.items()
    ]


@CONFIGS
def test_tasks_of_their_own_words_are_told_apart(tasks, config) -> None:
    result = evaluate_routing(tasks, queries_of(tasks), HashingEncoder(256), config)
    assert (result.tasks, result.queries) == (5, 10)
    assert (result.top_1, result.top_3, result.mrr, result.domain) == (1, 1, 1, 1)
    assert result.known_auc == 1
    assert 0 <= result.calibration_error < 0.5
    assert result.fit_s > 0
    assert result.route_ms > 0


def test_ranks_count_beyond_the_first_and_domains_of_wrong_tasks(tasks) -> None:
    sums, verses = tasks[0].test[0].input, tasks[2].test[0].input
    given = [("sums", sums), ("products", sums), ("rain", verses)]  # right; wrong task; wrong domain
    result = evaluate_routing(tasks, given, HashingEncoder(256), PAPER)
    assert result.top_1 == pytest.approx(1 / 3)
    assert result.domain == pytest.approx(2 / 3)
    assert 1 / 3 < result.mrr < 2 / 3
    assert result.fallback == 0


def test_every_task_is_ranked_however_few_the_router_would_report(make_task) -> None:
    many = [make_task(f"t{i}", f"word{i} common", f"word{i} usual") for i in range(40)]
    config = RoutingConfig(preset="paper", num_tasks=1, candidates=1)
    result = evaluate_routing(many, [(f"t{i}", "word0 common") for i in range(40)], HashingEncoder(256), config)
    assert result.mrr == pytest.approx(sum(1 / rank for rank in range(1, 41)) / 40)


def test_a_text_is_embedded_once(tasks) -> None:
    encoder = CountingEncoder()
    evaluate_routing(tasks, queries_of(tasks) * 2, encoder, PAPER)
    assert len(encoder.seen) == len(set(encoder.seen)) == 5 * (6 + 2) + 1  # and the catalog's probe


def test_a_catalog_is_built_once_for_all_measurements(tasks, monkeypatch) -> None:
    built, build = [], routing.build_catalog

    def counted(of, encoder, **given):
        built.append(len(of))
        return build(of, encoder, **given)

    monkeypatch.setattr(routing, "build_catalog", counted)
    catalogs = RememberingCatalogs(HashingEncoder(256))
    for config in (PAPER, RoutingConfig()):
        alone = evaluate_routing(tasks, queries_of(tasks), HashingEncoder(256), config)
        built.clear()
        shared = evaluate_routing(tasks[::-1], queries_of(tasks), catalogs, config)
        assert (shared.top_1, shared.mrr, shared.known_auc) == (alone.top_1, alone.mrr, alone.known_auc)
        assert shared.calibration_error == pytest.approx(alone.calibration_error)
        assert strangers(tasks, catalogs, config) and ambiguous(tasks, catalogs, config)
        assert stress(tasks, catalogs, config, sizes=(3, 5)) == stress(tasks, HashingEncoder(256), config, sizes=(3, 5))
    changed = [replace(tasks[0], validation=tasks[1].validation), *tasks[1:]]
    before = catalogs.of(tasks)[0]
    assert catalogs.of(tasks)[0] is before
    assert catalogs.of(changed)[0].version != before.version


def test_what_was_embedded_comes_back_in_order() -> None:
    inner = HashingEncoder()
    encoder = RememberingEncoder(inner)
    encoder.encode(["b"])
    assert np.array_equal(encoder.encode(["a", "b", "a"]), inner.encode(["a", "b", "a"]))
    assert encoder.name == inner.name


def test_queries_must_be_there_and_of_the_tasks(tasks) -> None:
    with pytest.raises(ConfigError, match="no queries"):
        evaluate_routing(tasks, [], HashingEncoder(), PAPER)
    with pytest.raises(ConfigError, match="'none'"):
        evaluate_routing(tasks, [("none", "text")], HashingEncoder(), PAPER)


@CONFIGS
def test_stress_grows_to_as_many_tasks_as_there_are(tasks, config) -> None:
    assert stress(tasks, HashingEncoder(256), config, sizes=(2, 5, 6)) == {2: 1, 5: 1}


def test_stress_shows_tasks_that_cannot_be_told_apart(tasks) -> None:
    twins = [replace(task, validation=tasks[0].validation, test=tasks[0].test) for task in tasks]
    shares = stress(twins, HashingEncoder(256), PAPER, sizes=(1, 2, 5))
    assert shares == pytest.approx({1: 1, 2: 1 / 2, 5: 1 / 5})


@CONFIGS
def test_two_queries_in_one_find_one_of_their_tasks(tasks, config) -> None:
    result = ambiguous(tasks, HashingEncoder(256), config)
    assert (result.queries, result.either) == (10, 1)
    assert 0 <= result.confidence <= 1
    assert result == ambiguous(tasks, HashingEncoder(256), config)


@CONFIGS
def test_strangers_are_less_sure_of(tasks, config) -> None:
    result = strangers(tasks, HashingEncoder(256), config)
    assert result.queries == 10
    joined = ambiguous(tasks, HashingEncoder(256), config)
    assert result.confidence < joined.confidence


def test_only_a_router_with_a_fallback_leaves_strangers_to_the_base_model(tasks, monkeypatch) -> None:
    fit = Reranker.fit
    monkeypatch.setattr(Reranker, "fit", lambda *args: replace(fit(*args), stranger=1.1))  # whatever comes
    for config, share in ((RoutingConfig(), 1), (RoutingConfig(fallback=False), 0)):
        assert strangers(tasks, HashingEncoder(), config).fallback == share
        assert evaluate_routing(tasks, queries_of(tasks), HashingEncoder(), config).fallback == share


def test_one_domain_has_neither_strangers_nor_ambiguous_queries(tasks) -> None:
    assert strangers(tasks[:2], HashingEncoder(), PAPER) is None
    assert ambiguous(tasks[:2], HashingEncoder(), PAPER) is None


def test_the_first_examples_stand_for_a_task(tasks) -> None:
    (task, *_) = first_examples(tasks, 2)
    assert (task.validation, task.test) == (tasks[0].validation[:2], tasks[0].test)


def test_calibration_is_the_gap_between_chances_and_shares() -> None:
    assert calibration_error([1.0, 0.0], [True, False]) == 0
    assert calibration_error([0.75, 0.75], [True, False]) == pytest.approx(0.25)
    assert calibration_error([0.95, 0.15, 0.15, 0.15], [False, False, False, True]) == pytest.approx((0.95 + 0.55) / 4)


def test_the_area_counts_equals_half() -> None:
    assert area_under_curve([0.9, 0.8], [0.1, 0.2]) == 1
    assert area_under_curve([0.1], [0.2, 0.3]) == 0
    assert area_under_curve([0.5, 0.9], [0.5, 0.5]) == pytest.approx(0.75)


def test_a_set_in_one_file_becomes_tasks_with_their_queries(tmp_path) -> None:
    known = {"name": "a", "domain": "d", "validation": [{"input": "x", "target": "y"}]}
    data = {"tasks": [known], "queries": [{"task": "a", "domain": "d", "input": "q", "other": 1}]}
    path = tmp_path / "set.json.gz"
    path.write_bytes(gzip.compress(json.dumps(data).encode()))
    (task,) = read_query_set(path)
    assert (task.name, task.domain, queries_of([task])) == ("a", "d", [("a", "q")])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"tasks": []}', '{"tasks": [], "queries": [{"task": "none", "input": "q"}]}', '{"tasks": [{}]}'],
)
def test_a_set_of_another_shape_is_refused_by_its_name(tmp_path, content) -> None:
    path = tmp_path / "set.json"
    path.write_text(content)
    with pytest.raises(TaskError, match=r"set\.json"):
        read_query_set(path)


def test_states_tell_what_words_do_not_and_only_where_they_are_asked(tasks) -> None:
    states = HashingStates(width=64)
    found = {}
    for name, catalogs, sure in (
        ("without", RememberingCatalogs(HashingEncoder(256)), 1.0),
        ("never", RememberingCatalogs(HashingEncoder(256), states), 0.0),
        ("always", RememberingCatalogs(HashingEncoder(256), states), 1.0),
    ):
        found[name] = evaluate_routing(tasks, queries_of(tasks), catalogs, RoutingConfig(sure=sure))
    assert [found[name].by_states for name in found] == [0, 0, 1]
    assert found["without"].known_auc == found["never"].known_auc
    assert found["without"].calibration_error == found["never"].calibration_error
    assert found["always"].calibration_error != found["never"].calibration_error
    assert found["always"].top_1 == 1
    assert found["always"].route_ms < 1000
    assert set(states.read) >= {text for _, text in queries_of(tasks)}
