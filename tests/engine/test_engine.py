"""The engine: continuous batching, fair and exact."""

import asyncio
import itertools
from array import array
from dataclasses import replace

import pytest
from engine_requests import ENDLESS, LENGTHS, abreast, ask, collect, gather, prompts, together, until

from lorauter.engine import Chunk, Completion, GenerationRequest, SamplingParams
from lorauter.engine.text import TextCodec
from lorauter.errors import (
    InvalidRequest,
    LorauterError,
    Overloaded,
)

MIXTURES = [
    (),
    (("attention", 1.0),),
    (("attention", -0.7), ("mlp-rslora", 1.6), ("patterns", 1.1)),
    (("patterns", 1.0),),
    (("one-layer", 0.5), ("patterns", 0.3), ("attention", 0.2)),
    (),
    (("mlp-rslora", 0.7),),
    (("one-layer", 2.5),),
]

# --- the right tokens


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_answers_are_transformers(pool, start, kind):
    engine = start(pool.decoder(kind), max_batch=3, step_tokens=7)
    requests = [
        GenerationRequest(prompt, sampling=SamplingParams(max_tokens=n, ignore_eos=True))
        for prompt, (_, n) in zip(prompts(), LENGTHS, strict=True)
    ]
    for answer, request in zip(engine.generate(requests), requests, strict=True):
        assert answer.token_ids == pool.continued(kind, request.prompt, request.sampling.max_tokens)
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("budget", [1 << 20, 90_000])  # all adapters at once, and the largest mixture alone
def test_each_answer_is_that_of_its_own_mixture(pool, start, budget):
    engine = start(pool.decoder("llama"), max_batch=4, step_tokens=9, adapter_bytes=budget)
    requests, expected = [], []
    for copy in ("x", "y", "z"):  # twelve adapters, of four contents
        for prompt, (_, n), mixture in zip(prompts(), LENGTHS, MIXTURES, strict=True):
            adapters = tuple((replace(weights, name=weights.name + copy), w) for weights, w in pool.mix(mixture))
            requests.append(GenerationRequest(prompt, adapters, SamplingParams(max_tokens=n, ignore_eos=True)))
            expected.append(pool.continued("llama", prompt, n, mixture))
    assert [answer.token_ids for answer in engine.generate(requests)] == expected
    assert [answer.token_ids for answer in together(engine, *requests)] == expected
    assert engine.slots.used_bytes <= budget
    assert (len(engine.slots.resident) == 12) == (budget == 1 << 20)
    assert len(set(expected)) > len(LENGTHS) - 1


def test_a_seeded_sample_is_the_same_in_any_company(pool, start):
    engine = start(pool.decoder("llama"), max_batch=5, step_tokens=16)
    (prompt, *others) = prompts()

    def sampled(seed, prompt=prompt):
        return GenerationRequest(prompt, sampling=SamplingParams(24, 0.9, 0.95, seed=seed, ignore_eos=True))

    (alone,) = engine.generate([sampled(7)])
    crowd = [sampled(seed, prompt) for seed, prompt in enumerate(others)]
    answers = engine.generate([*crowd[:3], sampled(7), sampled(8), *crowd[3:], sampled(7)])
    assert answers[3] == answers[-1] == alone
    assert answers[4] != alone
    free = engine.generate([sampled(None)] * 2)
    assert free[0] != free[1]


