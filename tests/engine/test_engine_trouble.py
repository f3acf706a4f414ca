"""Nobody's trouble is anybody else's, and what is wrong is said."""

import asyncio
import gc
import time
import weakref
from dataclasses import replace

import pytest
from engine_requests import ENDLESS, abreast, ask, collect, gather, prompts, together, until

from lorauter.engine import Completion, EngineConfig, GenerationRequest, MultiLoraEngine, SamplingParams
from lorauter.engine.text import TextStream
from lorauter.errors import (
    AdapterRejected,
    AdapterUnavailable,
    ContextLengthExceeded,
    InvalidRequest,
    LorauterError,
    Overloaded,
)


def test_a_prompt_must_leave_room_for_an_answer(start, counting):
    engine = start(counting, max_model_len=8)
    for run in (lambda request: engine.generate([request]), lambda request: asyncio.run(collect(engine, request))):
        with pytest.raises(ContextLengthExceeded) as caught:
            run(ask("a" * 8))
        assert (caught.value.prompt_tokens, caught.value.max_tokens) == (8, 8)


def test_the_models_own_limit_bounds_the_context(pool, start):
    assert start(pool.decoder("llama"), max_model_len=1000).max_model_len == 96


@pytest.mark.parametrize("token", [-1, 259, 1 << 40])
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


def test_a_prompt_whose_text_cannot_be_made_fails_alone(start, counting, paced, monkeypatch):
    decoder = paced(counting)
    engine = start(decoder)
    monkeypatch.setattr(TextStream, "logprobs", lambda self, ranked: ranked.no_text)
    failed, other = abreast(engine, decoder, ask("qq", max_tokens=5, prompt_logprobs=0), ask("a", max_tokens=5))
    assert "no_text" in str(failed)
    assert other.text == "bcdef"
    asyncio.run(until(lambda: engine.load == (0, 0)))


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


def test_a_stream_whose_tokens_are_held_longer_than_it_may_be_without_them_goes_on(start, counting, paced):
    decoder = paced(counting)
    engine = start(decoder, token_timeout_s=0.1)

    async def run():
        stream = engine.stream(ask("a", max_tokens=3), gap=lambda: 60.0)
        decoder.permits.release(2)
        said = [await anext(stream), await anext(stream)]
        decoder.permits.release(1)
        return [chunk.text for chunk in (*said, await anext(stream))]

    assert asyncio.run(run()) == ["b", "c", "d"]


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
