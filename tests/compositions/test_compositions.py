"""Mixtures are fitted to left-out examples through the project's own model, and written as adapters that PEFT loads."""

import copy
import json
import warnings
from concurrent.futures import Future
from dataclasses import replace
from math import isnan

import pytest
import torch
import transformers
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode
from two_places import THERE, TwoPlaces

from lorauter.adapters.weights import TARGETS, LoraWeights
from lorauter.catalog.dialogues import dialogue_of
from lorauter.catalog.scoring import LikelihoodScorer
from lorauter.compositions.config import ComposeConfig
from lorauter.compositions.cut import Cutter
from lorauter.compositions.fit import Fitter, Problem
from lorauter.compositions.losses import passes, row_losses
from lorauter.compositions.make import Composer, Wanted
from lorauter.compositions.stack import AdapterStack
from lorauter.compositions.written import write_adapter
from lorauter.engine.model import Decoder
from lorauter.engine.text import TextCodec
from lorauter.errors import ConfigError
from lorauter.tasks import Example, Task

EOS, END = 256, 257  # after one id for each byte
CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content }}<end>{% endfor %}assistant:"
WORDS = ("cat", "a dog", "two of them", "none", "it is", "why", "seven", "or not")
TASK = Task("upper", "tests", "em", tuple(Example(word, word.upper()) for word in WORDS))
FEW = ComposeConfig(steps=6, check_every=2, folds=2, learning_rate=0.1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The model is far too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base():
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.4)
        parameter.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def decoder(base):
    return Decoder(base, names=("tiny-base",), plain=True)


@pytest.fixture(scope="module")
def codec():
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=["<end>"], chat_template=CHAT
    )
    return TextCodec(tokenizer, eos_ids=[END])


def adapter(decoder, name, *, targets=TARGETS, rank=2, layers=(0, 1), seed=0):
    draw = torch.Generator().manual_seed(seed)

    def drawn(*size):
        return torch.randn(*size, generator=draw) * 0.3

    shapes = decoder.shape.linears
    tensors = {(i, t): (drawn(rank, shapes[t][0]), drawn(shapes[t][1], rank)) for i in layers for t in targets}
    return LoraWeights(name, f"{seed:016x}", "tiny-base", tensors)


@pytest.fixture(scope="module")
def pool(decoder):
    """Ranks, targets and layers differ."""
    return [
        adapter(decoder, "all", seed=1),
        adapter(decoder, "some", targets=("q_proj", "v_proj"), rank=3, seed=2),
        adapter(decoder, "late", targets=("v_proj", "down_proj"), rank=1, layers=(1,), seed=3),
    ]


@pytest.fixture(scope="module")
def stack(decoder, pool):
    return AdapterStack(pool, decoder.shape, dtype=decoder.dtype, device=decoder.device)


@pytest.fixture(scope="module")
def dialogues(codec):
    return [dialogue_of(codec, example) for example in TASK.validation]


def fitter(decoder, codec, stack, config=FEW, tokens=4096):
    return Fitter(decoder, list(codec.eos_ids), stack, config, tokens=tokens, outputs=64)


def test_a_mixtures_loss_is_the_engines_likelihood(base, decoder, codec, pool, stack, dialogues):
    mixture = {"all": 0.5, "some": 0.7, "late": -0.2}
    by_name = {one.name: one for one in pool}
    scorer = LikelihoodScorer(Decoder(base, names=("tiny-base",)), codec, by_name.__getitem__, [TASK])
    packed = [(scorer.pack(by_name[name]), weight) for name, weight in mixture.items()]
    expected = scorer.score_mixture(packed, [("upper", i) for i in range(len(WORDS))])
    for tokens in (4096, 100):  # in one pass, and in many
        [fit] = fitter(decoder, codec, stack, replace(FEW, steps=1), tokens).fit(
            [Problem("upper", dialogues, [mixture] * len(WORDS), [mixture])]
        )
        assert fit.before == pytest.approx([-value for value in expected], abs=1e-4)


