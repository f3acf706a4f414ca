"""Answers are those of the engine, each row's own, written as they come and never twice."""

import json
import subprocess
import sys

import pytest
import torch

from lorauter.adapters.repository import AdapterRepository
from lorauter.adapters.store import MemoryStore
from lorauter.adapters.weights import LoraWeights
from lorauter.engine import GenerationRequest, SamplingParams
from lorauter.errors import AdapterNotFound, InvalidRequest
from lorauter.evaluation import answering
from lorauter.evaluation.answering import adapters_in, answer, fused
from lorauter.evaluation.rows import DecisionRow, Question, read_answers
from lorauter.turns import ExampleTurns

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def load(tmp_path, make_adapter):
    make_adapter(tmp_path / "adapters", "a", rank=2)
    make_adapter(tmp_path / "adapters", "b", rank=4, targets=ALL)
    make_adapter(tmp_path / "adapters", "c", rank=3, targets=("v_proj", "down_proj"))
    return adapters_in(tmp_path / "adapters")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "answers.jsonl"


def row(row_id, text="hello", adapters=(), max_tokens=6, mixing="outputs", examples=()) -> DecisionRow:
    return DecisionRow(row_id, Question(text, tuple(adapters), max_tokens, mixing, tuple(examples)))


def expected(engine, text, adapters=(), max_tokens=6):
    ids = tuple(f"{text}>".encode())
    sampling = SamplingParams(max_tokens=max_tokens)
    return engine.generate([GenerationRequest(ids, tuple(adapters), sampling)])[0]


def asked(engine) -> int:
    return sum(map(len, engine.calls))


ROWS = [
    row("base"),
    row("one", adapters=[("a", 1.0)]),
    row("two", adapters=[("b", 0.7), ("a", 0.3)]),
    row("fused", adapters=[("b", 0.7), ("a", 0.3)], mixing="matrices"),
    row("other", "a film", [("c", 1.5)], max_tokens=9),
    row("shown", "hi", [("a", 1.0)], examples=[ExampleTurns(7, "q7", "a7"), ExampleTurns(2, "q2", "a2")]),
]


@pytest.mark.parametrize("chunk_size", [1, 2, 1024])
def test_each_row_is_answered_under_its_own_adapters(engine, load, output, chunk_size) -> None:
    seen = []
    answer(ROWS, engine, load, output, chunk_size=chunk_size, progress=lambda *counts: seen.append(counts))
    a, b, c = map(load, "abc")
    right = {
        "base": expected(engine, "hello"),
        "one": expected(engine, "hello", [(a, 1.0)]),
        "two": expected(engine, "hello", [(a, 0.3), (b, 0.7)]),
        "fused": expected(engine, "hello", [(fused([(a, 0.3), (b, 0.7)]), 1.0)]),
        "other": expected(engine, "a film", [(c, 1.5)], max_tokens=9),
        "shown": expected(engine, "q2>a2>q7>a7>hi", [(a, 1.0)]),  # by their places, whichever is the nearest
    }
    answers = read_answers(output)
    assert {row_id: a.answer for row_id, a in answers.items()} == {row_id: r.text for row_id, r in right.items()}
    assert {a.answer for a in answers.values()} == {r.text for r in right.values()}
    assert len({a.answer for a in answers.values()}) == len(ROWS), "the adapters make no difference"
    assert (answers["other"].finish_reason, answers["other"].completion_tokens) == ("length", 9)
    assert seen[0] == (0, 6) and seen[-1] == (6, 6) and len(seen) == 1 + -(-6 // chunk_size)


def test_the_same_question_is_asked_once(engine, load, output) -> None:
    mixture = [("b", 0.7), ("a", 0.3)]
    rows = [
        *(row(f"same{i}", adapters=mixture) for i in range(3)),
        row("weights", adapters=[("b", 0.6), ("a", 0.4)]),
        row("longer", adapters=mixture, max_tokens=7),
        row("fused", adapters=mixture, mixing="matrices"),
        row("text", "goodbye", adapters=mixture),
    ]
    answer(rows, engine, load, output)
    assert asked(engine) == 5
    answers = read_answers(output)
    assert answers.keys() == {r.id for r in rows}
    assert answers["same0"].answer == answers["same1"].answer == answers["same2"].answer


def test_a_run_goes_on_where_it_was_cut_off(engine, load, output) -> None:
    answer(ROWS, engine, load, output)
    whole = read_answers(output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:-5])
    kept, engine.calls = [json.loads(line)["id"] for line in lines[:2]], []
    seen = []
    again = row("again", *vars(next(r for r in ROWS if r.id == kept[0]).question).values())
    answer([*ROWS, again], engine, load, output, progress=lambda *counts: seen.append(counts))
    assert asked(engine) == 4, "neither what is answered nor what asks the same is asked again"
    assert output.read_bytes().startswith(b"".join(lines[:2]))
    assert len(output.read_bytes().splitlines()) == 7
    answers = read_answers(output)
    assert answers.pop("again").answer == whole[kept[0]].answer
    assert answers == whole
    assert seen == [(3, 7), (7, 7)]
    before, engine.calls = output.read_bytes(), []
    answer([*ROWS, again], engine, load, output)
    assert asked(engine) == 0 and output.read_bytes() == before


def test_what_was_answered_before_a_failure_is_kept(engine, load, output) -> None:
    with pytest.raises(AdapterNotFound, match="'missing'"):
        answer([row("base"), row("bad", adapters=[("missing", 1.0)])], engine, load, output, chunk_size=1)
    assert read_answers(output).keys() == {"base"}


