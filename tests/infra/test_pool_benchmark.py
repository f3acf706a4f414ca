"""benchmarks/pool*.py: trainings side by side are those that each would be alone, and a pool is what its truth says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import pool as benchmark
import pool_made
import pool_training
import pytest
import torch
import transformers
from pool_derived import KINDS, Lora
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorauter.adapters.weights import LoraWeights
from lorauter.catalog.alike import twins
from lorauter.catalog.scores import Evaluation, Failed
from lorauter.catalog.scoring import LikelihoodScorer
from lorauter.engine.model import Decoder
from lorauter.engine.text import TextCodec
from lorauter.evaluation.rows import AnswerRow
from lorauter.tasks import Example, Task

BASE = "tiny-base"
QUESTIONS = {"even": lambda i: Example(f"{i}", "aa"), "odd": lambda i: Example(f"number {i} ", "bb!")}
EXAMPLES = {name: [example(i) for i in range(40)] for name, example in QUESTIONS.items()}
TASKS = [Task(name, "tests", "em", tuple(examples[:4])) for name, examples in EXAMPLES.items()]
SHAPES = [(2, ("q_proj", "v_proj")), (3, ("q_proj", "k_proj", "v_proj", "o_proj"))]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """The model is far too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> tuple[Decoder, TextCodec]:
    """Linear layers of 8 by 8, as the adapters of `make_adapter` have."""
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).eval()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    chat = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=["<end>"], chat_template=chat
    )
    return Decoder(base, names=(BASE,), plain=True), TextCodec(tokenizer, eos_ids=[257])


@pytest.fixture(scope="module")
def jobs() -> list[pool_training.Training]:
    return [
        pool_training.Training(task, 10 + 10 * i, *SHAPES[i % 2], 0.02 * (1 + i), seed=i)
        for i, task in enumerate(["even", "odd", "odd", "even", "even"])
    ]


def trained(model: Any, jobs: list[pool_training.Training], positions: int = 10_000) -> list[pool_training.Factors]:
    decoder, codec = model
    return pool_training.train(
        decoder, codec, EXAMPLES, jobs, steps=12, rows=4, positions=positions, say=lambda line: None
    )  # fmt: skip


def test_trainings_side_by_side_are_those_of_each_alone(model: Any, jobs: list[pool_training.Training]) -> None:
    together, alone = trained(model, jobs), trained(model, jobs, positions=1)
    for job, one, other in zip(jobs, together, alone, strict=True):
        assert sorted(one) == sorted(other) == sorted(job.targets)
        for target in one:
            assert one[target][0].shape == (2, job.rank, 8) and one[target][1].shape == (2, 8, job.rank)
            assert one[target][1].abs().max() > 0
            for side, expected in zip(one[target], other[target], strict=True):
                torch.testing.assert_close(side, expected, atol=1e-4, rtol=1e-3)


def test_what_was_trained_is_served_and_has_learnt(
    model: Any, jobs: list[pool_training.Training], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    for i, factors in enumerate(trained(model, jobs)):
        pool_made.write_lora(Lora(factors, pool_training.SCALING), tmp_path / f"a{i}", BASE)
    make_adapter(tmp_path, "nothing", layers=2, fill=0.0)

    def load(name: str) -> LoraWeights:
        return LoraWeights.load(tmp_path / name, name=name, version="1")

    scorer = LikelihoodScorer(*model, load, TASKS)
    names = [*(f"a{i}" for i in range(len(jobs))), "nothing"]
    scores = scorer.score([Evaluation(name, task.name, i) for name in names for task in TASKS for i in range(4)])
    for i, job in enumerate(jobs):
        gains = [
            scores[Evaluation(f"a{i}", job.task, k)] - scores[Evaluation("nothing", job.task, k)] for k in range(4)
        ]
        assert fmean(gains) > 0.1


def test_trainings_are_drawn_by_seed_and_cover_the_tasks() -> None:
    drawn = pool_training.trainings(["a", "b", "c"], 60, seed=1)
    assert drawn == pool_training.trainings(["a", "b", "c"], 60, seed=1)
    assert drawn != pool_training.trainings(["a", "b", "c"], 60, seed=2)
    assert Counter(job.task for job in drawn) == {"a": 20, "b": 20, "c": 20}
    assert {job.shape for job in drawn} == set(pool_training.SHAPES)
    assert len({job.seed for job in drawn}) == 60 and len({job.examples for job in drawn}) > 3


@pytest.fixture
def pool(tmp_path: Path, make_adapter: Callable[..., Path]) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """`pool(folder, seed=0)`: one of every kind, of three clean adapters and one that was trained."""
    targets = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "down_proj", "q_proj")
    for name, own in zip(("even", "odd", "third"), targets, strict=True):
        make_adapter(tmp_path / "clean", name, layers=2, rank=4, targets=own)
    make_adapter(tmp_path / "trained", "trained-0", layers=2, rank=4)
    job = pool_training.Training("odd", 10, 4, ("q_proj", "v_proj"), 0.01, 1)

    def made(folder: str, seed: int = 0) -> tuple[Path, dict[str, Any]]:
        recipe = pool_made.Recipe(tmp_path / "clean", tmp_path / "trained", ["even", "odd", "third"], [job], seed)
        truth: dict[str, Any] = {}
        for part in (range(20), range(20, 4 + len(KINDS))):
            truth |= recipe.write(part, tmp_path / folder, BASE)
        return tmp_path / folder, truth

    return made


