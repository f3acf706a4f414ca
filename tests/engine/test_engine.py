"""The scheduler: continuous batching, fair and exact, and nobody's trouble is anybody else's."""

import asyncio
import gc
import itertools
import time
import weakref
from dataclasses import replace

import pytest
import torch

from lorauter.engine import Completion, EngineConfig, GenerationRequest, MultiLoraEngine, SamplingParams
from lorauter.engine.text import TextCodec, TextStream
from lorauter.errors import (
    AdapterRejected,
    AdapterUnavailable,
    ContextLengthExceeded,
    InvalidRequest,
    LorauterError,
    Overloaded,
)

LENGTHS = [(3, 30), (40, 5), (17, 20), (1, 25), (9, 1), (30, 12), (5, 18), (23, 9)]  # prompt, answer
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


def ask(text, adapters=(), **sampling):
    return GenerationRequest(tuple(text.encode("latin-1")), adapters, SamplingParams(**sampling))


def prompts():
    draw = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(256, (prompt,), generator=draw).tolist()) for prompt, _ in LENGTHS]


async def collect(engine, request):
    return Completion.of([chunk async for chunk in engine.stream(request)])


async def gather(*awaitables):
    """Their results, or what they raised."""
    return await asyncio.gather(*awaitables, return_exceptions=True)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def together(engine, *requests):
    async def run():
        return await gather(*(collect(engine, request) for request in requests))

    return asyncio.run(run())


def abreast(engine, decoder, *requests):
    """Their outcomes, when all are there before the (paced) decoder finishes a step."""

    async def run():
        tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
        await until(lambda: sum(engine.load) == len(tasks))
        decoder.permits.release(1000)
        return await gather(*tasks)

    return asyncio.run(run())


@pytest.fixture
def huge(pool):
    """An adapter of finite numbers under which the model's are not."""
    weights = pool.adapters["attention"]
    tensors = {where: (a.sign() * 1e38, b.sign()) for where, (a, b) in weights.tensors.items()}
    return replace(weights, name="huge", tensors=tensors)


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


@pytest.mark.parametrize("param", ["stop_token_ids", "allowed_token_ids", "bad_words"])
def test_tokens_that_the_model_has_not_are_refused(start, counting, param):
    value = ((5, 400),) if param == "bad_words" else (5, 400)
    with pytest.raises(InvalidRequest, match=r"400") as caught:
        start(counting).generate([ask("a", **{param: value})])
    assert caught.value.param == param


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


ENDLESS = {"max_tokens": 1 << 20, "ignore_eos": True}


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
        began, times, chunks = loop.time(), [], []
        async for chunk in engine.stream(ask("a", max_tokens=3000, ignore_eos=True), gap=lambda: 0.05):
            times.append(loop.time() - began)
            chunks.append(chunk)
        return times, chunks

    times, chunks = asyncio.run(run())
    assert sum(len(chunk.token_ids) for chunk in chunks) == 3000
    assert chunks[-1].finish_reason == "length"
    assert times[0] < 0.05
    assert len(chunks) <= times[-1] / 0.05 + 2
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert all(gap >= 0.049 for gap in gaps[:-1])


def test_the_end_waits_for_no_gap(start, counting):
    engine = start(counting)

    async def run():
        return [chunk async for chunk in engine.stream(ask("a", max_tokens=6), gap=lambda: 60.0)]

    chunks = asyncio.run(run())
    assert len(chunks) <= 2  # one, where all was there before the loop looked
    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == ("bcdefg", "length")
    (error,) = together(engine, ask("q!", max_tokens=9))
    assert isinstance(error, LorauterError)


# --- trouble


def test_a_prompt_must_leave_room_for_an_answer(start, counting):
    engine = start(counting, max_model_len=8)
    for run in (lambda request: engine.generate([request]), lambda request: asyncio.run(collect(engine, request))):
        with pytest.raises(ContextLengthExceeded) as caught:
            run(ask("a" * 8))
        assert (caught.value.prompt_tokens, caught.value.max_tokens) == (8, 8)


def test_the_models_own_limit_bounds_the_context(pool, start):
    assert start(pool.decoder("llama"), max_model_len=1000).max_model_len == 96