def test_a_prompt_without_room_for_an_answer_is_an_answer_with_an_error(engine, load, output) -> None:
    longest = "x" * (engine.max_model_len - 2)  # the chat template adds one
    answer([row("fits", longest), row("long", longest + "x"), row("base")], engine, load, output)
    answers = read_answers(output)
    assert answers["long"].answer == "" and "has 48 tokens, but the context holds 48" in answers["long"].error
    assert answers["long"].finish_reason is None and answers["long"].completion_tokens == 0
    assert answers["fits"].completion_tokens == 1 and answers["fits"].error is None
    assert answers["base"].answer == expected(engine, "hello").text


def test_a_mixture_that_breaks_the_model_breaks_its_own_rows_alone(engine, load, output, tmp_path, make_adapter):
    make_adapter(tmp_path / "adapters", "huge", targets=("down_proj",), fill=1e18)
    rows = [row(f"base{i}", f"text {i}") for i in range(5)] + [row("huge", adapters=[("huge", 1e3)])]
    answer(rows, engine, load, output)
    answers = read_answers(output)
    assert {i for i, a in answers.items() if a.error} == {"huge"}
    assert "not finite" in answers["huge"].error
    assert answers["base3"].answer == expected(engine, "text 3").text


def test_an_adapter_is_loaded_once(engine, load, output) -> None:
    loaded = []
    rows = [row(str(i), f"text {i}", [("a", 0.5), ("b", 0.1 * i + 0.1)]) for i in range(4)]
    answer(rows, engine, lambda name: loaded.append(name) or load(name), output, chunk_size=1)
    assert sorted(loaded) == ["a", "b"]


def test_fused_adapters_are_held_a_few_at_a_time(engine, load, output, monkeypatch) -> None:
    monkeypatch.setattr(answering, "_MAX_FUSED", 2)
    rows = [row(str(i), f"t{i % 4}", [("a", 1.0), ("b", 0.1 + i // 2)], mixing="matrices") for i in range(10)]
    answer(rows, engine, load, output)
    assert len(read_answers(output)) == 10
    assert [len({r.adapters[0][0].key for r in call}) for call in engine.calls] == [2, 2, 1]


def test_rows_that_share_adapters_are_asked_together(engine, load, output) -> None:
    rows = [row(str(i), f"text {i}", [("abc"[i % 3], 1.0)]) for i in range(9)]
    answer(rows, engine, load, output, chunk_size=3)
    assert [{r.adapters[0][0].name for r in call} for call in engine.calls] == [{"a"}, {"b"}, {"c"}]


def test_two_rows_of_one_id_are_refused(engine, load, output) -> None:
    with pytest.raises(InvalidRequest, match="two rows have the id 'base'"):
        answer([row("base"), row("base", "other")], engine, load, output)


def test_adapters_come_from_a_folder_or_a_repository(load, tmp_path) -> None:
    repository = AdapterRepository(MemoryStore())
    repository.push(tmp_path / "adapters" / "a")
    pushed, plain = adapters_in(repository)("a"), load("a")
    assert pushed.tensors.keys() == plain.tensors.keys() == {(0, "q_proj"), (0, "v_proj")}
    assert all(torch.equal(pushed.tensors[where][0], plain.tensors[where][0]) for where in plain.tensors)
    for name in ("none", "../adapters/a"):
        with pytest.raises(AdapterNotFound):
            load(name)


def test_adapters_come_in_the_versions_that_are_named(tmp_path, make_adapter) -> None:
    repository = AdapterRepository(MemoryStore())
    old, new = (repository.push(make_adapter(tmp_path, "a", rank=rank)).version for rank in (2, 3))
    assert adapters_in(repository, {"a": old})("a").key == ("a", old)
    assert adapters_in(repository, {"b": old})("a").key == ("a", new)


def test_fusion_averages_a_and_b_apart() -> None:
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=draw)

    one = LoraWeights("one", "1", "base", {(0, "q_proj"): (random(2, 5), random(7, 2))})
    pairs = {(0, "q_proj"): (random(3, 5).half(), random(7, 3)), (1, "v_proj"): (random(1, 4), random(6, 1))}
    two = LoraWeights("two", "1", "base", pairs)
    fusion = fused([(one, 0.25), (two, 0.75)])
    assert fusion.tensors.keys() == {(0, "q_proj"), (1, "v_proj")}
    (a1, b1), (a2, b2) = one.tensors[0, "q_proj"], two.tensors[0, "q_proj"]
    a2 = a2.float()
    a, b = fusion.tensors[0, "q_proj"]
    own = 0.25**2 * b1 @ a1 + 0.75**2 * b2 @ a2
    crossed = 0.25 * 0.75 * (b1 @ a2[:2] + b2[:, :2] @ a1)
    torch.testing.assert_close(b @ a, own + crossed)
    torch.testing.assert_close(a[2], 0.75 * a2[2])
    a, b = fusion.tensors[1, "v_proj"]
    torch.testing.assert_close(b @ a, 0.75**2 * two.tensors[1, "v_proj"][1] @ two.tensors[1, "v_proj"][0])
    assert one.tensors[0, "q_proj"][0] is a1, "what was fused stays as it was"
    assert fusion.key != fused([(one, 0.5), (two, 0.5)]).key


def test_the_answering_half_needs_little() -> None:
    absent = "ray faiss sentence_transformers peft boto3 pydantic rouge_score sacrebleu matplotlib nevergrad"
    code = f"import sys, lorauter.evaluation.answering; print(*sorted(set({absent.split()}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.split() == []