@pytest.mark.parametrize(
    ("prompt", "sampling", "text", "tokens", "reason"),
    [
        ("a", {"max_tokens": 3}, "bcd", "bcd", "length"),
        ("a", {"max_tokens": 1}, "b", "b", "length"),
        ("a", {"max_tokens": 9, "stop": ("fg", "xyz")}, "bcde", "bcdefg", "stop"),
        ("a", {"max_tokens": 6, "stop": ("fg",)}, "bcde", "bcdefg", "stop"),
        ("a", {"max_tokens": 5, "stop": ("fg",)}, "bcdef", "bcdef", "length"),
        ("k", {"max_tokens": 9}, "lm", "lmn", "stop"),  # "n" is an end-of-text token here
        ("k", {"max_tokens": 9, "stop": ("zzzz",)}, "lm", "lmn", "stop"),
        ("k", {"max_tokens": 4, "ignore_eos": True}, "lmno", "lmno", "length"),
        ("k", {"max_tokens": 9, "min_tokens": 2}, "lm", "lmn", "stop"),
        (
            "k",
            {"max_tokens": 9, "min_tokens": 3, "allowed_token_ids": range(97, 123)},
            "lmabcdefg",
            "lmabcdefg",
            "length",
        ),
        ("a", {"max_tokens": 9, "stop": ("bc", "fg"), "min_tokens": 4}, "bcde", "bcdefg", "stop"),
        ("a", {"max_tokens": 9, "stop_token_ids": (102,)}, "bcde", "bcdef", "stop"),
        ("k", {"max_tokens": 9, "stop_token_ids": (112,), "ignore_eos": True}, "lmno", "lmnop", "stop"),
        ("a", {"max_tokens": 9, "stop": ("fg",), "include_stop_str_in_output": True}, "bcdefg", "bcdefg", "stop"),
        ("k", {"max_tokens": 9, "include_stop_str_in_output": True}, "lmn", "lmn", "stop"),
        ("a", {"max_tokens": 4, "bad_words": ("cd",), "allowed_token_ids": range(97, 123)}, "bcab", "bcab", "length"),
        (
            "a",
            {"max_tokens": 4, "bad_words": ((99,),), "allowed_token_ids": (98, 99, 120, 121)},
            "bbbb",
            "bbbb",
            "length",
        ),
        ("a" * 28, {"max_tokens": 9}, "bcd", "bcd", "length"),  # 31 positions and one token after them
        ("a" * 31, {"max_tokens": 9}, "b", "b", "length"),
    ],
)
def test_where_an_answer_ends(start, counting, tokenizer, prompt, sampling, text, tokens, reason):
    config = {"step_tokens": 3, "max_model_len": 32 if len(prompt) == 31 else 31}
    engine = start(counting, TextCodec(tokenizer, eos_ids=[ord("n")]), **config)
    expected = Completion(text, tuple(tokens.encode()), reason)
    assert engine.generate([ask(prompt, **sampling)]) == [expected]
    assert together(engine, ask(prompt, **sampling)) == [expected]


@pytest.mark.parametrize(
    ("sampling", "string"),
    [({"stop": ("bc", "fg"), "min_tokens": 4}, "fg"), ({"stop": ("xy",), "stop_token_ids": (102,)}, None), ({}, None)],
)
def test_the_end_tells_which_stop_string_it_was(start, counting, sampling, string):
    async def run():
        return [chunk async for chunk in start(counting).stream(ask("a", max_tokens=9, **sampling))]

    *before, last = asyncio.run(run())
    assert last.stop_string == string
    assert all(chunk.stop_string is None for chunk in before)


@pytest.mark.parametrize("param", ["stop_token_ids", "allowed_token_ids", "bad_words"])
def test_tokens_that_the_model_has_not_are_refused(start, counting, param):
    value = ((5, 400),) if param == "bad_words" else (5, 400)
    with pytest.raises(InvalidRequest, match=r"400") as caught:
        start(counting).generate([ask("a", **{param: value})])
    assert caught.value.param == param


def test_half_a_character_is_no_bad_word(start, counting):
    with pytest.raises(InvalidRequest, match="half a character"):
        start(counting).generate([ask("a", bad_words=("\ud800",))])


def test_bad_words_that_would_take_much_room_are_refused(start, counting):
    for words in ([(97,)] * 4 + [(97,) * 70_000], ["a b"] * 1000 + ["a" * 200]):
        with pytest.raises(InvalidRequest, match=r"bad_words come to \d+ of up to \d+ tokens; give fewer") as caught:
            start(counting).generate([ask("a", bad_words=tuple(words))])
        assert caught.value.param == "bad_words"
    assert start(counting).generate([ask("a", max_tokens=2, bad_words=("xy",) * 1000)])[0].text == "bc"


def test_a_prompt_is_a_tuple_or_an_array_which_stays_as_it_is(start, counting):
    engine, prompt = start(counting), array("i", b"a\0\0\0")
    resumed = GenerationRequest(prompt, sampling=SamplingParams(max_tokens=4), generated=(98, 99))
    [one, other] = engine.generate([replace(resumed, generated=()), resumed])
    assert (one.text, other.text, list(prompt)) == ("bcde", "de", [97])
    assert engine.generate([replace(resumed, prompt=array("q", prompt))]) == [other]
    for odd in (array("i", [97, 400]), array("i", [-1]), array("q", [97, 1 << 32])):
        with pytest.raises(InvalidRequest, match="token ids of prompt") as caught:
            engine.generate([GenerationRequest(odd)])
        assert caught.value.param == "prompt"


