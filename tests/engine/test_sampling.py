import pytest
import torch

from lorauter.engine.plan import NOT_FINITE, RowStart
from lorauter.engine.sampling import Sampler, sample, uniform
from lorauter.engine.types import SamplingParams

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9, -4.0, 1.9])


def shares(n=4000, **sampling):
    """How often each token comes, over evenly spread uniform numbers."""
    uniforms = [(i + 0.5) / n for i in range(n)]
    tokens = sample(LOGITS.repeat(n, 1), [SamplingParams(**sampling)] * n, uniforms)
    return tokens.bincount(minlength=len(LOGITS)) / n


def by_the_book(temperature, top_p=1.0, top_k=0, min_p=0.0):
    """min_p, then top_k, then nucleus sampling (arXiv 1904.09751) on what is left."""
    chances = (LOGITS.double() / temperature).softmax(-1)
    chances[chances < min_p * chances.max()] = 0
    total, spent = float(chances.sum()), 0.0
    for place, token in enumerate(chances.argsort(descending=True)):
        if spent >= top_p * total or (top_k and place >= top_k):
            chances[token] = 0
        spent += float(chances[token])
    return (chances / chances.sum()).float()


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.2])
@pytest.mark.parametrize("top_k", [0, 1, 3, 10**30])
@pytest.mark.parametrize("min_p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_tokens_come_as_often_as_they_should(temperature, top_p, top_k, min_p):
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    torch.testing.assert_close(shares(**sampling), by_the_book(**sampling), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0, 1.0), (0, 0.1), (1e-50, 1.0), (1e-6, 1.0), (1, 1e-50), (1, 1e-9)]
)
def test_at_the_limits_the_likeliest_token_comes(temperature, top_p):
    assert shares(50, temperature=temperature, top_p=top_p).tolist() == [0, 1, 0, 0, 0, 0, 0]


def test_no_token_that_may_not_come_comes_at_the_ends():
    ends = [0.0, 1 - 2**-24]
    nucleus = [SamplingParams(temperature=1.0, top_p=0.6)] * 2
    assert sample(LOGITS.repeat(2, 1), nucleus, ends).tolist() == [1, 6]
    impossible = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for top_p in (1.0, 0.999999):
        assert sample(impossible, [SamplingParams(temperature=1.0, top_p=top_p)], ends[1:]).tolist() == [2]


def test_a_rows_choice_depends_on_nothing_else_in_the_batch():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 50, generator=draw) * 3
    sampling = [
        SamplingParams(temperature=(0, 0.5, 1.5)[i % 3], top_p=(1.0, 0.7)[i % 2], top_k=(0, 5)[i // 4 % 2])
        for i in range(32)
    ]
    uniforms = torch.rand(32, generator=draw).tolist()
    together = sample(logits, sampling, uniforms).tolist()
    alone = [sample(logits[i : i + 1], [sampling[i]], [uniforms[i]]).item() for i in range(32)]
    assert together == alone
    assert together[::3] == logits.argmax(-1).tolist()[::3]
    assert together != logits.argmax(-1).tolist()


def test_the_numbers_of_a_seed_are_spread_and_depend_on_the_place_alone():
    numbers = [uniform(seed, index) for seed in (-3, 0, 1, 1 << 70) for index in range(2000)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) > 0.999 * len(numbers)
    counts = torch.histc(torch.tensor(numbers), 10, 0, 1)
    assert (counts - 800).abs().max() < 120
    assert uniform(7, 1234) == uniform(7, 1234) != uniform(8, 1234)


# --- rows


def rows_of(*sampling, tokens=(), prompt=0, ends=()):
    sampler = Sampler(len(sampling), len(LOGITS), torch.device("cpu"))
    for row, params in enumerate(sampling):
        sampler.start(RowStart(row, (), params, row, prompt, tokens, ends))
    return sampler


def test_rows_that_take_the_likeliest_are_left_to_the_step():
    sampler = rows_of(SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(presence_penalty=1.0))
    assert sampler.sampled([0, 1, 2, 0]) == [1, 2]
    sampler.start(RowStart(1, (), SamplingParams(), 0, 0, ()))
    assert sampler.sampled([0, 1, 2]) == [2]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"presence_penalty": 0.05}, [1, 1, 1]),
        ({"presence_penalty": 0.2}, [6, 1, 1]),  # the answer has 1 already; then both, and 1 is ahead again
        ({"frequency_penalty": 0.2}, [6, 1, 6]),
        ({"repetition_penalty": 1.1}, [6, 1, 1]),
        ({"logit_bias": ((5, 9.0),)}, [5, 5, 5]),
        ({"logit_bias": ((5, 9.0), (5, -9.0))}, [1, 1, 1]),  # the last of equals counts
    ],
)
def test_penalties_count_what_the_answer_has(params, expected):
    sampler = rows_of(SamplingParams(**params), tokens=(3, 1), prompt=1)
    chosen = [int(sampler.choose(LOGITS[None], [0], [2 + i])[0]) for i in range(3)]
    assert chosen == expected


