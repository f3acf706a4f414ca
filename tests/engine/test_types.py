import math

import pytest

from lorauter.engine import Chunk, Completion, EngineConfig, GenerationRequest, SamplingParams
from lorauter.errors import ConfigError, InvalidRequest


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("stop", ("a", "")),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("logit_bias", ((3, math.inf),)),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("bad_words", ("a", "")),
        ("bad_words", ("a",) * 1025),
        ("bad_words", ("a" * 5000,) * 4),
    ],
)
def test_sampling_params_out_of_range_are_refused(param, value):
    with pytest.raises(InvalidRequest, match=param) as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_must_be_finite(pool, weight):
    with pytest.raises(InvalidRequest, match="'patterns'") as caught:
        GenerationRequest((1,), ((pool.adapters["patterns"], weight),))
    assert caught.value.param == "adapters"


def test_an_empty_prompt_is_refused():
    with pytest.raises(InvalidRequest, match="empty") as caught:
        GenerationRequest(())
    assert caught.value.param == "prompt"


def test_sizes_must_be_positive():
    with pytest.raises(ConfigError, match=r"engine\.max_batch is 0") as caught:
        EngineConfig(max_batch=0)
    assert caught.value.setting == "engine.max_batch"


def test_a_completion_joins_its_chunks():
    chunks = [Chunk("a", (1,)), Chunk("", (2, 3)), Chunk("b", (4,), "stop")]
    assert Completion.of(chunks) == Completion("ab", (1, 2, 3, 4), "stop")


def test_chunks_that_follow_one_another_are_one():
    assert Chunk.joined([Chunk("a", (1,), cached_tokens=16), Chunk("b", (2, 3), "length")]) == Chunk(
        "ab", (1, 2, 3), "length", 16
    )


def test_each_of_several_answers_draws_from_its_own_numbers():
    request = GenerationRequest((1,), sampling=SamplingParams(temperature=1.0, seed=7))
    choices = request.choices(3)
    assert choices[0] == request
    assert len({choice.sampling.seed for choice in choices}) == 3
    assert choices == request.choices(4)[:3]
    assert {choice.sampling.seed for choice in GenerationRequest((1,)).choices(2)} == {None}
