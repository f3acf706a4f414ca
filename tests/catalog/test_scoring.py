"""Scores are what transformers computes with merged weights, and one broken adapter is nobody else's trouble."""

import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorauter.adapters.weights import WEIGHTS_FILE, LoraWeights
from lorauter.catalog import scoring
from lorauter.catalog.match import match_adapters
from lorauter.catalog.scores import Evaluation, Failed
from lorauter.catalog.scoring import EngineScorer, LikelihoodScorer
from lorauter.engine import EngineConfig, GenerationRequest, MultiLoraEngine, SamplingParams
from lorauter.engine.model import Decoder
from lorauter.engine.text import TextCodec
from lorauter.errors import (
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    ConfigError,
    InvalidRequest,
    TaskError,
)
from lorauter.evaluation.metrics import score
from lorauter.tasks import Example, Task

EOS, END = 256, 257  # after one id for each byte
CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content }}<end>{% endfor %}assistant:"
TASKS = [
    Task("upper", "tests", "em", (Example("cat", "CAT"), Example("a long one, in words", "A LONG ONE, IN WORDS"))),
    Task("copy", "tests", "rouge", (Example("dog", "dog"), Example("none", ""), Example("é", "é é é"))),
]
ALL = [(task.name, i) for task in TASKS for i in range(len(task.validation))]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The model is far too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_base():
    """Linear layers of 8 by 8, as the adapters of `make_adapter` have."""
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    return model


@pytest.fixture(scope="module")
def base():
    return new_base()


@pytest.fixture(scope="module")
def decoder(base):
    return Decoder(base, names=("tiny-base",))


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=["<end>"], chat_template=CHAT
    )


@pytest.fixture(scope="module")
def codec(tokenizer):
    return TextCodec(tokenizer, eos_ids=[END])