@pytest.mark.parametrize("token", [-1, 259])
def test_a_token_that_the_model_does_not_know_is_the_callers_error(pool, start, token):
    engine = start(pool.decoder("llama"))
    with pytest.raises(InvalidRequest, match=str(token)) as caught:
        engine.generate([GenerationRequest((1, token))])
    assert caught.value.param == "prompt"


def test_adapters_that_cannot_be_served_are_refused_by_name(start, counting, made):
    engine = start(counting, max_rank=4, adapter_bytes=128)
    deep = made(replace(counting.shape, layers=2), "deep", q_proj=1)
    wide, large = made(counting.shape, "wide", q_proj=5), made(counting.shape, "large", q_proj=4)
    outcomes = together(
        engine, *(ask("a", ((weights, 1.0),), max_tokens=2) for weights in (deep, wide, large)), ask("a", max_tokens=2)
    )
    assert [type(outcome) for outcome in outcomes] == [AdapterRejected, AdapterRejected, AdapterUnavailable, Completion]
    assert [outcome.adapter for outcome in outcomes[:3]] == ["deep", "wide", "large"]


def test_a_failing_acquire_fails_its_own_request_alone(pool, start, paced, monkeypatch):
    decoder = paced(pool.decoder("llama"))
    engine = start(decoder, max_batch=2)
    acquire = engine.slots.acquire

    def failing(sequence, wanted_soon):
        taken = acquire(sequence, wanted_soon)
        if any(packed.name == "mlp-rslora" for packed in sequence.adapters):
            raise MemoryError("out of device memory")
        return taken

    monkeypatch.setattr(engine.slots, "acquire", failing)
    good, bad = (("one-layer", 1.5),), (("patterns", 1.0), ("mlp-rslora", 1.0))
    prompt, sampling = prompts()[0], SamplingParams(max_tokens=20, ignore_eos=True)

    async def run():
        running = asyncio.create_task(collect(engine, GenerationRequest(prompt, pool.mix(good), sampling)))
        decoder.permits.release(5)
        await until(lambda: decoder.arrived == 6)
        failed = asyncio.create_task(collect(engine, GenerationRequest(prompt, pool.mix(bad), sampling)))
        await until(lambda: engine.load == (1, 1))
        decoder.permits.release(1)
        with pytest.raises(MemoryError):
            await failed
        decoder.permits.release(100)
        return await gather(running, collect(engine, GenerationRequest(prompt, (), sampling)))

    running, after = asyncio.run(run())
    assert running.token_ids == pool.continued("llama", prompt, 20, good)
    assert after.token_ids == pool.continued("llama", prompt, 20)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("known", [1, 6, 19])
def test_an_answer_goes_on_where_another_engine_left_it(pool, start, sampling, known):
    mixture, sampling = (("one-layer", 1.5),), SamplingParams(max_tokens=20, stop=("never",), **sampling)
    whole, other = (GenerationRequest(prompt, pool.mix(mixture), sampling) for prompt in (prompts()[1], prompts()[4]))
    first, second = start(pool.decoder("llama")), start(pool.decoder("llama"), step_tokens=7)
    [expected] = first.generate([whole])
    rest, _ = second.generate([replace(whole, generated=expected.token_ids[:known]), other])
    assert rest.token_ids == expected.token_ids[known:]
    assert expected.text.endswith(rest.text)
    assert rest.finish_reason == expected.finish_reason


def test_an_answer_that_is_whole_goes_no_further():
    with pytest.raises(InvalidRequest, match="already"):
        replace(ask("a", max_tokens=2), generated=(1, 2))


def test_who_would_take_too_long_is_refused(start, counting, paced):
    decoder = paced(counting)
    engine = start(decoder, max_batch=4, max_slowdown=2.0)
    engine.pace.answered(10, 10)
    for rows, seconds in ((1, 0.1), (2, 0.15), (4, 0.25)):
        engine.pace.step(rows, 0, seconds)

    async def run():
        asked = [asyncio.create_task(collect(engine, ask("a", max_tokens=2))) for _ in range(5)]
        await asyncio.sleep(0.1)
        decoder.permits.release(100)
        return await gather(*asked)

    answers = asyncio.run(run())
    assert [type(answer) for answer in answers] == [Completion] * 3 + [Overloaded] * 2
    assert "2.5 times" in str(answers[-1])
    assert answers[-1].retry_after_s == pytest.approx(2.0)
    assert len(engine.generate([ask("a", max_tokens=2)] * 9)) == 9  # who waits for a place is not refused


