import copy
import warnings

import pytest
import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model

from lorauter.adapters.weights import LoraWeights
from lorauter.errors import ContextLengthExceeded, InvalidRequest
from lorauter.evaluation.baselines import Arrow, TokenRouted
from lorauter.evaluation.baselines.routed_step import group_routers


def score(change: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (torch.linalg.svd(change)[2][0] @ x).abs()


def everyone(prompts, adapters) -> torch.Tensor:
    return torch.ones(len(prompts), len(adapters), dtype=torch.bool)


def test_a_prototype_is_the_top_right_singular_vector_of_the_change(adapters):
    for weights in adapters:
        for a, b in weights.tensors.values():
            (v,) = Arrow().rows(a, b)
            assert torch.allclose((v @ torch.linalg.svd(b @ a)[2][0]).abs(), torch.tensor(1.0), atol=1e-5)
            assert torch.allclose(v.norm(), torch.tensor(1.0))


def test_an_adapter_that_changes_nothing_has_the_score_0():
    assert not Arrow().rows(torch.randn(4, 9), torch.zeros(7, 4)).any()


@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_every_token_has_its_own_weights_in_every_layer_and_target(decoder, adapters, naive, top_k):
    routers = group_routers(decoder, adapters, Arrow(top_k))
    names = [weights.name for weights in adapters]
    allowed = torch.rand(6, len(names), generator=torch.Generator().manual_seed(0)) < 0.6
    allowed[0], allowed[1] = True, False
    checked = 0
    for router in routers.values():
        x = torch.randn(6, router.rows.shape[2])
        for layer in range(decoder.shape.layers):
            got = router.weights(layer, x, allowed)
            for i in range(len(x)):
                candidates = [name for name, may in zip(names, allowed[i], strict=True) if may]
                for t, target in enumerate(_targets(routers, router)):
                    wanted = naive.weights(layer, target, x[i], candidates, score, top_k)
                    expected = torch.tensor([float(wanted.get(name, 0)) for name in names])
                    assert torch.allclose(got[i, t], expected, atol=1e-5), (layer, target)
                    checked += len(wanted) > 1
    assert checked > 20 or top_k == 1


def _targets(routers, router) -> list[str]:
    groups = {"q_proj": ["q_proj", "k_proj", "v_proj"], "gate_proj": ["gate_proj", "up_proj"]}
    (first,) = [first for first, other in routers.items() if other is router]
    return groups.get(first, [first])


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_answers_are_those_of_the_definition(decoder, adapters, naive, prompts, max_batch):
    names = [weights.name for weights in adapters]
    allowed = everyone(prompts, adapters)
    allowed[1, 2], allowed[2, 0] = False, False
    got = TokenRouted(decoder, adapters, Arrow(2), max_batch=max_batch).generate(prompts, allowed, 6)
    for prompt, may, answer in zip(prompts, allowed, got, strict=True):
        candidates = [name for name, allow in zip(names, may, strict=True) if allow]
        assert answer == naive.continued(prompt, 6, candidates, score, 2)
    assert naive.used == set(names)
    assert got != [naive.continued(prompt, 6, [], score, 2) for prompt in prompts]


def test_what_is_not_allowed_never_contributes(decoder, adapters, prompts):
    wild = {where: (a, b * 1e3) for where, (a, b) in adapters[1].tensors.items()}
    loud = [adapters[0], LoraWeights("loud", "1", "", wild), *adapters[2:]]
    quiet = [adapters[0], *adapters[2:]]
    allowed = everyone(prompts, adapters)
    allowed[:, 1] = False
    got = TokenRouted(decoder, loud, Arrow()).generate(prompts, allowed, 8)
    assert got == TokenRouted(decoder, quiet, Arrow()).generate(prompts, everyone(prompts, quiet), 8)
    assert got != TokenRouted(decoder, loud, Arrow()).generate(prompts, everyone(prompts, loud), 8)


def test_a_prompt_that_may_use_none_is_answered_by_the_base_model(base, decoder, adapters, prompts):
    allowed = everyone(prompts, adapters)
    allowed[0] = False
    got = TokenRouted(decoder, adapters, Arrow()).generate(prompts, allowed, 8)
    ids = torch.tensor([prompts[0]])
    plain = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert got[0] == plain[0, len(prompts[0]) :].tolist()


def test_an_answer_ends_with_an_end_token_and_at_the_end_of_the_context(decoder, adapters, prompts):
    def generate(prompts, tokens, **options):
        return TokenRouted(decoder, adapters, Arrow(), **options).generate(prompts, everyone(prompts, adapters), tokens)

    whole = generate(prompts, 9, max_batch=2)
    end = whole[1][3]
    for answer, full in zip(generate(prompts, 9, eos_ids=[end], max_batch=2), whole, strict=True):
        assert answer == (full[: full.index(end) + 1] if end in full else full)
    assert [len(answer) for answer in generate([[1] * 46, [2] * 40], 5)] == [2, 5]


def test_the_decoder_stays_as_it_was(decoder, adapters):
    before = dict(vars(decoder))
    TokenRouted(decoder, adapters, Arrow())
    assert vars(decoder) == before


def test_bad_input_is_refused(decoder, adapters, prompts):
    routed = TokenRouted(decoder, adapters, Arrow())
    assert routed.generate([], torch.zeros(0, len(adapters), dtype=torch.bool), 3) == []
    for bad in (everyone(prompts, adapters)[1:], everyone(prompts, adapters).float()):
        with pytest.raises(InvalidRequest, match=r"of \(3, 5\)"):
            routed.generate(prompts, bad, 3)
    one = torch.ones(1, len(adapters), dtype=torch.bool)
    with pytest.raises(InvalidRequest):
        routed.generate([[]], one, 3)
    with pytest.raises(InvalidRequest):
        routed.generate([[1]], one, 0)
    with pytest.raises(ContextLengthExceeded):
        routed.generate([[1] * 48], one, 3)
    with pytest.raises(InvalidRequest):
        TokenRouted(decoder, [], Arrow())
    huge = LoraWeights("huge", "1", "", {w: (a, b * 1e38) for w, (a, b) in adapters[3].tensors.items()})
    with pytest.raises(InvalidRequest, match="not finite"):
        TokenRouted(decoder, [huge], Arrow()).generate([[1, 2]], one[:, :1], 3)


def test_a_uniform_pool_is_answered_as_by_peft(base, decoder, prompts, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses names that transformers has deprecated
        pool = []
        for i in range(4):
            torch.manual_seed(i)
            config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=2 + i, target_modules=["q_proj", "o_proj"])
            model = get_peft_model(copy.deepcopy(base), config)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    # Singular values far apart, so that PEFT's 15 steps of power iteration find the first one.
                    torch.nn.init.normal_(parameter, 0, 2.0)
                    parameter.data *= 0.1 ** torch.arange(4)
            model.save_pretrained(tmp_path / str(i), save_embedding_layers=False)
            pool.append(LoraWeights.load(tmp_path / str(i), name=str(i), version="1"))
        arrow = ArrowConfig(top_k=2, router_temperature=0.5, rng_seed=0)
        peft = create_arrow_model(copy.deepcopy(base), [str(tmp_path / str(i)) for i in range(4)], arrow).eval()
    routed = TokenRouted(decoder, pool, Arrow(2, 0.5))
    got = routed.generate(prompts, everyone(prompts, pool), 12)
    for prompt, answer in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        wanted = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert answer == wanted[0, len(prompt) :].tolist()
    assert got != TokenRouted(decoder, pool, Arrow(1)).generate(prompts, everyone(prompts, pool), 12)
