import math

import pytest
from fake_states import HashingStates

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.catalog import Catalog, build_catalog
from lorauter.encoder import HashingEncoder
from lorauter.errors import CatalogError, InvalidRequest
from lorauter.routing import Router, RoutingConfig, RoutingOptions

ENCODER = HashingEncoder()


@pytest.fixture
def catalog(tmp_path, make_adapter, make_task) -> Catalog:
    """Tasks about films, news and law; law has no adapter."""
    repository = AdapterRepository(MemoryStore())
    for name in ("films", "news"):
        repository.push(make_adapter(tmp_path / "pushed", name))
    tasks = [
        make_task("films", "was this film good", "is the film worth seeing"),
        make_task("news", "which section of the news", "sort this news article"),
        make_task("law", "does the contract bind the tenant"),
    ]
    return build_catalog(tasks, ENCODER, repository=repository)


@pytest.fixture
def router(catalog) -> Router:
    return Router(catalog, ENCODER)


def test_a_query_goes_to_the_adapters_of_the_nearest_tasks(router, catalog) -> None:
    (decision,) = router.route(["was the film any good"])
    assert decision.catalog_version == catalog.version
    assert decision.tasks[0].name == "films"
    assert decision.tasks == tuple(sorted(decision.tasks, key=lambda task: -task.score))
    assert decision.adapters[0].name == "films"
    assert sum(adapter.weight for adapter in decision.adapters) == pytest.approx(1)
    assert sum(task.probability for task in decision.tasks) == pytest.approx(1)


def test_the_papers_recipe_weighs_by_the_cosines_alone(catalog) -> None:
    config = RoutingConfig(preset="paper", top_k=2, temperature=0.5)
    (decision,) = Router(catalog, ENCODER, config).route(["was the film any good"])
    (query,) = ENCODER.encode(["was the film any good"])
    cosines = dict(zip((entry.name for entry in catalog.tasks), map(float, catalog.centroids @ query), strict=True))
    assert {task.name: task.score for task in decision.tasks} == pytest.approx(cosines)
    heavier = math.exp(cosines["films"] / 0.5)
    lighter = math.exp(cosines["news"] / 0.5)
    assert [adapter.name for adapter in decision.adapters] == ["films", "news"]
    assert decision.adapters[0].weight == pytest.approx(heavier / (heavier + lighter))


def test_a_decision_does_not_depend_on_its_batch(router) -> None:
    texts = ["a film", "the news", "a contract", "a film"]
    batch = router.route(texts)
    assert batch == [router.route([text])[0] for text in texts]
    assert batch[0] == batch[3] != batch[1]


def test_the_similarity_is_the_cosine_to_the_centroid(router, catalog) -> None:
    (decision,) = router.route(["does the contract bind the tenant"])
    assert (decision.tasks[0].name, decision.tasks[0].score) == ("law", pytest.approx(1))


def test_options_are_for_all_or_for_each(router) -> None:
    no_films = RoutingOptions(exclude_adapters=frozenset({"films"}))
    sharp = RoutingOptions(top_k=1)
    texts = ["was the film good"] * 2
    one, two = router.route(texts, [no_films, sharp])
    assert [adapter.name for adapter in one.adapters] == ["news"]
    assert [adapter.name for adapter in two.adapters] == ["films"]
    assert router.route(texts, no_films) == [one, one]


def test_settings_come_from_the_configuration(catalog) -> None:
    (decision,) = Router(catalog, ENCODER, RoutingConfig(top_k=1, num_tasks=1)).route(["some news"])
    assert [task.name for task in decision.tasks] == ["news"]
    assert [(adapter.name, adapter.weight) for adapter in decision.adapters] == [("news", 1)]


@pytest.mark.parametrize(
    ("texts", "options", "said", "param"),
    [
        ("one string", None, "takes a list of texts", "input"),
        (["fine", ""], None, r"input\[1\] is empty", "input[1]"),
        (["\n\t "], None, r"input\[0\] is empty", "input[0]"),
        (["fine", 3], None, r"input\[1\] must be a string, got int", "input[1]"),
        ([None], None, "must be a string, got NoneType", "input[0]"),
        ([b"bytes"], None, "must be a string, got bytes", "input[0]"),
        (["half \ud83d"], None, "holds half a character", "input[0]"),
        (["fine"], [], "got 0 options for 1 texts", "options"),
        (["fine"], [RoutingOptions()] * 2, "got 2 options for 1 texts", "options"),
    ],
)
def test_a_wrong_call_is_refused_by_the_argument(router, texts, options, said, param) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        router.route(texts, options)
    assert caught.value.param == param


def test_no_texts_are_no_decisions(router) -> None:
    assert router.route([]) == router.route([], []) == []


def test_a_router_is_loaded_from_where_its_catalog_is(tmp_path, catalog, router) -> None:
    catalog.save(tmp_path / "catalog")
    loaded = Router.load(tmp_path / "catalog", encoder=ENCODER, config=RoutingConfig(top_k=1))
    options = RoutingOptions(top_k=1)
    assert loaded.route(["some news"]) == router.route(["some news"], options)


def test_a_router_refuses_another_encoder_and_a_missing_catalog(tmp_path, catalog) -> None:
    with pytest.raises(CatalogError, match="was built with the encoder"):
        Router(catalog, HashingEncoder(64))
    with pytest.raises(CatalogError, match="is not there"):
        Router.load(tmp_path, encoder=ENCODER)


def test_what_it_is_not_sure_of_is_read_and_the_decision_says_so(make_task) -> None:
    tasks = [make_task(name, *(f"{name} question {i}" for i in range(8))) for name in ("films", "news", "law")]
    catalog, states = build_catalog(tasks, ENCODER, states=HashingStates()), HashingStates()
    texts = ["films question 3", "zyzzyva qoph"]
    router = Router(catalog, ENCODER, RoutingConfig(sure=0.5), states=states)
    states.read.clear()  # what tells that it is the catalog's own
    known, unknown = router.route(texts)
    assert states.read == texts[1:]
    assert not known.by_states
    assert "by_states" not in known.to_json()
    assert unknown.by_states
    assert unknown.to_json()["by_states"] is True
    assert router.route(texts[:1]) == Router(catalog, ENCODER).route(texts[:1])
    with pytest.raises(CatalogError, match="those of 'hashing-states-32' are others"):
        Router(catalog, ENCODER, states=HashingStates(32))
    Router(build_catalog(tasks, ENCODER), ENCODER, states=HashingStates(32))  # has no states that it could contradict