def test_a_failing_step_fails_who_is_running_alone(start, counting, paced):
    decoder = paced(counting)
    engine = start(decoder, max_batch=2)
    *failed, after = abreast(engine, decoder, *(ask(text, max_tokens=5) for text in "a?c"))
    assert [str(error) for error in failed] == ["forward failed"] * 2
    assert after.text == "defgh"
    assert engine.generate([ask("a", max_tokens=2)])[0].text == "bc"
    engine.check_health()


@pytest.mark.parametrize("prompt", ["!", "\x1e"])  # at the first token, and at the fourth
def test_logits_that_are_not_finite_fail_their_request_alone(start, counting, paced, made, prompt):
    decoder = paced(counting)
    culprit = made(counting.shape, "culprit", q_proj=1)
    requests = [ask(prompt, ((culprit, 1.0),)), ask("a", max_tokens=6), ask("b" * 95, max_tokens=3)]
    failed, *answers = abreast(start(decoder, step_tokens=10), decoder, *requests)
    assert [answer.text for answer in answers] == ["bcdefg", "cde"]
    assert type(failed) is InvalidRequest
    assert "culprit" in str(failed)


def test_logits_of_the_base_model_that_are_not_finite_are_no_fault_of_the_request(start, counting):
    with pytest.raises(LorauterError, match="base model's output is not finite") as caught:
        start(counting).generate([ask("!")])
    assert type(caught.value) is LorauterError


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_is_not_finite_does_not_outlive_its_request(pool, start, paced, huge, cancelled):
    """0 times NaN is NaN, also where attention masks what an earlier sequence left in a cache row."""
    decoder = paced(pool.decoder("llama"))
    engine = start(decoder, max_batch=2, step_tokens=10)

    async def ruin():
        task = asyncio.create_task(collect(engine, GenerationRequest((1,) * 40, ((huge, 1.0),))))
        decoder.permits.release(1)
        await until(lambda: decoder.arrived == 2)
        if cancelled:  # in the middle of its prompt
            task.cancel()
            await asyncio.wait([task])
        decoder.permits.release(1000)
        return await gather(task)

    (error,) = asyncio.run(ruin())
    assert isinstance(error, asyncio.CancelledError if cancelled else LorauterError)
    requests = [GenerationRequest(prompt, sampling=SamplingParams(24, ignore_eos=True)) for prompt in prompts()[:2]]
    for answer, request in zip(engine.generate(requests), requests, strict=True):
        assert answer.token_ids == pool.continued("llama", request.prompt, 24)


def test_generate_ends_with_the_first_failure_and_lets_the_rest_go(start, counting):
    engine = start(counting, max_model_len=1 << 20)
    with pytest.raises(LorauterError, match="not finite"):
        engine.generate([ask("a", **ENDLESS), ask("!"), ask("c", **ENDLESS)])
    asyncio.run(until(lambda: engine.load == (0, 0)))
    assert engine.generate([ask("a", max_tokens=2)])[0].text == "bc"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("ending", ["close", "death"])
def test_nobody_is_left_waiting_when_the_engine_ends(start, counting, paced, ending):
    decoder = paced(counting)
    engine = start(decoder, max_batch=2)

    async def run():
        texts = ("a", "a" if ending == "close" else "~", "c")
        tasks = [asyncio.create_task(collect(engine, ask(text, **ENDLESS))) for text in texts]
        await until(lambda: sum(engine.load) == 3)
        engine.check_health()
        if ending == "close":
            tasks.append(asyncio.create_task(asyncio.to_thread(engine.close)))
        while not all(task.done() for task in tasks):
            decoder.permits.release()
            await asyncio.sleep(0.001)
        return (await gather(*tasks))[:3]

    assert all("engine was closed" in str(outcome) for outcome in asyncio.run(run()))
    engine.close()
    with pytest.raises(RuntimeError, match="ended"):
        engine.check_health()
    with pytest.raises(LorauterError, match="is closed"):
        engine.generate([ask("a")])