@pytest.fixture
def folder(tmp_path, make_adapter):
    """Three sound adapters, and every kind of broken one."""
    make_adapter(tmp_path, "attention", layers=2, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    make_adapter(tmp_path, "mlp", layers=2, rank=3, targets=("gate_proj", "down_proj"))
    make_adapter(tmp_path, "values", rank=1, targets=("v_proj",))
    make_adapter(tmp_path, "nan", change=lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    make_adapter(tmp_path, "huge", fill=1e10, targets=("q_proj", "k_proj"))  # finite, but not the products of q and k
    make_adapter(tmp_path, "other-base", base="org/another")
    (make_adapter(tmp_path, "torn") / WEIGHTS_FILE).write_bytes(b"torn")
    return tmp_path


SOUND, BROKEN = ["attention", "mlp", "values"], ["huge", "missing", "nan", "other-base", "torn"]


@pytest.fixture
def load_adapter(folder):
    def load(name):
        if not (folder / name).exists():
            raise AdapterNotFound("not found", adapter=name)
        return LoraWeights.load(folder / name, name=name, version="1")

    return load


@pytest.fixture
def engine(decoder, codec):
    engine = MultiLoraEngine(decoder, codec, EngineConfig(max_batch=4, max_model_len=96, adapter_bytes=1 << 20))
    yield engine
    engine.close()


def evaluations_of(adapters, examples=ALL):
    return [Evaluation(adapter, *example) for example in examples for adapter in adapters]


def merged_with(folder, **mixture):
    """The base model with W + sum_k w_k s B_k A_k in place of W; s is 2."""
    model = new_base()
    for name, weight in mixture.items():
        tensors = load_file(folder / name / WEIGHTS_FILE)
        for key, a in tensors.items():
            if "lora_A" in key:
                path = key.removeprefix("base_model.model.").replace(".lora_A.weight", "")
                with torch.no_grad():
                    model.get_submodule(path).weight += weight * 2 * tensors[key.replace("lora_A", "lora_B")] @ a
    return model


def likelihood(model, tokenizer, example):
    """By transformers alone, one sequence at a time."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.input}], add_generation_prompt=True, tokenize=False
    )
    prompt, target = (tokenizer(part, add_special_tokens=False).input_ids for part in (text, example.target))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + target])).logits[0].double()
    steps = logits.log_softmax(dim=-1)[len(prompt) - 1 :]
    total = sum(float(step[token]) for step, token in zip(steps, target, strict=False))
    return (total + math.log(sum(math.exp(steps[-1, end]) for end in (EOS, END)))) / (len(target) + 1)


def test_likelihood_is_transformers_with_merged_weights(decoder, codec, tokenizer, folder, load_adapter, base) -> None:
    outcomes = LikelihoodScorer(decoder, codec, load_adapter, TASKS).score(evaluations_of(SOUND))
    assert outcomes.keys() == set(evaluations_of(SOUND))
    for name in SOUND:
        model = merged_with(folder, **{name: 1})
        changes = []
        for task in TASKS:
            for i, example in enumerate(task.validation):
                got = outcomes[Evaluation(name, task.name, i)]
                assert got == pytest.approx(likelihood(model, tokenizer, example), abs=1e-4)
                changes.append(abs(got - likelihood(base, tokenizer, example)))
        assert max(changes) > 0.01  # the adapter matters, or nothing was tested


@pytest.mark.parametrize("settings", [{"batch_tokens": 1}, {"batch_tokens": 130}, {"adapter_bytes": 3000}])
def test_likelihood_does_not_depend_on_how_it_is_batched(decoder, codec, load_adapter, settings) -> None:
    whole = LikelihoodScorer(decoder, codec, load_adapter, TASKS).score(evaluations_of(SOUND))
    parts = LikelihoodScorer(decoder, codec, load_adapter, TASKS, **settings).score(evaluations_of(SOUND))
    assert parts == {evaluation: pytest.approx(outcome, abs=1e-5) for evaluation, outcome in whole.items()}


@pytest.mark.parametrize("mixture", [{"attention": 0.7, "mlp": -0.4, "values": 0.0}, {"mlp": 1.5}, {}])
def test_a_mixtures_likelihood_is_transformers_with_merged_weights(
    decoder, codec, tokenizer, folder, load_adapter, mixture
) -> None:
    scorer = LikelihoodScorer(decoder, codec, load_adapter, TASKS, batch_tokens=130)
    packed = [(scorer.pack(load_adapter(name)), weight) for name, weight in mixture.items()]
    asked = [*reversed(ALL), ALL[0]]  # in their own order, and one twice
    model, texts = (
        merged_with(folder, **mixture),
        {(task.name, i): e for task in TASKS for i, e in enumerate(task.validation)},
    )
    expected = [likelihood(model, tokenizer, texts[example]) for example in asked]
    assert scorer.score_mixture(packed, asked) == pytest.approx(expected, abs=1e-4)


def test_a_mixture_leaves_the_device_to_others_whatever_becomes_of_it(decoder, codec, load_adapter) -> None:
    packing = LikelihoodScorer(decoder, codec, load_adapter, TASKS)
    packed = {name: packing.pack(load_adapter(name)) for name in (*SOUND, "huge")}
    room = max(adapter.nbytes for adapter in packed.values())
    scorer = LikelihoodScorer(decoder, codec, load_adapter, TASKS, adapter_bytes=room)
    first = scorer.score_mixture([(packed["attention"], 1.0)], ALL)
    with pytest.raises(AdapterRejected, match="not finite under it"):
        scorer.score_mixture([(packed["huge"], 1.0)], ALL)
    with pytest.raises(AdapterUnavailable, match=f"adapter_bytes is {room}"):
        scorer.score_mixture([(packed[name], 1.0) for name in SOUND], ALL)
    for name in (*SOUND, *SOUND):
        scorer.score_mixture([(packed[name], 0.5)], ALL)
    assert scorer.score_mixture([(packed["attention"], 1.0)], ALL) == first
    with pytest.raises(AdapterRejected, match="rank"):
        LikelihoodScorer(decoder, codec, load_adapter, TASKS, max_rank=2).pack(load_adapter("mlp"))


def test_few_logits_are_held_at_once(decoder, codec, load_adapter, monkeypatch) -> None:
    whole = LikelihoodScorer(decoder, codec, load_adapter, TASKS).score(evaluations_of(SOUND))
    sizes, forward = [], Decoder.forward
    monkeypatch.setitem(scoring._LOGIT_BYTES, "cpu", 12 * 4 * decoder.vocabulary)
    monkeypatch.setattr(
        Decoder, "forward", lambda self, *args: (sizes.append(len(args[1].outputs)), forward(self, *args))[1]
    )
    parts = LikelihoodScorer(decoder, codec, load_adapter, TASKS).score(evaluations_of(SOUND))
    assert parts == {evaluation: pytest.approx(outcome, abs=1e-5) for evaluation, outcome in whole.items()}
    assert {size for size in sizes if size > 12} == {21}  # an example that is longer alone goes alone
    assert sum(sizes) == 3 * 39 and sizes.count(21) == 3


def test_broken_adapters_are_reported_and_the_others_likelihoods_unharmed(decoder, codec, load_adapter) -> None:
    scorer = LikelihoodScorer(decoder, codec, load_adapter, TASKS, max_rank=8)
    outcomes = scorer.score(evaluations_of(BROKEN + SOUND))
    check_broken(outcomes)
    assert {e: o for e, o in outcomes.items() if e.adapter in SOUND} == scorer.score(evaluations_of(SOUND))


def test_who_was_looked_at_scores_the_same_and_is_not_read_again(decoder, codec, load_adapter) -> None:
    whole = LikelihoodScorer(decoder, codec, load_adapter, TASKS).score(evaluations_of(SOUND))
    read = []

    def load(name):
        read.append(name)
        return load_adapter(name)

    scorer = LikelihoodScorer(decoder, codec, load, TASKS)
    before = torch.get_num_threads()
    seen = scorer.look([*SOUND, *BROKEN])
    assert torch.get_num_threads() == before
    assert [name for name, found in seen.items() if isinstance(found, Failed)] == [n for n in BROKEN if n != "huge"]
    assert "another" in seen["other-base"].reason and "NaN" in seen["nan"].reason
    parts = scorer.score(evaluations_of(SOUND))
    assert parts == {evaluation: pytest.approx(outcome, abs=1e-5) for evaluation, outcome in whole.items()}
    assert sorted(read) == sorted([*SOUND, *BROKEN])


def check_broken(outcomes):
    reasons = {name: {outcomes[e] for e in evaluations_of([name])} for name in BROKEN}
    assert all(len(found) == 1 and isinstance(next(iter(found)), Failed) for found in reasons.values())
    for name, said in [
        ("huge", "not finite"),
        ("missing", "not found"),
        ("nan", "NaN or infinity"),
        ("other-base", "another"),
        ("torn", "cannot be read"),
    ]:
        assert said in next(iter(reasons[name])).reason


def test_metric_scores_are_those_of_the_engines_answers(engine, codec, load_adapter, monkeypatch) -> None:
    expected = {}
    for name in SOUND:
        for task, longest in zip(TASKS, (20, 8), strict=True):
            for i, example in enumerate(task.validation):
                prompt = codec.chat([{"role": "user", "content": example.input}])
                sampling = SamplingParams(max_tokens=min(20, 2 * longest + 8))
                (answer,) = engine.generate([GenerationRequest(prompt, ((load_adapter(name), 1.0),), sampling)])
                expected[Evaluation(name, task.name, i)] = (task.metric, answer.text, example.target)
    assert len(set(expected.values())) > len(ALL)  # the adapters answer differently
    scorer = EngineScorer(engine, load_adapter, TASKS, max_tokens=20)
    assert scorer.score(evaluations_of(SOUND)) == {e: score(*said) for e, said in expected.items()}
    monkeypatch.setattr("lorauter.evaluation.metrics.score", lambda *said: said)
    assert scorer.score(evaluations_of(SOUND)) == expected


def test_broken_adapters_are_reported_and_the_others_answers_unharmed(engine, load_adapter) -> None:
    scorer = EngineScorer(engine, load_adapter, TASKS, max_tokens=8)
    outcomes = scorer.score(evaluations_of(BROKEN + SOUND))
    check_broken(outcomes)
    assert {e: o for e, o in outcomes.items() if e.adapter in SOUND} == scorer.score(evaluations_of(SOUND))


def test_an_adapter_that_does_not_fit_the_memory_has_failed(decoder, codec, load_adapter) -> None:
    scorer = LikelihoodScorer(decoder, codec, load_adapter, TASKS, adapter_bytes=100)
    (outcome,) = set(scorer.score(evaluations_of(["attention"])).values())
    assert isinstance(outcome, Failed) and "adapter_bytes is 100" in outcome.reason


@pytest.mark.parametrize("adapters", [SOUND, SOUND + BROKEN])
def test_matching_runs_on_a_scorer(decoder, codec, load_adapter, adapters) -> None:
    scorer = LikelihoodScorer(decoder, codec, load_adapter, TASKS)
    matching = match_adapters(TASKS, adapters, scorer)
    assert sorted(matching.failures) == [name for name in BROKEN if name in adapters]
    for matches in matching.result().values():
        assert sorted(match.name for match in matches) == SOUND


@pytest.mark.parametrize("kind", ["engine", "likelihood"])
def test_what_cannot_be_scored_is_refused(kind, engine, decoder, codec, tokenizer, load_adapter, monkeypatch) -> None:
    def scorer(tasks):
        if kind == "engine":
            return EngineScorer(engine, load_adapter, tasks)
        return LikelihoodScorer(decoder, codec, load_adapter, tasks)

    long = Task("long", "tests", "em", (Example("short", "x"), Example("word " * 40, "x")))
    with pytest.raises(TaskError, match=r"long: validation\[1\] takes \d+ tokens .* holds (96|128)"):
        scorer([long])
    with pytest.raises(TaskError, match=r"upper: has no validation\[2\]"):
        scorer(TASKS).score([Evaluation("mlp", "upper", 2)])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InvalidRequest, match="no chat template"):
        scorer(TASKS)


def test_likelihood_needs_an_end(decoder, tokenizer, load_adapter) -> None:
    endless = TextCodec(tokenizer)
    endless.eos_ids = frozenset()
    with pytest.raises(ConfigError, match="no token that ends an answer"):
        LikelihoodScorer(decoder, endless, load_adapter, TASKS)