def test_gradients_are_the_slopes_of_the_loss(base, pool, dialogues):
    precise = Decoder(copy.deepcopy(base).double(), names=("tiny-base",), plain=True)
    stack = AdapterStack(pool, precise.shape, dtype=torch.float64, device=precise.device)
    [rows] = passes(
        [(one, i % 2, 1.0) for i, one in enumerate(dialogues)], tokens=9999, outputs=999, device=precise.device
    )

    def loss(weights):
        return row_losses(precise, torch.tensor([END]), stack, stack.columns(weights), rows)[0].sum()

    draw = torch.Generator().manual_seed(4)
    weights = torch.randn(2, 2, len(stack.targets), 3, generator=draw).mul(0.3).requires_grad_(True)
    loss(weights).backward()
    for _ in range(4):
        along = torch.nn.functional.normalize(torch.randn(weights.shape, generator=draw).flatten(), dim=0).view_as(
            weights
        )
        with torch.no_grad():
            slope = (loss(weights + 0.03 * along) - loss(weights - 0.03 * along)) / 0.06
        assert (weights.grad * along).sum().item() == pytest.approx(slope.item(), abs=2e-4)


def test_a_task_whose_fit_has_ended_leaves_the_others_as_they_were(decoder, codec, stack, dialogues):
    """One task gets worse from the start, and its examples leave the batch before the other has ended."""
    config = replace(FEW, steps=12, patience=2, learning_rate=0.3)
    problems = [
        Problem("upper", dialogues, [{"some": 1.0}] * len(WORDS), [{"some": 1.0}]),
        Problem("few", dialogues[:3], [{"all": 0.5}] * 3, [{"all": 0.5}], frozenset({"some"})),
    ]
    together = fitter(decoder, codec, stack, config).fit(problems)
    assert len(together[0].history) != len(together[1].history)
    for problem, fit in zip(problems, together, strict=True):
        [alone] = fitter(decoder, codec, stack, config).fit([problem])
        assert fit.history == pytest.approx(alone.history, abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        replace(FEW, each="adapter", layer_groups=1),
        *(replace(FEW, each=each) for each in ("adapter", "target", "column")),
    ],
)
def test_weights_are_fitted_to_examples_that_others_are_left_out_of(decoder, codec, stack, dialogues, config):
    problem = Problem("upper", dialogues, [{"some": 1.0}] * len(WORDS), [{"some": 1.0}])
    [fit] = fitter(decoder, codec, stack, config).fit([problem])
    assert fit.history[-1] < fit.history[0]
    assert fit.gain > 0
    assert sorted(fit.fold_of) == [0] * 4 + [1] * 4
    assert torch.allclose(fit.weights, fit.folds.mean(0))
    [again] = fitter(decoder, codec, stack, config).fit([problem])
    assert torch.equal(fit.weights, again.weights)  # to the bit
    if config.layer_groups == 1:
        assert (fit.weights == fit.weights[:1]).all()
    means = stack.means(fit.weights)[1, :, :2]  # where both adapters have columns, and the third changes less
    some = [i for i, target in enumerate(stack.targets) if target in ("q_proj", "v_proj")]
    assert torch.allclose(means[some[0]], means[some[1]], atol=1e-6) is (config.each == "adapter")
    of_v = stack.by_target(fit.weights)["v_proj"][
        :, 2:5
    ]  # of the second adapter, whose ranks share their weight or not
    assert torch.equal(of_v, of_v[:, :1].expand(-1, 3)) is (config.each != "column")


def test_what_is_left_out_of_a_fold_has_no_part_in_it(decoder, codec, stack, dialogues):
    """Whatever the examples of one fold say, weights that have not seen them are the same."""
    mixtures = [{"some": 1.0}] * len(WORDS)
    config = replace(FEW, patience=99)
    one = fitter(decoder, codec, stack, config).fit([Problem("upper", dialogues, mixtures, mixtures[:1])])[0]
    changed = [
        dialogue_of(codec, Example("oh, " + example.input, example.target)) if fold == 0 else dialogue
        for example, dialogue, fold in zip(TASK.validation, dialogues, one.fold_of, strict=True)
    ]
    config = replace(config, steps=2)
    first, second = (
        fitter(decoder, codec, stack, config).fit([Problem("upper", of, mixtures, mixtures[:1])])[0]
        for of in (dialogues, changed)
    )
    assert first.step == second.step == 2
    torch.testing.assert_close(first.folds[0], second.folds[0])
    assert not torch.allclose(first.folds[1], second.folds[1])


def test_tasks_that_are_fitted_together_fare_as_alone(decoder, codec, stack, dialogues):
    problems = [
        Problem("upper", dialogues, [{"some": 1.0}] * len(WORDS), [{"some": 1.0}]),
        Problem("few", dialogues[:3], [{"all": 0.5}] * 3, [{"all": 0.5}], frozenset({"some"})),
    ]
    together = fitter(decoder, codec, stack).fit(problems)
    for problem, fit in zip(problems, together, strict=True):
        [alone] = fitter(decoder, codec, stack).fit([problem])
        assert fit.step == alone.step
        torch.testing.assert_close(fit.weights, alone.weights, atol=1e-4, rtol=1e-3)
    assert not stack.means(together[1].weights)[..., 1].nan_to_num().any()  # it may not use that one


