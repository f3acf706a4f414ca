"""A query of which the retriever is not sure is looked at once more, by its hidden state."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_states import HashingStates
from three_tasks import ANY, ENCODER, TEXTS, WORTHS, retrieve, utilities

from lorauter.catalog import Catalog
from lorauter.catalog.build import probed
from lorauter.catalog.index import TaskSubset
from lorauter.catalog.lexicon import grams_of, similarities
from lorauter.catalog.rerank import Reranker, softmax
from lorauter.catalog.segments import Segment, TaskRow
from lorauter.catalog.whitening import Whitening
from lorauter.errors import InvalidRequest
from lorauter.routing import Retrieved, Retriever, RoutingConfig, RoutingOptions


@pytest.fixture
def read(catalog) -> Catalog:
    """The same tasks with states."""
    rows = [catalog.row(place) for place in range(3)]
    examples = [
        row.examples._replace(states=HashingStates().states([e.input for e in row.entry.task.validation]))
        for row in rows
    ]
    segment = Segment.of([TaskRow(row.entry, of) for row, of in zip(rows, examples, strict=True)])
    return replace(catalog, segments=(segment,), states=probed(HashingStates()))


def look(catalog: Catalog, text: str, options: RoutingOptions = ANY, **config: Any) -> tuple[Retrieved, list[str]]:
    """What is found with a model of states at hand, and what it was given to read."""
    model = HashingStates()
    (result,) = Retriever(catalog, RoutingConfig(**config)).retrieve_with(
        model, ENCODER.encode([text]), [text], [options]
    )
    return result, model.read


def test_what_it_is_sure_of_is_not_read_and_what_it_is_not_sure_of_is(read) -> None:
    text = "was this film good"
    plain = retrieve(read, text)
    assert not plain.by_states
    between = plain.confidence
    assert look(read, text, sure=between) == (plain, [])
    assert look(read, text, sure=0.0) == (plain, [])
    for sure in (between + 1e-9, 1.0):
        found, asked = look(read, text, sure=sure)
        assert asked == [text]
        assert found.by_states
        assert found.confidence != between
        assert found.tasks[0].name == "films"


@pytest.mark.parametrize("config", [{"rerank": False}, {"preset": "paper"}])
def test_where_nothing_is_reranked_nothing_is_read(read, config) -> None:
    assert look(read, "zyzzyva", sure=1.0, **config)[1] == []
    assert look(read, "zyzzyva", RoutingOptions(preset="paper"), sure=1.0)[1] == []


def test_a_catalog_without_states_reads_nothing(catalog) -> None:
    assert look(catalog, "zyzzyva qoph", sure=1.0) == (retrieve(catalog, "zyzzyva qoph"), [])


def test_without_a_model_a_catalog_with_states_is_one_without(read, catalog) -> None:
    for text in ("was this film good", "zyzzyva qoph"):
        assert retrieve(read, text) == retrieve(catalog, text)


def test_a_text_that_has_no_state_is_judged_without(read) -> None:
    retriever = Retriever(read, RoutingConfig())
    texts = ["a film", "the news"]
    states = HashingStates().states(texts)
    states[1, 0, 3] = np.nan
    found = retriever.retrieve(ENCODER.encode(texts), texts, [ANY, ANY], states)
    assert [one.by_states for one in found] == [True, False]
    assert found[1] == retrieve(read, texts[1])


@pytest.mark.parametrize("shape", [(1, 2, 23), (1, 3, 24), (1, 48)])
def test_states_of_another_shape_are_refused(read, catalog, shape) -> None:
    query = ENCODER.encode(["a film"])
    for of in (read, catalog):
        with pytest.raises(InvalidRequest, match="states of shape"):
            Retriever(of, RoutingConfig()).retrieve(query, ["a film"], [ANY], np.zeros(shape, np.float16))


def test_kindred_tasks_are_told_by_their_states(read, monkeypatch) -> None:
    """For an unknown task: softmax(40 s + 15 w) of the states' similarities and the words'."""
    rank = Reranker.rank
    monkeypatch.setattr(Reranker, "rank", lambda *args: replace(rank(*args), familiarity=np.zeros(1)))
    text = "which section would a film review be in"
    found, _ = look(read, text, sure=1.0, selection="mean")
    whitening = read.reranker.by_states.whitening
    [similar] = whitening.similarities(HashingStates().states([text]), whitening.centred(read.segments[0].states))
    words = similarities(grams_of(text), read.candidates(np.arange(len(TEXTS))).words, read.reranker.idf).astype(float)
    chances = dict(zip(TEXTS, softmax(40.0 * similar + 15.0 * words), strict=True))
    expected: dict[str, float] = {}
    for task, worths in WORTHS.items():
        for adapter, worth in worths.items():
            expected[adapter] = expected.get(adapter, 0.0) + chances[task] * worth
    assert utilities(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("excluded", [{"films"}, {"films", "law"}, {"films", "nonsense"}, {"nonsense"}])
def test_the_whitening_has_never_seen_a_task_that_is_excluded(read, monkeypatch, excluded) -> None:
    rankings = []
    rank = Reranker.rank
    monkeypatch.setattr(Reranker, "rank", lambda *args: rankings.append(rank(*args)) or rankings[-1])
    text = "is the film worth it"
    found, _ = look(read, text, RoutingOptions(exclude_tasks=frozenset(excluded)), sure=1.0)
    left = [place for place, name in enumerate(TEXTS) if name not in excluded]
    assert {task.name for task in found.tasks} == {list(TEXTS)[place] for place in left}
    states = [read.examples(place).states for place in range(3)]
    gone = [states[place] for place in range(3) if place not in left]
    whitening = Whitening.fit(states)
    expected = whitening.without(np.concatenate(gone)) if gone else whitening
    means = expected.centred(read.segments[0].states[left])
    similar = expected.similarities(HashingStates().states([text]), means)[0]
    assert rankings[-1].states[0, left] == pytest.approx(similar, abs=1e-5)
    assert np.isneginf(np.delete(rankings[-1].logits[0], left)).all()
    if gone:
        assert abs(similar - whitening.similarities(HashingStates().states([text]), means)[0]).max() > 0.01


def test_who_excludes_what_it_may_not_see_does_not_learn_that_it_is_there(read) -> None:
    class OfTwo(RoutingOptions):
        def among(self, catalog: Catalog) -> TaskSubset | None:
            return TaskSubset(np.array([name != "law" for name in catalog.names]))

    text = "is the film worth a contract"
    told = [look(read, text, OfTwo(exclude_tasks=names), sure=1.0)[0] for names in ({"unheard-of"}, {"law"})]
    assert told[0] == told[1]
    assert told[0].by_states


def test_what_is_taken_out_of_the_whitening_is_read_once(read, monkeypatch) -> None:
    retriever = Retriever(read, RoutingConfig(sure=1.0))
    options = RoutingOptions(exclude_tasks=frozenset({"films", "nonsense"}))
    queries, texts = ENCODER.encode(["a film", "the news"]), ["a film", "the news"]
    found = retriever.retrieve_with(HashingStates(), queries, texts, [options] * 2)
    monkeypatch.setattr(Catalog, "examples", lambda *_: pytest.fail("was read again"))
    assert retriever.retrieve_with(HashingStates(), queries, texts, [options] * 2) == found


@pytest.mark.parametrize("config", [{}, {"selection": "similar"}, {"candidates": 2, "num_tasks": 1, "top_k": 2}])
def test_what_is_found_is_the_same_in_any_company(read, config) -> None:
    """Whatever the others ask for, and whether their states are known."""
    retriever = Retriever(read, RoutingConfig(**config))
    asked = [
        ANY,
        RoutingOptions(exclude_tasks=frozenset({"films"})),
        RoutingOptions(preset="paper"),
        RoutingOptions(exclude_tasks=frozenset(TEXTS)),
        RoutingOptions(allow_adapters=frozenset({"critic", "lawyer"}), top_k=1),
        RoutingOptions(exclude_adapters=frozenset({"critic"}), exclude_tasks=frozenset({"law", "nonsense"})),
        RoutingOptions(preset="paper", exclude_tasks=frozenset({"news"})),
    ]
    texts = [
        "was the film good news",
        "the news of a contract",
        "is a film law",
        *(() if "candidates" in config else ["hello", ""]),
    ]
    queries = [(text, options, known) for text in texts for options in asked for known in (True, False)]
    said, options, known = zip(*queries, strict=True)
    embeddings, states = ENCODER.encode(said), HashingStates().states(said)
    states[~np.array(known), 0, 0] = np.nan
    together = retriever.retrieve(embeddings, said, options, states)
    apart = [
        retriever.retrieve(embeddings[i : i + 1], said[i : i + 1], options[i : i + 1], states[i : i + 1])[0]
        for i in range(len(queries))
    ]
    assert together == apart
    assert [one.by_states for one in together] == [
        seen and len(of.exclude_tasks) < len(TEXTS) for seen, of in zip(known, options, strict=True)
    ]
    assert {one.stranger for one in together} == {True, False} or config