def test_the_repetition_penalty_counts_the_prompt_and_the_others_do_not():
    for params, expected in (({"repetition_penalty": 2.0}, 6), ({"frequency_penalty": 2.0}, 1)):
        sampler = rows_of(SamplingParams(**params), tokens=(1, 2), prompt=2)
        assert int(sampler.choose(LOGITS[None], [0], [2])[0]) == expected


def test_a_row_begun_anew_has_nothing_of_the_one_before():
    sampler = rows_of(SamplingParams(frequency_penalty=2.0), SamplingParams(presence_penalty=0.1), tokens=(1,) * 4)
    sampler.start(RowStart(0, (), SamplingParams(frequency_penalty=0.01), 0, 0, ()))
    assert sampler.choose(LOGITS.repeat(2, 1), [0, 1], [0, 4]).tolist() == [1, 1]


def test_a_row_that_is_not_finite_is_told_and_harms_no_other():
    sampler = rows_of(*[SamplingParams(temperature=1.0, top_p=0.5)] * 3)
    logits = LOGITS.repeat(3, 1)
    logits[0, 3], logits[2, 0] = torch.nan, torch.inf
    assert sampler.choose(logits, [0, 1, 2], [0, 0, 0]).tolist()[::2] == [NOT_FINITE] * 2
    alone = sampler.choose(LOGITS[None], [1], [0])
    assert sampler.choose(logits, [0, 1, 2], [0, 0, 0])[1] == alone[0] >= 0


def chosen(sampler, prompt, n, row=0):
    return [int(sampler.choose(LOGITS[None], [row], [prompt + i])[0]) for i in range(n)]


# The likeliest first: 1, 6, 3, 4, 0, 2, 5.
@pytest.mark.parametrize(
    ("params", "ends", "expected"),
    [
        ({"min_tokens": 2}, (1,), [6, 6, 1, 1]),
        ({"min_tokens": 2}, (1, 6), [3, 3, 1, 1]),
        ({"min_tokens": 1}, range(7), [1, 1, 1, 1]),  # all of them: the likeliest all the same
        ({"allowed_token_ids": (5, 2)}, (), [2] * 4),
        ({"allowed_token_ids": (5, 2), "min_tokens": 2}, (2,), [5, 5, 2, 2]),
        ({"allowed_token_ids": (5, 2), "logit_bias": ((5, 9.0), (3, 90.0))}, (), [5] * 4),
        ({"bad_words": ((1,),)}, (), [6] * 4),
        ({"bad_words": ((1,), (6, 6))}, (), [6, 3, 6, 3]),
        ({"bad_words": ((1, 1, 1), (6, 1))}, (), [1, 1, 6, 6]),
        ({"bad_words": ((1, 1),), "temperature": 1e-9}, (), [1, 6, 1, 6]),
    ],
)
def test_tokens_that_may_not_come(params, ends, expected):
    assert chosen(rows_of(SamplingParams(**params), tokens=(1, 1), prompt=2, ends=ends), 2, 4) == expected


def test_bad_words_count_what_an_answer_that_goes_on_has():
    """And not the prompt."""
    for tokens, expected in (((1, 6), 3), ((6, 1), 6), ((1, 1), 6)):
        sampler = rows_of(SamplingParams(bad_words=((1,), (6, 6))), tokens=(6, *tokens), prompt=1)
        assert chosen(sampler, 3, 1) == [expected]
    assert chosen(rows_of(SamplingParams(bad_words=((1, 1),)), tokens=(1,), prompt=1), 1, 1) == [1]


def test_what_one_row_may_not_have_others_may():
    sampler = rows_of(
        SamplingParams(bad_words=((1,),)), SamplingParams(presence_penalty=0.01), SamplingParams(allowed_token_ids=(4,))
    )
    assert sampler.choose(LOGITS.repeat(3, 1), [0, 1, 2], [0, 0, 0]).tolist() == [6, 1, 4]
    assert sampler.choose(LOGITS.repeat(2, 1), [2, 1], [1, 1]).tolist() == [4, 1]
    sampler.start(RowStart(0, (), SamplingParams(presence_penalty=0.01), 0, 0, ()))
    assert sampler.choose(LOGITS[None], [0], [0]).tolist() == [1]
