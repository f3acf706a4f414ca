"""The decoder computes what transformers computes, and under adapters what PEFT computes."""

import pytest
import torch
import transformers

from lorauter import precision
from lorauter.engine.model import Decoder, Linear
from lorauter.engine.slots import AdapterSlots
from lorauter.errors import ConfigError

KINDS = ("llama", "llama-yarn-bias", "mistral", "qwen2", "qwen2-window", "qwen3")
LENGTHS = [(1, 9), (23, 40), (11, 12), (6, 31), (17, 30), (2, 20)]  # prompt and whole sequence
MIXTURES = [
    (),
    (("attention", 1.0),),
    (("attention", -0.7), ("mlp-rslora", 1.6), ("patterns", 1.1)),
    (("patterns", 1.0),),
    (("one-layer", 0.5), ("patterns", 0.3), ("attention", 0.2)),
    (("mlp-rslora", 0.25), ("mlp-rslora", 0.5)),
]


def reference(model, sequence):
    with torch.inference_mode():
        return model(torch.tensor([sequence.tokens])).logits[0]


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.fixture
def slots_for():
    def make(decoder, budget=1 << 24):
        return AdapterSlots(decoder.shape, budget_bytes=budget, max_rank=64, dtype=decoder.dtype, device=decoder.device)

    return make


@pytest.fixture(params=["kernels", "torch"])
def cpu_path(request, monkeypatch):
    """With the CPU's kernels, and without, as on a machine that has no compiler."""
    if request.param == "torch":
        monkeypatch.setattr("lorauter.engine.model.load_kernels", lambda dtype: None)
        monkeypatch.setattr("lorauter.engine.runner.load_kernels", lambda dtype: None)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("piece", [3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_base_logits_are_transformers(pool, forced, run_forced, kind, piece):
    sequences = forced(LENGTHS)
    for got, sequence in zip(run_forced(pool.decoder(kind), sequences, piece=piece), sequences, strict=True):
        assert_same(got, reference(pool.base(kind), sequence))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_batch_each_have_their_own_mixture(pool, forced, run_forced, slots_for, kind):
    decoder = pool.decoder(kind)
    sequences = forced(LENGTHS, [pool.mix(mixture) for mixture in MIXTURES])
    logits = run_forced(decoder, sequences, slots=slots_for(decoder))
    for got, sequence, mixture in zip(logits, sequences, MIXTURES, strict=True):
        assert_same(got, reference(pool.merged(kind, mixture), sequence))
        if mixture:  # the adapters matter, or nothing was tested
            assert (got - reference(pool.base(kind), sequence)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["attention", "mlp-rslora", "patterns", "one-layer"])
def test_one_adapter_is_pefts(pool, forced, run_forced, slots_for, name):
    decoder = pool.decoder("llama")
    sequences = forced([(9, 20)], [pool.mix(((name, 1.0),))])
    (got,) = run_forced(decoder, sequences, slots=slots_for(decoder))
    assert_same(got, reference(pool.peft("llama", name), sequences[0]))


def test_three_adapters_are_pefts_concatenation(pool, forced, run_forced, slots_for):
    mixture = (("attention", 0.6), ("mlp-rslora", -1.3), ("patterns", 2.0))
    names, weights = (list(column) for column in zip(*mixture, strict=True))
    model = pool.peft("llama", *names)
    # "cat" multiplies A by w_k s_k. Its own scaling is 1 unless the first adapter is rank-stabilised.
    model.add_weighted_adapter(names, weights, "mixture", combination_type="cat")
    model.set_adapter("mixture")
    decoder = pool.decoder("llama")
    sequences = forced([(9, 20)], [pool.mix(mixture)])
    (got,) = run_forced(decoder, sequences, slots=slots_for(decoder))
    assert_same(got, reference(model, sequences[0]))


@pytest.mark.usefixtures("cpu_path")
def test_an_adapter_leaves_no_trace_in_rows_without_it(pool, forced, run_forced, slots_for):
    """Not even where its numbers overflow: 0 times infinity is NaN."""
    decoder = pool.decoder("llama")
    huge = pool.adapters["attention"]
    huge = type(huge)("huge", "1", "", {where: (a.sign() * 1e38, b.sign()) for where, (a, b) in huge.tensors.items()})
    sequences = forced(LENGTHS[1:4], [((huge, 1.0),), (), pool.mix((("patterns", 1.0),))])
    ruined, plain, adapted = run_forced(decoder, sequences, slots=slots_for(decoder))
    assert not ruined.isfinite().all()
    assert_same(plain, reference(pool.base("llama"), sequences[1]))
    assert_same(adapted, reference(pool.merged("llama", (("patterns", 1.0),)), sequences[2]))


@pytest.mark.parametrize("packs", sorted({precision.PACKS, False}))
@pytest.mark.usefixtures("cpu_path")
def test_linear_layers_laid_out_for_the_machine_compute_the_same(monkeypatch, packs):
    monkeypatch.setattr(precision, "PACKS", packs)
    weights, bias = [torch.randn(n, 24).bfloat16() for n in (16, 8)], torch.randn(16).bfloat16()
    x = torch.randn(5, 24).bfloat16()
    expected = torch.nn.functional.linear(x, torch.cat(weights))
    torch.testing.assert_close(Linear(*weights)(x), expected)
    with_bias = Linear(weights[0], biases=[bias])(x)
    torch.testing.assert_close(with_bias, torch.nn.functional.linear(x, weights[0], bias))


@pytest.mark.parametrize(
    ("name", "extra", "needle"),
    [
        ("GPT2", {"n_embd": 8, "n_head": 1, "n_layer": 1}, "GPT2LMHeadModel"),
        ("Llama", {"hidden_act": "gelu"}, "gelu"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_other_models_are_refused(name, extra, needle):
    config = getattr(transformers, f"{name}Config")(vocab_size=8, **extra)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 8, 8
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    with pytest.raises(ConfigError, match=needle) as caught:
        Decoder(getattr(transformers, kind)(config))
    assert caught.value.setting == "base_model"
