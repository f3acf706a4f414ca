"""Answers by Arrow and SpectR are those of the routers themselves, each question over its own pool."""

import pytest
import torch

from lorauter.evaluation.answering import adapters_in, answer
from lorauter.evaluation.baselines import Arrow, SpectR, TokenRouted
from lorauter.evaluation.rows import DecisionRow, Question, read_answers
from lorauter.evaluation.token_routers import TokenRouters

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
POOL = "abc"


@pytest.fixture
def load(tmp_path, make_adapter):
    make_adapter(tmp_path / "adapters", "a", rank=2)
    make_adapter(tmp_path / "adapters", "b", rank=4, targets=ALL)
    make_adapter(tmp_path / "adapters", "c", rank=3, targets=("v_proj", "down_proj"))
    make_adapter(tmp_path / "adapters", "huge", targets=("q_proj", "k_proj"), fill=1e10)
    return adapters_in(tmp_path / "adapters")


def row(row_id, text, adapters, mixing, max_tokens=6) -> DecisionRow:
    return DecisionRow(
        row_id, Question(text, tuple((name, 1 / len(adapters)) for name in adapters), max_tokens, mixing)
    )


def directly(engine, load, router, text, adapters, max_tokens=6) -> str:
    routed = TokenRouted(engine.decoder, [load(name) for name in POOL], router, eos_ids=engine.codec.eos_ids)
    allowed = torch.tensor([[name in adapters for name in POOL]])
    (ids,) = routed.generate([f"{text}>".encode()], allowed, max_tokens)
    stream = engine.codec.stream()
    return "".join(stream.push(token)[0] for token in ids if token not in engine.codec.eos_ids) + stream.flush()


@pytest.mark.parametrize("chunk_size", [2, 1024])
def test_answers_are_the_routers_own(engine, load, tmp_path, chunk_size) -> None:
    asked = {
        f"{mixing} {text} {adapters} {tokens}": (mixing, text, adapters, tokens)
        for mixing in ("arrow", "spectr")
        for text, adapters, tokens in (("hello", "abc", 6), ("hello", "bc", 6), ("hello", "a", 6), ("a film", "abc", 9))
    }
    rows = [row(row_id, text, adapters, mixing, tokens) for row_id, (mixing, text, adapters, tokens) in asked.items()]
    rows.append(row("mixed", "hello", "abc", "outputs"))
    output = tmp_path / "answers.jsonl"
    answer(rows, engine, load, output, chunk_size=chunk_size)
    answers = read_answers(output)
    for row_id, (mixing, text, adapters, tokens) in asked.items():
        router = {"arrow": Arrow(), "spectr": SpectR()}[mixing]
        assert answers[row_id].answer == directly(engine, load, router, text, adapters, tokens), row_id
        assert answers[row_id].completion_tokens <= tokens
    assert len({answers[row_id].answer for row_id in asked}) > 4, "the pools and routers make no difference"
    assert answers["mixed"].answer not in {answers["arrow hello abc 6"].answer, answers["spectr hello abc 6"].answer}


def test_what_breaks_the_model_breaks_its_own_rows_alone(engine, load, tmp_path) -> None:
    output = tmp_path / "answers.jsonl"
    rows = [row("sound", "hello", "abc", "arrow"), row("broken", "hello", ["huge"], "arrow")]
    answer(rows, engine, load, output)
    answers = read_answers(output)
    assert "not finite" in answers["broken"].error
    assert answers["sound"].error is None
    assert answers["sound"].answer == directly(engine, load, Arrow(), "hello", "abc")


def test_adapters_are_read_and_laid_out_once(engine, load, monkeypatch) -> None:
    loaded, made, original = [], [], TokenRouted.__init__
    monkeypatch.setattr(TokenRouted, "__init__", lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1])
    routers = TokenRouters(engine, lambda name: loaded.append(name) or load(name))
    for mixing, made_so_far in (("arrow", 1), ("arrow", 1), ("spectr", 2)):
        question = row("", "hello", POOL, mixing).question
        routers.answer(mixing, [(question, b"hello>")])
        assert len(made) == made_so_far
    assert loaded == ["a", "b", "c"]