def test_the_choices_of_a_prompt_differ_and_share_its_blocks(pool, start):
    engine = start(pool.decoder("llama"), max_batch=4)
    prompt = tuple(range(65, 65 + 48))
    several = GenerationRequest(prompt, sampling=SamplingParams(12, 1.0, seed=5, ignore_eos=True)).choices(4)
    answers = engine.generate(several)
    assert engine.scheduler.reused == 3 * 32  # of 48 tokens the last one's block is each one's own
    assert len({answer.token_ids for answer in answers}) == 4
    assert answers == [engine.generate([choice])[0] for choice in several]


# --- requests beside each other


def test_requests_run_side_by_side(start, counting, paced):
    decoder = paced(counting)
    engine = start(decoder)

    async def run():
        streams = [engine.stream(ask(text, max_tokens=50)) for text in "ab"]
        firsts = asyncio.gather(*(anext(stream) for stream in streams))
        await until(lambda: sum(engine.load) == 2)
        decoder.permits.release(5)
        chunks = await firsts
        assert [chunk.finish_reason for chunk in chunks] == [None, None]
        assert [chunk.text[0] for chunk in chunks] == ["b", "c"]
        assert engine.load == (2, 0)
        for stream in streams:
            await stream.aclose()

    asyncio.run(run())


def test_a_long_prompt_does_not_stall_who_is_answering(start, counting, paced):
    decoder = paced(counting)
    engine = start(decoder, max_batch=2, step_tokens=10)
    short, long = abreast(engine, decoder, ask("a", max_tokens=30), ask("b" * 95, max_tokens=2))
    assert (len(short.token_ids), len(long.token_ids)) == (30, 2)
    assert max(prefilled for _, prefilled in counting.steps) == 10
    assert [decoding for decoding, prefilled in counting.steps[1:] if prefilled] in ([1] * 9, [1] * 10)


def test_generate_waits_for_the_queue_and_keeps_the_order(start, counting):
    engine = start(counting, max_batch=3, max_queue=2)
    requests = [ask(chr(97 + i), max_tokens=1 + i % 4) for i in range(20)]
    assert [answer.text[0] for answer in engine.generate(requests)] == [chr(98 + i) for i in range(20)]
    assert max(decoding for decoding, _ in counting.steps) <= 3
    assert engine.generate([]) == []


def test_a_full_queue_refuses(start, counting, paced):
    decoder = paced(counting)
    engine = start(decoder, max_batch=1, max_queue=2)

    async def run():
        accepted = [asyncio.create_task(collect(engine, ask("a", max_tokens=3)))]
        await until(lambda: decoder.arrived == 1)
        accepted += [asyncio.create_task(collect(engine, ask("a", max_tokens=3))) for _ in range(2)]
        await until(lambda: engine.load == (1, 2))
        with pytest.raises(Overloaded, match="2 wait") as caught:
            await collect(engine, ask("a"))
        assert caught.value.retry_after_s > 0
        decoder.permits.release(100)
        return await gather(*accepted)

    assert [answer.text for answer in asyncio.run(run())] == ["bcd"] * 3


def test_an_answer_tells_how_long_it_waited_for_its_row(start, counting, paced):
    decoder = paced(counting)
    engine = start(decoder, max_batch=1)

    async def first_chunk(text):
        return await anext(engine.stream(ask(text, max_tokens=2)))

    async def run():
        first = asyncio.create_task(first_chunk("a"))
        await until(lambda: decoder.arrived == 1)
        second = asyncio.create_task(first_chunk("b"))
        await until(lambda: engine.load == (1, 1))
        await asyncio.sleep(0.2)
        decoder.permits.release(100)
        return await asyncio.gather(first, second)

    first, second = asyncio.run(run())
    assert first.waited_s < 0.1
    assert 0.2 <= second.waited_s < 10