def test_weights_under_zero_can_be_barred(decoder, codec, stack, dialogues):
    problem = Problem("upper", dialogues, [{"some": 1.0}] * len(WORDS), [{"some": 1.0}])
    free, barred = (
        fitter(decoder, codec, stack, replace(FEW, non_negative=value)).fit([problem])[0] for value in (False, True)
    )
    assert free.folds.min() < 0 <= barred.folds.min()


def test_a_pull_keeps_weights_near_the_start(decoder, codec, stack, dialogues):
    problem = Problem("upper", dialogues, [{"some": 1.0}] * len(WORDS), [{"some": 1.0}])
    start = torch.tensor([0.0, 1.0, 0.0])
    far, near = (
        fitter(decoder, codec, stack, replace(FEW, pull=value, patience=99)).fit([problem])[0] for value in (0.0, 100.0)
    )
    start = stack.columns(start.expand(2, len(stack.targets), 3))
    assert (near.weights - start).norm() < (far.weights - start).norm()


def test_each_fit_begins_where_the_examples_that_it_sees_fare_best(decoder, codec, stack, dialogues):
    starts = [{"all": 9.0}, {"some": 1.0}, {"late": 1.0}]
    mixtures = [{"some": 1.0}] * len(WORDS)
    losses = {}
    for start in starts:
        problem = Problem("upper", dialogues, [start] * len(WORDS), [start])
        [fit] = fitter(decoder, codec, stack, replace(FEW, steps=1)).fit([problem])
        losses[max(start)] = fit.before
    config = replace(FEW, steps=1, learning_rate=1e-9)  # so that a fit ends where it began
    other = Problem("few", dialogues[:3], mixtures[:3], [{"late": 1.0}])
    fit, lone = fitter(decoder, codec, stack, config).fit([Problem("upper", dialogues, mixtures, starts), other])
    for fold, weights in enumerate(fit.folds):
        seen = [i for i, of in enumerate(fit.fold_of) if of != fold]
        best = min(losses, key=lambda name: sum(losses[name][i] for i in seen))
        start = torch.tensor([next(s for s in starts if best in s).get(a.name, 0.0) for a in stack.sources])
        torch.testing.assert_close(weights, stack.columns(start.expand(2, len(stack.targets), 3)))
    assert stack.means(lone.weights)[1, stack.targets.index("v_proj"), 2] == pytest.approx(1)


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None]).logits


def merged(base, decoder, stack, weights):
    """The base model with W + sum_k w_k s_k B_k A_k in place of W."""
    model = transformers.LlamaForCausalLM(base.config).eval()
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        for i, target in enumerate(stack.targets):
            for k, source in enumerate(stack.sources):
                for layer in range(decoder.shape.layers):
                    if (layer, target) in source.tensors:
                        a, b = source.tensors[layer, target]
                        block = "self_attn" if target in TARGETS[:4] else "mlp"
                        module = model.get_submodule(f"model.layers.{layer}.{block}.{target}")
                        module.weight += weights[layer, i, k] * b @ a
    return model


def test_peft_computes_the_mixture(base, decoder, stack, tmp_path):
    weights = torch.randn(2, len(stack.targets), 3, generator=torch.Generator().manual_seed(5))
    cut = Cutter(stack, energy=1.0, max_rank=64).cut(stack.columns(weights))
    assert cut.kept == pytest.approx(1)
    write_adapter(tmp_path / "mixed", cut, None, base_model="tiny-base", dtype=torch.float32)
    expected = merged(base, decoder, stack, weights)
    fresh = transformers.LlamaForCausalLM(base.config)
    fresh.load_state_dict(base.state_dict())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(fresh, tmp_path / "mixed").eval()
    assert not [warning for warning in told if "key" in str(warning.message)]  # that are missing, or unknown
    torch.testing.assert_close(logits(peft), logits(expected), atol=1e-4, rtol=1e-4)


def test_the_rank_is_the_smallest_that_keeps_the_energy(stack):
    weights = torch.ones(2, len(stack.targets), 3)
    weights[:, :, 1:] = 1e-4  # all but nothing is of the first adapter, of rank 2
    cut = Cutter(stack, energy=0.99, max_rank=64).cut(stack.columns(weights))
    assert {a.shape[0] for a, _ in cut.pairs.values()} <= {1, 2}
    assert 0.99 <= cut.kept <= 1
    assert {
        a.shape[0] for a, _ in Cutter(stack, energy=1.0, max_rank=1).cut(stack.columns(weights)).pairs.values()
    } == {1}


