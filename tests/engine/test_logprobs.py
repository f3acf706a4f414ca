"""Tokens' probabilities against transformers', in any company, of answers and of prompts."""

import copy
import random

import pytest
import torch

from lorauter.engine import GenerationRequest, SamplingParams
from lorauter.engine import core as core_module
from lorauter.engine import scheduler as scheduler_module
from lorauter.engine.logprobs import ranked
from lorauter.engine.model import Decoder
from lorauter.engine.runner import Runner
from lorauter.errors import InvalidRequest

MIXTURES = [(), (("attention", 1.0),), (("patterns", 1.0), ("attention", -0.7)), (("mlp-rslora", 0.7),)]


class AheadRunner(Runner):
    overlaps = True


def wanted(pool, n=12, **options):
    """Requests with their mixtures' names."""
    draw = random.Random(n)
    asked = []
    for i in range(n):
        prompt = tuple(draw.randrange(256) for _ in range(draw.choice([1, 2, 7, 40, 60])))
        mixture = MIXTURES[i % len(MIXTURES)]
        sampling = SamplingParams(draw.choice([1, 3, 9]), ignore_eos=True, **options)
        asked.append((GenerationRequest(prompt, pool.mix(mixture), sampling), mixture))
    return asked


def by_transformers(pool, tokens, mixture):
    """(positions, vocabulary)"""
    with torch.no_grad():
        return pool.merged("llama", mixture)(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def check(told, token, expected, most, tolerance=1e-4):
    """One token's logarithms against all (vocabulary,) that transformers has."""
    assert told.own.token_id == token
    assert told.own.logprob == pytest.approx(float(expected[token]), abs=tolerance)
    assert expected[token] <= expected.sort(descending=True).values[told.own.rank - 1] + 2 * tolerance
    assert [one.rank for one in told.top] == list(range(1, most + 1))
    assert [one.logprob for one in told.top] == pytest.approx(expected.topk(most).values.tolist(), abs=tolerance)
    for one in told.top:
        assert one.logprob == pytest.approx(float(expected[one.token_id]), abs=tolerance)
        assert one.token == (bytes([one.token_id]) if one.token_id < 256 else one.token)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("cache", [None, 14])  # so few blocks that rows are computed anew
def test_logprobs_are_transformers_with_and_without_adapters(pool, start, monkeypatch, ahead, cache):
    if ahead:
        monkeypatch.setattr(core_module, "Runner", AheadRunner)
    decoder = pool.decoder("llama")
    config = {} if cache is None else {"cache_bytes": cache * decoder.block_bytes()}
    engine = start(decoder, max_batch=5, step_tokens=16, **config)
    asked = wanted(pool, logprobs=3, prompt_logprobs=2) + wanted(pool, 8, logprobs=0) + wanted(pool, 7)
    for answer, (request, mixture) in zip(engine.generate([r for r, _ in asked]), asked, strict=True):
        prompt, sampling = request.prompt, request.sampling
        expected = by_transformers(pool, [*prompt, *answer.token_ids], mixture)
        assert len(answer.logprobs) == (0 if sampling.logprobs is None else len(answer.token_ids))
        for i, told in enumerate(answer.logprobs):
            check(told, answer.token_ids[i], expected[len(prompt) - 1 + i], sampling.logprobs)
        if sampling.prompt_logprobs is None:
            assert answer.prompt_logprobs == ()
        else:
            assert answer.prompt_logprobs[0] is None
            assert len(answer.prompt_logprobs) == len(prompt)
            for i, told in enumerate(answer.prompt_logprobs[1:]):
                check(told, prompt[i + 1], expected[i], 2)


def test_in_bfloat16_they_are_as_near_to_float32_as_transformers_are(pool, start):
    """Both round logits to eight bits, so that neither is nearer to the other than to what is right."""
    half = copy.deepcopy(pool.base("llama")).bfloat16()
    whole = copy.deepcopy(half).float()
    engine = start(Decoder(half), max_batch=8)
    prompts = [request.prompt for request, _ in wanted(pool, 20)]
    sampling = SamplingParams(6, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    ours, theirs = [], []
    for prompt, answer in zip(
        prompts, engine.generate([GenerationRequest(p, sampling=sampling) for p in prompts]), strict=True
    ):
        tokens = [*prompt, *answer.token_ids]
        with torch.no_grad():
            right, rounded = (
                model(torch.tensor([tokens])).logits[0].float().log_softmax(-1) for model in (whole, half)
            )
        for i, told in enumerate([*answer.prompt_logprobs[1:], *answer.logprobs]):
            ours.append(abs(told.own.logprob - float(right[i, tokens[i + 1]])))
            theirs.append(abs(float(rounded[i, tokens[i + 1]] - right[i, tokens[i + 1]])))
    assert sum(ours) / len(ours) < 1.1 * sum(theirs) / len(theirs)


def test_who_asks_for_probabilities_gets_the_answer_that_it_would_get_without(pool, start):
    engine = start(pool.decoder("llama"), max_batch=4)
    plain = [request for request, _ in wanted(pool, temperature=0.8, seed=3)]
    telling = [request for request, _ in wanted(pool, temperature=0.8, seed=3, logprobs=5, prompt_logprobs=0)]
    assert [a.token_ids for a in engine.generate(telling)] == [a.token_ids for a in engine.generate(plain)]


def test_they_are_the_models_own_whatever_changes_the_choice(pool, start):
    engine = start(pool.decoder("llama"))
    prompt = (65, 66, 67)
    changes = {"logit_bias": ((7, 50.0),), "temperature": 0.5, "allowed_token_ids": (7, 9), "seed": 1}
    [answer] = engine.generate([GenerationRequest(prompt, sampling=SamplingParams(2, logprobs=4, **changes))])
    expected = by_transformers(pool, [*prompt, *answer.token_ids], ())
    for i, told in enumerate(answer.logprobs):
        check(told, 7, expected[2 + i], 4)
        assert told.own.rank > 1


def test_a_long_prompt_is_told_in_pieces(pool, start, monkeypatch):
    monkeypatch.setattr(scheduler_module, "_MOST_TARGETS", 6)
    engine = start(pool.decoder("llama"), max_batch=3)
    prompts = [tuple(range(i, i + 50)) for i in range(4)]
    answers = engine.generate([GenerationRequest(p, sampling=SamplingParams(2, prompt_logprobs=1)) for p in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = by_transformers(pool, prompt, ())
        for i, told in enumerate(answer.prompt_logprobs[1:]):
            check(told, prompt[i + 1], expected[i], 1)


def test_only_the_first_of_several_answers_tells_of_the_prompt(pool, start):
    engine = start(pool.decoder("llama"))
    request = GenerationRequest((1, 2, 3), sampling=SamplingParams(2, 1.0, logprobs=1, prompt_logprobs=1))
    answers = engine.generate(request.choices(3))
    assert [len(answer.prompt_logprobs) for answer in answers] == [3, 0, 0]
    assert [len(answer.logprobs) for answer in answers] == [2, 2, 2]


@pytest.mark.parametrize("param", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 21])
def test_how_many_is_bounded(param, value):
    with pytest.raises(InvalidRequest, match="20") as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param


def test_ranks_count_from_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert [int(ranked(logits, torch.tensor([token]), 0)[0, 1]) for token in range(4)] == [4, 1, 3, 2]