def test_a_pool_is_the_same_for_the_same_seed_and_its_names_say_nothing(pool: Any) -> None:
    first, truth = pool("first")
    second, again = pool("second")
    assert truth == again
    assert sorted(path.name for path in first.iterdir()) == sorted(truth)
    for name in truth:
        for file in (first / name).iterdir():
            assert file.read_bytes() == (second / name / file.name).read_bytes()
    _, other = pool("third", seed=1)
    assert not truth.keys() & other.keys()
    assert not any(said in name for name in truth for said in (*KINDS, "even", "odd", "trained"))


def test_a_pool_holds_what_its_truth_says(pool: Any, model: Any) -> None:
    folder, truth = pool("pool")
    assert Counter(what["kind"] for what in truth.values()) == {**dict.fromkeys(KINDS, 1), "clean": 3, "trained": 1}

    def load(name: str) -> LoraWeights:
        return LoraWeights.load(folder / name, name=name, version="1")

    seen = LikelihoodScorer(*model, load, TASKS).look(sorted(truth, key=lambda name: truth[name]["kind"] != "clean"))
    refused = {name for name, found in seen.items() if isinstance(found, Failed)}
    assert refused == {name for name, what in truth.items() if what["kind"] in KINDS and KINDS[what["kind"]].broken}
    sources = {what["source"]: name for name, what in truth.items() if what.get("source")}
    same = twins({name: found for name, found in seen.items() if name not in refused})
    for name, what in truth.items():
        if what["kind"] in KINDS and KINDS[what["kind"]].twin:
            assert same[name] == same[sources[what["of"][0]]], what
    merged = next(what for what in truth.values() if what["kind"] == "merged-0.5")
    assert len(merged["of"]) == 2 and set(merged["tasks"]) == {
        "odd" if source == "trained-0" else source for source in merged["of"]
    }


def test_of_each_regime_the_difference_is_told_as_soon_as_it_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noisy pool's are wrong in OOD, one of two; what was answered before the end is told and kept."""
    bench = benchmark.Bench(TASKS[:1], tmp_path, tmp_path, seconds=60)
    monkeypatch.setattr(bench, "engine", lambda: nullcontext("an engine"))
    monkeypatch.setattr(benchmark, "closing", lambda engine: engine)
    asked: list[set[str]] = []

    def answer(rows: Any, engine: Any, load: Any, file: Path, **_: Any) -> None:
        asked.append({row.id.rsplit("/", 1)[0] for row in rows})
        if len(asked) == 6:
            raise KeyboardInterrupt
        with file.open("a") as to:
            for row in rows:
                text = "?" if row.id == "noisy pool/OOD/1" else "aa"
                to.write(json.dumps(AnswerRow(row.id, text, "stop", 1).to_json()) + "\n")

    monkeypatch.setattr(benchmark, "answer", answer)
    for name, methods in (("clean pool", ["oracle", "clean pool"]), ("noisy pool", ["noisy pool"])):
        rows = [
            {
                **{"id": f"{method}/{regime}/{i}", "method": method, "regime": regime, "task": "even", "target": "aa"},
                **{"domain": "tests", "metric": "em", "input": f"{i}", "adapters": {}, "max_tokens": 4},
            }
            for method in methods
            for regime in (["in-domain"] if method == "oracle" else ["in-domain", "semi-OOD", "OOD"])
            for i in range(2)
        ]
        (tmp_path / f"rows-{name.replace(' ', '-')}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(KeyboardInterrupt):
        bench.regimes({"clean pool": None, "noisy pool": None})
    assert asked[-1] == {"noisy pool/in-domain"}
    told = json.loads((tmp_path / "figures.json").read_text())
    what = "noisy pool minus clean pool, points of the oracle"
    assert next(iter(told)) == f"semi-OOD: {what}"
    assert {name: of for name, of in told.items() if what in name} == {f"semi-OOD: {what}": 0, f"OOD: {what}": -50}