def test_what_is_cut_is_the_nearest_of_its_rank(stack):
    """Held against the singular values of the products themselves."""
    weights = torch.randn(2, len(stack.targets), 3, generator=torch.Generator().manual_seed(6))
    cut = Cutter(stack, energy=1.0, max_rank=2).cut(stack.columns(weights))
    for (layer, target), (a, b) in cut.pairs.items():
        place = stack.targets.index(target)
        parts = [
            (weights[layer, place, k], *source.tensors[layer, target])
            for k, source in enumerate(stack.sources)
            if (layer, target) in source.tensors
        ]
        values = torch.linalg.svdvals(sum(weight * of_b @ of_a for weight, of_a, of_b in parts))
        torch.testing.assert_close(torch.linalg.svdvals(b @ a)[:2], values[:2], atol=1e-4, rtol=1e-4)


def test_a_start_that_makes_nonsense_is_no_gain(decoder, codec, stack, dialogues):
    nonsense = {"all": float("nan")}
    [fit] = fitter(decoder, codec, stack).fit([Problem("upper", dialogues, [{"some": 1.0}] * len(WORDS), [nonsense])])
    assert fit.step == 0
    assert not fit.gain > 0
    assert isnan(fit.error)
    problem = Problem("upper", dialogues, [{"some": 1.0}] * len(WORDS), [nonsense, {"some": 1.0}])
    assert fitter(decoder, codec, stack).fit([problem])[0].gain > 0  # it begins elsewhere


def test_what_makes_nonsense_of_one_task_spoils_no_other(decoder, codec, stack, dialogues):
    nonsense = {"all": float("nan")}
    sound = Problem("few", dialogues[:3], [{"all": 0.5}] * 3, [{"all": 0.5}])
    [alone] = fitter(decoder, codec, stack).fit([sound])
    broken, beside = fitter(decoder, codec, stack).fit(
        [Problem("upper", dialogues, [nonsense] * len(WORDS), [nonsense]), sound]
    )
    assert not broken.gain > 0
    assert beside.before == pytest.approx(alone.before, abs=1e-4)
    assert beside.step == alone.step
    torch.testing.assert_close(beside.weights, alone.weights, atol=1e-4, rtol=1e-3)


def test_a_composition_of_nothing_is_an_adapter_that_changes_nothing(decoder, stack, tmp_path):
    cut = Cutter(stack, energy=0.99, max_rank=64).cut(stack.columns(torch.zeros(2, len(stack.targets), 3)))
    write_adapter(tmp_path, cut, None, base_model="tiny-base", dtype=torch.bfloat16)
    weights = LoraWeights.load(tmp_path, name="nothing", version="1")
    weights.check_fits(decoder.shape, max_rank=1)
    assert cut.kept == 1
    assert not any(b.any() for _, b in weights.tensors.values())


def composer(decoder, codec, pool, work, config=FEW):
    return Composer(decoder, codec, pool, work, base_model="digest", config=config)


WANTED = Wanted("upper.composed", TASK, [{"some": 1.0}] * len(WORDS), [{"some": 1.0}], frozenset({"late"}))