def test_requests_with_resident_adapters_pass_one_that_waits_but_not_for_ever(start, counting, made):
    """Room for one adapter: two short requests on it go before the one that wants another, then it is next."""
    a, b = (made(counting.shape, name, q_proj=4) for name in "ab")
    engine = start(counting, max_batch=2, adapter_bytes=256)
    order = []

    async def one(name, weights, tokens):
        await collect(engine, ask("a", ((weights, 1.0),), max_tokens=tokens, ignore_eos=True))
        order.append(name)

    async def run():
        await gather(one("long", a, 40), one("other", b, 2), *(one(f"short {i}", a, 2) for i in range(4)))

    asyncio.run(run())
    assert order[:4] == ["short 0", "short 1", "long", "other"]
    assert engine.slots.counters.hits >= 2
    assert engine.slots.counters.misses >= 3


def test_what_was_begun_elsewhere_must_leave_room_too(start, counting):
    engine = start(counting, max_model_len=8)
    for known in (4, 9):
        asked = replace(ask("a" * 4, max_tokens=20), generated=(98,) * known)
        with pytest.raises(ContextLengthExceeded):
            engine.generate([asked])
    with pytest.raises(InvalidRequest, match="generated"):
        engine.generate([replace(ask("a", max_tokens=20), generated=(-1,))])
    assert engine.load == (0, 0)


def test_what_was_begun_elsewhere_is_taken_though_the_queue_is_full(start, counting, paced):
    decoder = paced(counting)
    engine = start(decoder, max_batch=1, max_queue=1)

    async def run():
        asked = [asyncio.create_task(collect(engine, ask("a", max_tokens=3))) for _ in range(2)]
        await until(lambda: sum(engine.load) == 2)
        resumed = asyncio.create_task(collect(engine, replace(ask("c", max_tokens=4), generated=(ord("d"),))))
        await until(lambda: sum(engine.load) == 3)
        decoder.permits.release(100)
        return await gather(*asked, resumed)

    assert [answer.text for answer in asyncio.run(run())] == ["bcd", "bcd", "efg"]


def test_an_answer_whose_text_cannot_be_made_fails_alone(start, counting, paced, monkeypatch):
    decoder = paced(counting)
    engine = start(decoder)
    push = TextStream.push

    def failing(self, token):
        if token == ord("r"):
            raise ValueError("no text")
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", failing)
    failed, *others = abreast(engine, decoder, *(ask(text, max_tokens=5) for text in ("q", "a", "c")))
    assert "no text" in str(failed)
    assert [answer.text for answer in others] == ["bcdef", "defgh"]


def test_an_engine_whose_steps_all_fail_or_do_not_end_is_unhealthy(start, counting, paced):
    engine = start(counting)
    for _ in range(4):
        with pytest.raises(RuntimeError, match="forward failed"):
            engine.generate([ask("?")])
    engine.check_health()
    engine.generate([ask("a", max_tokens=1)])
    for _ in range(5):
        with pytest.raises(RuntimeError, match="forward failed"):
            engine.generate([ask("?")])
    with pytest.raises(RuntimeError, match="5 steps have all failed"):
        engine.check_health()
    slow = start(paced(counting), step_timeout_s=0.05)
    slow.submit(ask("a"), lambda item: None)
    time.sleep(0.2)
    with pytest.raises(RuntimeError, match="has not ended"):
        slow.check_health()


def test_a_stream_without_tokens_for_too_long_ends(start, counting, paced):
    decoder = paced(counting)
    engine = start(decoder, token_timeout_s=0.05)
    decoder.permits.release(1)
    (error,) = together(engine, ask("a", max_tokens=9))
    assert "no token for 0.05 s" in str(error)


def test_a_closed_engine_is_gone_with_its_last_user(pool, codec):
    """And its memory with it, without a collection of cycles, which does not look at what was there at the start."""
    engine = MultiLoraEngine(pool.decoder("llama"), codec, EngineConfig(max_batch=2, adapter_bytes=1 << 12))
    engine.generate([GenerationRequest((1, 2, 3), sampling=SamplingParams(2))])
    engine.close()
    gone = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert gone() is None
    finally:
        gc.enable()