def test_closing_a_stream_frees_its_row_and_its_place_in_the_queue(start, counting, made):
    engine = start(counting, max_batch=1, max_queue=1, max_model_len=1 << 20, adapter_bytes=256)
    first, second = (made(counting.shape, name, q_proj=2) for name in "ab")  # each fills the budget

    async def run():
        running = engine.stream(ask("a", ((first, 1.0),), **ENDLESS))
        await anext(running)
        waiting = asyncio.create_task(collect(engine, ask("b", **ENDLESS)))
        await until(lambda: engine.load == (1, 1))
        waiting.cancel()
        await until(lambda: engine.load == (1, 0))
        await running.aclose()
        return await gather(waiting, collect(engine, ask("c", ((second, 1.0),), max_tokens=2)))

    cancelled, answer = asyncio.run(run())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert answer.text == "de"
    asyncio.run(until(lambda: engine.load == (0, 0)))
    assert engine.slots.resident == [second.key]


def test_a_stream_whose_event_loop_is_gone_frees_its_row(start, counting):
    engine = start(counting, max_batch=1, max_model_len=1 << 20)
    loop = asyncio.new_event_loop()
    stream = engine.stream(ask("a", **ENDLESS))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert together(engine, ask("c", max_tokens=2))[0].text == "de"


def test_a_stream_begins_at_once_and_gathers_what_comes_within_its_gap(start, counting):
    engine = start(counting, max_model_len=1 << 20)

    async def run():
        loop = asyncio.get_running_loop()
        began, times, taken, chunks = loop.time(), [], [], []

        def gap():  # is asked whenever something is taken
            taken.append(loop.time())
            return 0.05

        async for chunk in engine.stream(ask("a", max_tokens=3000, ignore_eos=True), gap=gap):
            times.append(loop.time() - began)
            chunks.append(chunk)
        return times, taken, chunks

    times, taken, chunks = asyncio.run(run())
    assert sum(len(chunk.token_ids) for chunk in chunks) == 3000
    assert chunks[-1].finish_reason == "length"
    assert times[0] < 0.05
    assert len(chunks) <= times[-1] / 0.05 + 2
    gaps = [later - sooner for sooner, later in itertools.pairwise(taken)]
    assert len(gaps) > 1
    assert all(gap >= 0.049 for gap in gaps[:-1])


def test_tokens_alone_come_as_they_would_with_text(start, counting):
    engine = start(counting)

    async def run(**sampling):
        return [chunk async for chunk in engine.stream(ask("a", max_tokens=6, **sampling), gap=lambda: 0.01)]

    worded, bare = asyncio.run(run()), asyncio.run(run(detokenize=False))
    assert Chunk.joined(bare) == replace(Chunk.joined(worded), text="")
    assert bare[0].waited_s > 0
    [whole] = together(engine, ask("a", max_tokens=6, detokenize=False))
    assert (whole.text, whole.token_ids) == ("", Chunk.joined(worded).token_ids)
    for asked in ({"stop": ("z",)}, {"logprobs": 0}, {"prompt_logprobs": 0}):
        with pytest.raises(InvalidRequest, match="need detokenize"):
            SamplingParams(detokenize=False, **asked)


def test_what_is_wanted_whole_is_one_chunk_where_it_ends_soon(start, counting):
    engine = start(counting, max_model_len=1 << 20)

    async def run(keep_s, **sampling):
        asked = ask("a", **sampling)
        return [chunk async for chunk in engine.stream(asked, gap=lambda: 60.0, keep_s=keep_s)]

    for bare in ({}, {"detokenize": False}):
        [short] = asyncio.run(run(60.0, max_tokens=200, ignore_eos=True, **bare))
        assert (len(short.token_ids), short.finish_reason) == (200, "length")
        assert short.kept_s > 0
        first, rest = asyncio.run(run(0.02, max_tokens=3000, ignore_eos=True, **bare))
        assert first.kept_s > 0 == rest.kept_s
        assert len(first.token_ids) > 1
        assert len(first.token_ids + rest.token_ids) == 3000


def test_the_end_waits_for_no_gap(start, counting):
    engine = start(counting)

    async def run():
        return [chunk async for chunk in engine.stream(ask("a", max_tokens=6), gap=lambda: 60.0)]

    chunks = asyncio.run(run())
    assert len(chunks) <= 2  # one, where all was there before the loop looked
    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == ("bcdefg", "length")
    (error,) = together(engine, ask("q!", max_tokens=9))
    assert isinstance(error, LorauterError)