def test_a_composition_says_what_it_is_made_of_and_what_it_gains(base, decoder, codec, pool, tmp_path):
    [made] = composer(decoder, codec, pool, tmp_path).make([WANTED])
    assert made.holds
    provenance = made.provenance
    assert [(source.name, source.version) for source in provenance.sources] == [pool[0].key, pool[1].key]
    assert all(len(source.weights) == 2 for source in provenance.sources)  # one for each layer
    assert provenance.score_after > provenance.score_before
    assert 0.99 <= provenance.energy <= 1
    weights = LoraWeights.load(made.folder, name=made.name, version="1")
    weights.check_fits(decoder.shape, max_rank=64)
    assert weights.warnings == ()
    assert json.loads((made.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-base"


def test_who_has_an_adapter_of_its_own_gives_it_up_for_more(decoder, codec, pool, tmp_path):
    config = replace(FEW, margin=0.0, margin_own=1e6)
    own = replace(WANTED, name="upper.own", own=True)
    made = composer(decoder, codec, pool, tmp_path, config).make([WANTED, own])
    assert [one.holds for one in made] == [True, False]
    assert made[0].provenance.gain == made[1].provenance.gain > 0


@pytest.mark.parametrize("exact", [True, False])
def test_examples_come_out_right_as_greedy_answers_do(base, decoder, codec, stack, dialogues, exact):
    mixture = {"some": 1.0}
    model = merged(base, decoder, stack, torch.tensor([0.0, 1.0, 0.0]).expand(2, len(stack.targets), 3))

    def said(one):
        with torch.inference_mode():
            return model(torch.tensor([one.tokens])).logits[0, one.prompt - 1 :].argmax(-1).tolist()

    changed, wanted = [], []
    for i, one in enumerate(dialogues):
        tokens = list(one.tokens)
        if i % 2:  # a target that begins as the model's answer does
            tokens[one.prompt] = said(one)[0]
        changed.append(replace(one, tokens=tuple(tokens)))
        right = [a == b for a, b in zip(said(changed[-1]), [*tokens[one.prompt :], END], strict=True)]
        wanted.append(float(all(right)) if exact else sum(right) / len(right))
    problem = Problem("upper", changed, [mixture] * len(WORDS), [mixture], exact=exact)
    [fit] = fitter(decoder, codec, stack).fit([problem])
    assert fit.right_before == pytest.approx(sum(wanted) / len(wanted))
    assert exact or fit.right_before > 0


def test_what_is_made_is_not_made_again(decoder, codec, pool, tmp_path):
    told = []
    composer(decoder, codec, pool, tmp_path).make([WANTED])
    [before] = tmp_path.iterdir()
    stamp = (before / "composition.json").stat().st_mtime_ns
    composer(decoder, codec, pool, tmp_path).make([WANTED], lambda *state: told.append(state))
    assert told == [(FEW.steps, FEW.steps, "")]
    assert (before / "composition.json").stat().st_mtime_ns == stamp
    newer = [replace(pool[0], version="f" * 16), *pool[1:]]
    composer(decoder, codec, newer, tmp_path).make([WANTED])
    assert len(list(tmp_path.iterdir())) == 2  # of other sources it is another one
    barred = [*pool[:2], replace(pool[2], version="f" * 16)]
    composer(decoder, codec, barred, tmp_path).make([WANTED])
    assert len(list(tmp_path.iterdir())) == 2  # this one it may not use


def test_what_another_process_makes_meanwhile_is_taken(decoder, codec, pool, tmp_path, monkeypatch):
    [before] = composer(decoder, codec, pool, tmp_path).make([WANTED])
    has, asked = Composer.has, []
    monkeypatch.setattr(Composer, "has", lambda self, one: bool(asked.append(one) or len(asked) > 1) and has(self, one))
    assert composer(decoder, codec, pool, tmp_path).make([WANTED]) == [before]
    assert len(list(tmp_path.iterdir())) == 1


def test_one_example_is_too_few(decoder, codec, pool, tmp_path):
    task = replace(TASK, validation=TASK.validation[:1])
    with pytest.raises(ConfigError, match="'upper' has one validation example"):
        composer(decoder, codec, pool, tmp_path).make([Wanted("one", task, [{}], [{}])])


def test_an_empty_pool_is_told(decoder, codec, tmp_path):
    with pytest.raises(ConfigError, match="no adapter to compose from"):
        composer(decoder, codec, [], tmp_path)


class AtOnce:
    """A pool of no threads, in which the stand-in holds."""

    def __init__(self, count):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


@pytest.mark.parametrize("each", ["adapter", "target", "column"])
def test_nothing_on_two_devices_is_mixed(each, decoder, codec, pool, tmp_path, monkeypatch):
    config = replace(FEW, each=each)
    [here] = composer(decoder, codec, pool, tmp_path / "here", config).make([WANTED])
    monkeypatch.setattr("lorauter.compositions.make.ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(Decoder, "device", property(lambda _: THERE))
    with TwoPlaces():
        [there] = composer(decoder, codec, pool, tmp_path / "there", config).make([WANTED])
    assert there.provenance == here.provenance


def test_what_mixes_them_is_found(decoder, pool):
    with TwoPlaces():
        stack = AdapterStack(pool, decoder.shape, dtype=torch.float32, device=THERE)
        assert stack.spread["q_proj"].device == THERE
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(2, 3) @ stack.spread["q_proj"]
        with pytest.raises(RuntimeError, match="two devices"):
            stack.columns(torch.ones(2, len(stack.targets), 3))
        assert stack.columns(torch.ones(2, len(stack.targets), 3).to(THERE)).device == THERE
        assert stack.spread["q_proj"].cpu().device != THERE
